"""RULER through lm-evaluation-harness: its prompts, its scores, a fresh cache for every answer, and no loop without an end."""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_certkv import CertifiedQuantizedCache
from hf_certkv.embedded import embedded_path, load_embedded
from hf_certkv.errors import ConfigError, InputError, MissingDependencyError
from hf_certkv.evaluation.caches import parse_all
from hf_certkv.evaluation.harness_model import Call, CertifiedLM
from hf_certkv.evaluation.ruler import OFFLINE, Ruler

SMALL = dict(zip(OFFLINE, (512, 512, 512, 1024, 1152, 512), strict=True))  # contexts that do for both tokenizers
FOLDER = Path(lm_eval.__file__).parent / "tasks" / "ruler"


@cache
def loaded(name: str) -> tuple[Any, Any]:
    return load_embedded(name, dtype=torch.float32)


def ruler(name: str, tasks: tuple[str, ...], contexts: tuple[int, ...], seed: int = 0, new: int | None = None) -> Ruler:
    model, tokenizer = loaded(name)
    return Ruler(model, tokenizer, tasks, contexts, 2, seed, new)


def prompts(task: Ruler) -> dict[str, str]:
    return {piece: task.prompt(piece) for piece in task.pieces()}


def makers(task: Ruler, *caches: str) -> dict[str, Callable[[], Any]]:
    return {spec.name: partial(spec.make, task.model.config) for spec in parse_all(caches)}


def harness(lm: Any, task: str, context: int, new: int) -> list[dict[str, Any]]:
    """What lm-eval logs of its own first two samples, in the order that it made them."""
    metadata = {"max_seq_lengths": [context], "tokenizer": str(embedded_path("prose"))}
    manager = TaskManager(include_defaults=False, include_path=str(FOLDER), metadata=metadata)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, limit=2, gen_kwargs={"max_gen_toks": new}, bootstrap_iters=0
    )
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def test_the_same_prompts_whatever_was_drawn_before_and_nothing_else_is_moved() -> None:
    random.seed(5)
    np.random.seed(5)
    first = ruler("prose", ("niah_single_1", "vt", "cwe"), (1152,))
    sys.modules["lm_eval.tasks.ruler.cwe_utils"].RNG.seed(5)  # it keeps a state between calls
    here, there = random.getstate(), np.random.get_state()
    second = ruler("prose", ("ruler_cwe", "ruler_vt", "niah_single_1"), (2048, 1152))
    assert random.getstate() == here and (np.random.get_state()[1] == there[1]).all()
    assert prompts(first).items() <= prompts(second).items()
    assert len(prompts(second)) == 12 == len(set(prompts(second).values()))
    assert first.settings()["prompts_sha256"] == ruler("prose", first.tasks, (1152,)).settings()["prompts_sha256"]
    other = ruler("prose", first.tasks, (1152,), seed=1)
    assert not set(prompts(first).values()) & set(prompts(other).values())


FRESH = """
import json, random, sys, types
import numpy as np
from lm_eval.tasks import TaskManager
from hf_certkv.embedded import embedded_path, load_embedded
from hf_certkv.evaluation.ruler import Ruler

# lm-eval imports it for every task; it sorts millions of words, which none of these three uses.
unused = types.ModuleType("prepare_niah")
unused.generate_samples = unused.get_haystack = None
sys.modules["lm_eval.tasks.ruler.prepare_niah"] = unused
folder, path = sys.argv[1], embedded_path("prose")
random.seed(0)
np.random.seed(1234)
metadata = {"max_seq_lengths": [1152], "tokenizer": str(path)}
own = TaskManager(include_defaults=False, include_path=folder, metadata=metadata).load(["ruler_cwe"])["tasks"]["ruler_cwe"]
found = {f"ruler_cwe/1152/{index}": own.eval_docs[index]["input"] for index in range(2)}
model, tokenizer = load_embedded("prose")
task = Ruler(model, tokenizer, ("fwe", "cwe", "vt"), (1152,), 2)
print(json.dumps([found, {piece: task.prompt(piece) for piece in task.pieces()}]))
"""


