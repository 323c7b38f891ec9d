"""The examples, run as their readers run them: as commands, piped, interrupted, misused, and as notebooks."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from reading import figure
from transformers import AutoTokenizer, DynamicCache

from hf_certkv import CertifiedQuantizedCache
from hf_certkv.embedded import embedded_path, load_embedded, make_haystack

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = ("quickstart", "long_context")
LONG = "Tell me of the old man, and of his ship, and of the king who came from the sea. " * 16  # some 350 tokens
MOST_SECONDS = 240
# The start of earlier answers is all that is shown of them, as templates do that leave out what a model thought.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {{ m.content[:12] if m.role == 'assistant' else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@cache
def example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str, stdin: str = "") -> Any:
    """An example as a command of its own, from another folder."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd="/",
        timeout=MOST_SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def prose() -> tuple[Any, Any]:
    """The model as the examples load it, in the dtype that it is stored in."""
    return load_embedded("prose")


@pytest.fixture
def tokenizer() -> Any:
    """One that a test may change."""
    return AutoTokenizer.from_pretrained(embedded_path("prose"))


def dense_text(prose: tuple[Any, Any], ids: list[int], new_tokens: int) -> str:
    """What transformers' own cache makes of it."""
    model, words = prose
    given = torch.tensor([ids])
    options = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(given)}
    output = model.generate(given, past_key_values=DynamicCache(config=model.config), **options)
    return words.decode(output[0, len(ids) :], skip_special_tokens=True)


# quickstart.py


def test_quickstart_prints_a_text_and_its_certificate() -> None:
    done = run("quickstart", "--max-new-tokens", "8", "--rtol", "0.05")
    text, report = done.stdout.split("certificate: rtol=0.05", 1)
    assert len(text.split()) > 2
    row = next(line.split() for line in report.splitlines() if line.startswith(" all"))
    assert row[1] == str(6 * 4 * 7)  # layers, heads, steps: the first token needs none
    assert 0 < float(row[7]) <= 0.05  # B max
    assert figure(r"ratio +([\d.]+)", report) < 1