def test_another_process_has_the_same_prompts_and_lm_eval_itself_too() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH, str(FOLDER)], capture_output=True, text=True, check=True)
    own, theirs = json.loads(done.stdout.splitlines()[-1])
    ours = prompts(ruler("prose", ("cwe", "vt", "fwe"), (1152,)))
    assert ours == theirs
    # In a fresh process lm-eval's own generator of word lists, which keeps a state between calls, is in its first one.
    for piece, text in own.items():
        assert ours[piece].startswith(text) and len(text) > 500


def copies(task: str, most: int | None = None) -> Callable[..., torch.Tensor]:
    """A model's `generate` that finds the answer in its prompt by itself, and says the first `most` parts of it."""
    _, tokenizer = loaded("prose")

    def generate(input_ids: torch.Tensor, max_length: int, **_: Any) -> torch.Tensor:
        prompt = tokenizer.decode(input_ids[0])
        if task == "ruler_vt":
            value = re.findall(r"assigned the value (\d+)", prompt)[-1]
            names = re.findall(rf"VAR (\w+) = {value}", prompt)
            while more := re.findall(rf"VAR (\w+) = VAR {names[-1]}\b", prompt):
                names.append(more[0])
            answers = names
        else:
            key = re.findall(r"for (\S+) mentioned", prompt)[-1]
            answers = re.findall(rf"for {key} is: (\S+)\.", prompt)
        said = tokenizer(" " + " ".join(answers[:most]) + " or so", return_tensors="pt").input_ids
        return torch.cat([input_ids, said], dim=1)[:, :max_length]

    return generate