def test_quickstart_at_tolerance_zero_writes_what_the_dense_cache_writes(
    prose: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(LONG, encoding="utf-8")
    example("quickstart").main(["--prompt-file", str(file), "--rtol", "0", "--max-new-tokens", "12"])
    text, report = capsys.readouterr().out.split("\ncertificate: rtol=0.0", 1)
    assert text == dense_text(prose, prose[1](LONG).input_ids, 12)
    assert "100.0%" in report


# long_context.py


def test_long_context_finds_its_needles() -> None:
    done = run("long_context", "--context", "2048", "--needles", "4", "--chunk", "500", "--seed", "3")
    haystack = make_haystack(AutoTokenizer.from_pretrained(embedded_path("retriever")), 2048, 4, 3)
    *lines, last = done.stdout.splitlines()
    for line, needle in zip(lines, haystack.needles, strict=True):
        assert line == f"{needle.key} (at {needle.position / 2048:.0%} of the text)? {needle.value} - right"
    assert last == "4 of 4 answers are right."
    assert "2,048 of 2,048 tokens" in done.stderr
    assert "of the 2.0 MiB of a dense cache" in done.stderr  # tokens, layers, heads, keys and values, channels, bytes
    assert 0 < figure(r"device +[\d.]+ \w+, ([\d.]+) of", done.stderr) < 0.6
    assert 0 < figure(r"largest bound +([\d.]+)%", done.stderr) <= 2
    assert figure(r"of ([\d,]+) head-steps", done.stderr) == 4 * 2 * 4  # questions, layers, heads


def test_long_context_reads_a_text_in_chunks(
    prose: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, read, sizes = example("long_context"), torch.Tensor.split, []
    file = tmp_path / "book.txt"
    file.write_text(LONG * 2, encoding="utf-8")
    monkeypatch.setattr(torch.Tensor, "split", lambda ids, size, dim=0: [sizes.append(size), *read(ids, size, dim)][1:])
    options = ["--text", str(file), "--context", "400", "--max-new-tokens", "10", "--rtol", "0", "--chunk", "150"]
    module.main(["--model", "prose", *options])
    said = capsys.readouterr()
    ids = prose[1](LONG * 2).input_ids
    assert said.out.strip() == dense_text(prose, ids[:400], 10).strip()
    assert f"note: of the {len(ids):,} tokens of {file} the first 400 are read." in said.err.splitlines()[0]
    assert "400 of 400 tokens" in said.err and "none: all heads were dense" in said.err
    assert 150 in sizes


def test_long_context_makes_its_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    example("long_context").main(["--model", "prose", "--context", "300", "--max-new-tokens", "6"])
    said = capsys.readouterr()
    assert said.out.strip()
    assert "300 of 300 tokens" in said.err
    assert 0 < figure(r"largest bound +([\d.]+)%", said.err) <= 2
    assert figure(r"generated +(\d+) tokens", said.err) == 6


def test_a_question_stays_whole_when_the_text_is_cut(tokenizer: Any) -> None:
    encode = example("long_context").encode
    text = "The ship came in. " * 50
    tokenizer.chat_template = FORGETFUL
    ids, whole = encode(tokenizer, text, "Which ship?", 40)
    assert whole == len(tokenizer(text).input_ids) > 200
    begun = tokenizer.decode(tokenizer(text).input_ids[:40])
    assert tokenizer.decode(ids[0]) == f"user: {begun}\n\nWhich ship?\nassistant: "
    tokenizer.chat_template = None
    assert tokenizer.decode(encode(tokenizer, text, "Which ship?", 40)[0][0]) == f"{begun}\n\nWhich ship?\n\n"


# Misuse


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("quickstart", ["--rtol", "-1"], ["rtol=-1.0"]),
        ("quickstart", ["--prompt-file", "nowhere.txt"], ["nowhere.txt"]),
        ("quickstart", ["--prompt", ""], ["empty"]),
        ("quickstart", ["--model", "./nowhere"], ["./nowhere"]),
        ("quickstart", ["--max-new-tokens", "0"], ["max_new_tokens"]),
        ("long_context", ["--rtol", "nan"], ["rtol=nan"]),
        ("long_context", ["--context", "0"], ["--context 0"]),
        ("long_context", ["--context", "200000"], ["131,072", "--context"]),
        ("long_context", ["--context", "3"], ["8 needles"]),
        ("long_context", ["--text", "EMPTY"], ["retriever", "--text"]),
        ("long_context", ["--chunk", "0"], ["--chunk"]),
        ("long_context", ["--model", "prose", "--context", "5000"], ["4,096", "4,032", "--context"]),
        ("long_context", ["--model", "prose", "--max-new-tokens", "4096"], ["4,096", "--max-new-tokens"]),
        ("long_context", ["--model", "prose", "--text", "EMPTY"], ["empty.txt", "empty"]),
        ("long_context", ["--model", "prose", "--text", "BROKEN"], ["broken.txt", "UTF-8"]),
        ("long_context", ["--model", "prose", "--text", "nowhere.txt"], ["nowhere.txt"]),
        ("chat", ["--rtol", "-1"], ["rtol=-1.0"]),
        ("chat", ["--temperature", "-1"], ["--temperature"]),
        ("chat", ["--max-new-tokens", "0"], ["--max-new-tokens"]),
        ("chat", ["--model", "./nowhere"], ["./nowhere"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_misuse_is_told_in_one_line(
    name: str, arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, content in (("EMPTY", b" \n"), ("BROKEN", b"\xff\xfe")):
        (tmp_path / f"{given.lower()}.txt").write_bytes(content)
        arguments = [str(tmp_path / f"{given.lower()}.txt") if part == given else part for part in arguments]
    with pytest.raises(SystemExit) as left:
        example(name).main(arguments)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert lines == said.err.splitlines()[-1:]
    for word in words:
        assert word in lines[0]


# chat.py


class DenseChat:
    """The oracle: transformers' own cache, kept from turn to turn as the example should keep its own."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.held = model, DynamicCache(config=model.config), list[int]()

    def turn(self, wanted: list[int], new_tokens: int) -> tuple[int, list[int]]:
        """The tokens that were kept, and the answer."""
        kept = len(os.path.commonprefix([self.held, wanted[:-1]]))  # noqa: RUF071  # of two lists of numbers
        self.cache.crop(kept - len(self.held))
        given = torch.tensor([wanted])
        options = {"max_new_tokens": new_tokens, "do_sample": False, "attention_mask": torch.ones_like(given)}
        tokens = self.model.generate(given, past_key_values=self.cache, **options)[0].tolist()
        self.held = tokens[:-1]
        assert self.cache.get_seq_length() == len(self.held)
        return kept, tokens[len(wanted) :]


class Kept:
    """A chat of the example at tolerance zero, the oracle beside it, and a count of the tokens that the model reads."""

    def __init__(self, model: Any, tokenizer: Any, new_tokens: int) -> None:
        self.read = 0
        self.chat = example("chat").Chat(
            model, tokenizer, CertifiedQuantizedCache(model.config, rtol=0), max_new_tokens=new_tokens
        )
        self.dense = DenseChat(model)

    def turn(self, text: str) -> Any:
        """One turn, compared in everything."""
        before = self.chat.cache.get_seq_length()
        wanted = self.chat.format.ask(text)
        counted: list[int] = []
        embedding = self.chat.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(lambda _, given: counted.append(given[0].shape[1]))
        try:
            turn = self.chat.turn(text)
        finally:
            hook.remove()
        kept, answer = self.dense.turn(wanted, turn.new)
        assert (turn.kept, self.chat.tokens) == (kept, wanted + answer)
        assert kept <= before and turn.read == len(wanted) - kept == counted[0]
        assert self.chat.cache.get_seq_length() == len(self.dense.held)
        return turn


def test_a_chat_reads_only_what_is_new_and_answers_as_the_dense_cache(prose: tuple[Any, Any]) -> None:
    pair, read = Kept(*prose, new_tokens=12), []
    for number, text in enumerate((LONG, "And then?", "Why?")):
        turn = pair.turn(text)
        question = prose[1](("\n" if number else "") + f"User: {text}\nAssistant:").input_ids
        assert turn.read == len(question) + (number > 0)  # with the last token of the answer before, which nobody had read
        assert turn.new == 12
        read.append(turn.read)
    assert pair.chat.cache.certified_layers[0].store.blocks > 0
    assert pair.chat.cache.report().to_dict()["overall"]["head_steps"] == 6 * 4 * (sum(read[1:]) + 3 * 11)  # short turns, too


def test_a_chat_reads_again_what_a_template_shows_otherwise(prose: tuple[Any, Any], tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    pair = Kept(prose[0], tokenizer, new_tokens=24)
    assert pair.turn(LONG).kept == 0
    asked = len(tokenizer.apply_chat_template([{"role": "user", "content": LONG}], return_dict=True)["input_ids"])
    held = pair.chat.cache.get_seq_length()
    turn = pair.turn("And then?")
    assert asked <= turn.kept < held - 8  # the beginning of the answer is as it was, its end is not


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("at", [1, 5], ids=["reading", "writing"])
def test_a_chat_goes_on_after_ctrl_c(prose: tuple[Any, Any], at: int, times: int) -> None:
    """In the middle of a forward pass: once, the pass is finished; twice, its layers hold different numbers of tokens."""
    pair, passes = Kept(*prose, new_tokens=12), 0
    pair.turn(LONG)

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    hook = prose[0].model.layers[2].mlp.register_forward_hook(interrupt)
    chat, text = pair.chat, "And then?"
    wanted, held = chat.format.ask(text), chat.cache.get_seq_length()
    try:
        turn = chat.turn(text)
    finally:
        hook.remove()
    assert turn.interrupted
    assert turn.new == at - (times == 2)
    if turn.new:
        assert (turn.kept, chat.tokens) == (held, wanted + pair.dense.turn(wanted, turn.new)[1])
    else:
        assert chat.cache.get_seq_length() == held and turn.read == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not pair.turn("Who was there?").interrupted


def test_a_chat_that_has_become_too_long_says_so_and_changes_nothing(prose: tuple[Any, Any]) -> None:
    chat = example("chat").Chat(*prose, CertifiedQuantizedCache(prose[0].config), max_new_tokens=4)
    chat.turn("Hello.")
    tokens, held = list(chat.tokens), chat.cache.get_seq_length()
    with pytest.raises(ValueError, match=r"4,096; try /reset"):
        chat.turn(LONG * 12)
    assert (chat.tokens, chat.cache.get_seq_length()) == (tokens, held)
    assert chat.turn("And then?").kept == held


def test_the_last_token_of_a_question_is_read_even_if_it_is_held(prose: tuple[Any, Any]) -> None:
    chat = example("chat").Chat(*prose, CertifiedQuantizedCache(prose[0].config), max_new_tokens=4)
    chat.turn("Hello.")
    assert chat.keep(chat.tokens[:10]) == 9 == chat.cache.get_seq_length()


@pytest.mark.filterwarnings("ignore:No layer of MistralConfig")
def test_a_chat_reads_everything_again_where_a_layer_cannot_go_back(tokenizer: Any) -> None:
    model = build_model("mistral_sliding")
    chat = example("chat").Chat(model, tokenizer, CertifiedQuantizedCache(model.config))
    chat.tokens = list(range(2, 122))
    assert chat.keep([*chat.tokens, 7]) == 0
    with torch.no_grad():
        model(torch.tensor([chat.tokens]), past_key_values=chat.cache, use_cache=True)
    assert chat.keep([*chat.tokens, 7]) == 120
    assert chat.keep([*chat.tokens[:110], 7, 8]) == 0
    assert chat.cache.get_seq_length() == 0


def test_what_a_model_asks_itself_is_left_out(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, tokens = example("chat"), []
    format = module.PlainFormat(tokenizer, "Be kind.")
    asked = format.ask("Hello")
    printer = module.Printer(tokenizer, tokens, format.stop)
    printer.put(torch.tensor([asked]))
    for token in tokenizer(" Good day.\nUser:").input_ids:
        printer.put(torch.tensor([token]))
    printer.end()
    assert capsys.readouterr().out.strip() == "Good day."
    format.answered("Hello", asked, tokens)
    whole = "Be kind.\n\nUser: Hello\nAssistant: Good day.\nUser: Why?\nAssistant:"
    assert tokenizer.decode(format.ask("Why?")) == whole


def test_turns_and_commands_may_be_piped_in(prose: tuple[Any, Any]) -> None:
    turns = [LONG, "/memory", "And then?", "", "/what", "/report", "/reset", "Hello.", "/quit", "never read"]
    done = run("chat", "--max-new-tokens", "6", stdin="\n".join(turns))
    count = [len(prose[1](text).input_ids) for text in (f"User: {LONG.strip()}\nAssistant:", "\nUser: And then?\nAssistant:")]
    first, second, third = done.stderr.splitlines()
    assert first.startswith(f"[kept 0 tokens, read {count[0]:,}, wrote 6; largest bound so far ")
    assert second.startswith(f"[kept {count[0] + 5:,} tokens, read {count[1] + 1}, wrote 6; ")
    assert third.startswith(f"[kept 0 tokens, read {len(prose[1]('User: Hello.' + chr(10) + 'Assistant:').input_ids)}, wrote 6")
    assert 0 < figure(r"so far ([\d.]+)%", second) <= 2
    assert "There is no command /what." in done.stdout and "never read" not in done.stdout
    shown = [line.split() for line in done.stdout.splitlines()]
    assert [row[1] for row in shown if row[:1] == ["all"]] == [f"{6 * 4 * (count[1] + 1 + 10):,}"]  # layers, heads, tokens
    assert sum(row[:1] == ["ratio"] for row in shown) == 2  # by /memory and by /report


# The notebooks


def test_the_readme_lists_every_example() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.ipynb")]:
        assert f"({path.relative_to(EXAMPLES).as_posix()})" in listed