@pytest.mark.parametrize(
    ("task", "most", "score"),
    [("niah_single_1", None, 1.0), ("niah_multikey_3", 0, 0.0), ("ruler_vt", None, 1.0), ("ruler_vt", 2, 0.4)],
)
def test_prompts_and_scores_are_those_of_lm_eval(
    task: str, most: int | None, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded("prose")
    ours = ruler("prose", (task,), (SMALL[task],), new=64)
    monkeypatch.setattr(model, "generate", copies(task, most))
    theirs = harness(HFLM(model, tokenizer=tokenizer), task, SMALL[task], new=64)
    for piece, sample in zip(ours.pieces(), theirs, strict=True):
        (row,) = ours.measure(piece, makers(ours, "dense")).rows
        assert ours.prompt(piece) == sample["arguments"][0][0]
        assert row.scores["dense"]["text"] == sample["resps"][0][0][:300]
        assert row.scores["dense"]["score"] == sample[str(SMALL[task])] == pytest.approx(score)
        assert (row.context, row.group, row.id) == (SMALL[task], {"task": task}, piece)


@pytest.mark.parametrize("task", ["niah_multikey_2", "ruler_fwe"])
def test_dense_texts_are_lm_evals_and_rtol_zero_gives_the_same(task: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded("prose")
    theirs = harness(HFLM(model, tokenizer=tokenizer), task, 512, new=16)
    capfd.readouterr()
    ours = ruler("prose", (task,), (512,), new=16)
    seen = []
    for piece, sample in zip(ours.pieces(), theirs, strict=True):
        outcome = ours.measure(piece, makers(ours, "dense", "exact=certified:rtol=0", "certified"))
        scores = outcome.rows[0].scores
        assert ours.prompt(piece) == sample["arguments"][0][0]
        assert scores["dense"]["text"] == scores["exact"]["text"] == sample["resps"][0][0]
        length = len(tokenizer(ours.prompt(piece)).input_ids)
        for name, (run,) in outcome.runs.items():
            assert run.cache.get_seq_length() == length + run.taken
            assert run.taken == 15 or name == "certified"
        report = outcome.runs["certified"][0].cache.report().to_dict()
        steps = outcome.runs["certified"][0].taken
        assert report["overall"]["head_steps"] == steps * model.config.num_hidden_layers * model.config.num_attention_heads
        seen += [run.cache for runs in outcome.runs.values() for run in runs]
    assert len({id(cache) for cache in seen}) == 6
    assert ours.steps == 16
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert logging.getLogger("lm_eval").level == logging.NOTSET


@pytest.mark.parametrize("name", ["prose", "retriever"])
def test_every_task_without_a_download(name: str) -> None:
    made = [ruler(name, (task,), (context,)) for task, context in SMALL.items()]
    assert tuple(task.tasks[0] for task in made) == OFFLINE
    assert [task.steps for task in made] == [128, 128, 128, 30, 120, 50]  # the lengths of lm-eval's configs
    for task, context in SMALL.items():
        short = ruler(name, (task,), (context,), new=2)
        assert short.pieces() == [f"{task}/{context}/0", f"{task}/{context}/1"]
        (row,) = short.measure(short.pieces()[1], makers(short)).rows
        assert set(row.scores) == {"dense", "naive", "certified"}
        assert all(part["score"] == 0.0 for part in row.scores.values())  # nobody answers in two tokens


@pytest.mark.parametrize("name", ["prose", "retriever"])
@pytest.mark.parametrize("task", OFFLINE)
def test_too_small_a_context_is_told_with_one_that_works(name: str, task: str) -> None:
    for context in (1, 33, 90):
        with pytest.raises(InputError, match=rf"--context {context}: too small for 2 samples of {task} ") as error:
            ruler(name, (task,), (context,))
        least = int(re.findall(r"--context (\d+)", str(error.value))[-1])
        assert len(ruler(name, (task,), (least,)).pieces()) == 2
        with pytest.raises(InputError, match="too small"):
            ruler(name, (task,), (least - 32,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ("nothing",)}, ["nothing", "niah_single_1", "ruler_fwe", "with a download", "ruler_qa_squad"]),
        ({"tasks": ()}, ["--tasks", "at least one", "ruler_vt"]),
        ({"contexts": ()}, ["--context", "from 1 on"]),
        ({"contexts": (512, 0)}, ["--context 512,0"]),
        ({"items": 0}, ["--items 0", "at least 1"]),
        ({"max_new_tokens": 0}, ["--new-tokens 0", "at least 1"]),
        ({"contexts": (512, 8192)}, ["niah_single_1/8192/", "reads 4,096", "smaller --context"]),
    ],
)
def test_what_cannot_be_run_is_told(options: dict[str, Any], words: list[str]) -> None:
    model, tokenizer = loaded("prose")
    given: dict[str, Any] = {"tasks": ("niah_single_1",), "contexts": (512,), "items": 2, **options}
    with pytest.raises(InputError) as error:
        Ruler(model, tokenizer, **given)
    for word in words:
        assert word in str(error.value)


def test_what_cannot_be_downloaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import requests

    def refused(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    monkeypatch.setattr(requests, "get", refused)
    for name in ("niah_multivalue", "qa_squad", "ruler_qa_hotpot"):
        with pytest.raises(InputError, match=rf"{name}: what it is made of cannot be downloaded \(no network here\)"):
            ruler("prose", (name,), (1024,))


def words_without_spaces() -> Tokenizer:
    return Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # any text is one token


def bytes_only() -> Tokenizer:
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


@pytest.mark.parametrize(
    ("made", "task", "said"),
    [
        (words_without_spaces, "vt", "1 tokens of 4,[0-9]{3} characters"),
        (words_without_spaces, "fwe", "1 tokens of 4,[0-9]{3} characters"),
        (bytes_only, "vt", "no samples with this tokenizer"),  # lm-eval's worked example has 500 tokens at most
    ],
)
def test_tokenizers_that_lm_eval_never_comes_to_an_end_with(made: Callable[[], Tokenizer], task: str, said: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made())
    with pytest.raises(InputError, match=said):
        Ruler(loaded("prose")[0], tokenizer, (task,), (2048,), 2)


@pytest.mark.parametrize(("module", "task"), [("lm_eval.tasks", "vt"), ("nltk", "vt"), ("wonderwords", "niah_single_1")])
def test_what_is_not_installed_is_told(module: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hf_certkv\[eval\]'"):
        ruler("prose", (task,), (1024,))


def test_the_tokenizer_is_left_alone() -> None:
    model, _ = loaded("prose")
    _, tokenizer = load_embedded("prose")
    tokenizer.pad_token = None
    Ruler(model, tokenizer, ("fwe",), (512,), 1)
    assert tokenizer.pad_token is None


PROSE = "It was a dark evening, and the old man sat by the fire with his dog. "


def asked(*lengths: int, new: int = 12) -> list[Instance]:
    return [
        Instance("generate_until", {}, (PROSE * length + "He", {"max_gen_toks": new, "until": [], "do_sample": False}), index)
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", ["dynamic", "exact"])
def test_a_padded_batch_is_what_lm_eval_makes_of_it(name: str) -> None:
    model, tokenizer = loaded("prose")
    calls: list[Call] = []
    make = DynamicCache if name == "dynamic" else partial(CertifiedQuantizedCache, model.config, rtol=0.0)
    ours = CertifiedLM(model, tokenizer=tokenizer, batch_size=2, make_cache=make, on_call=calls.append)
    requests = asked(40, 25, 31, 33)
    plain = HFLM(model, tokenizer=tokenizer, batch_size=2).generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests, disable_tqdm=True) == plain
    assert len(calls) == 2 and calls[0].cache is not calls[1].cache
    assert [call.new for call in calls] == [12, 12]
    for call, longest in zip(calls, (40, 31), strict=True):  # lm-eval takes the longest first
        assert call.prompt == len(tokenizer(PROSE * longest + "He").input_ids)
        assert call.cache.get_seq_length() == call.prompt + call.new - 1


def test_certificates_are_added_up_and_written_into_lm_evals_results() -> None:
    model, tokenizer = loaded("prose")
    lm = CertifiedLM(model, tokenizer=tokenizer, rtol=0.05, value_bits=8)
    assert lm.report() is None and "certificates" not in lm.get_model_info()
    lm.generate_until(asked(40, 25, new=9), disable_tqdm=True)
    report = lm.report()
    assert report is not None
    overall = report.to_dict()["overall"]
    assert overall["head_steps"] == 2 * 8 * model.config.num_hidden_layers * model.config.num_attention_heads
    assert (report.settings.rtol, report.settings.value_bits) == (0.05, 8)
    assert overall["relative"]["bound"]["max"] <= 0.05
    assert json.loads(json.dumps(lm.get_model_info()["certificates"]))["overall"]["head_steps"] == overall["head_steps"]


def test_log_likelihoods_are_exact_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = loaded("prose")
    lm = CertifiedLM(model, tokenizer=tokenizer, rtol=0.1, batch_size=2)
    words = (" He", " The fire", " xq")
    requests = [Instance("loglikelihood", {}, (PROSE * 30, word), index) for index, word in enumerate(words)]
    plain = HFLM(model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    caplog.set_level(logging.WARNING, logger="hf_certkv")
    for _ in range(2):
        assert lm.loglikelihood(requests, disable_tqdm=True) == plain
    assert sum("nothing about the cache" in record.getMessage() for record in caplog.records) == 1
    assert lm.report() is None


def test_lm_eval_finds_the_model_by_its_name() -> None:
    assert get_model("hf-certkv") is CertifiedLM
    lm = CertifiedLM.create_from_arg_string(f"pretrained={embedded_path('prose')},rtol=0.05,block_size=32", {"device": "cpu"})
    settings = lm.make_cache().settings
    assert (settings.rtol, settings.block_size) == (0.05, 32)


def test_settings_that_cannot_be_are_told() -> None:
    model, tokenizer = loaded("prose")
    with pytest.raises(ConfigError, match="rtol"):
        CertifiedLM(model, tokenizer=tokenizer, rtol=-1.0)
    with pytest.raises(ConfigError, match="make_cache and rtol"):
        CertifiedLM(model, tokenizer=tokenizer, rtol=0.1, make_cache=DynamicCache)
