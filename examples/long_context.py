"""Read a whole book into a certified cache, chunk by chunk, watch its memory and its bounds, and get an answer.

    python examples/long_context.py                                        # facts hidden in 32,768 tokens: are they found?
    python examples/long_context.py --context 131000 --needles 20          # as much as the retriever can hold
    python examples/long_context.py --model prose                          # prose goes on with a text of its own
    python examples/long_context.py --model Qwen/Qwen2.5-0.5B-Instruct --text book.txt --question "Who is the old man?"

The live table goes to stderr, the answer to stdout.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_certkv import CertifiedQuantizedCache, CertKVConfig
from hf_certkv.embedded import Haystack, load_embedded, make_haystack, resolve_model
from hf_certkv.report import human_bytes

CONTEXT = 32_768  # tokens that are read where nothing else is said and the model can hold them
ROOM = 128  # tokens for what a chat template puts around a text
PASSAGE = 1000  # tokens of one passage that prose writes: it was trained on windows of 1,024
EVERY = 0.25  # seconds from one look at the cache to the next


class Watch:
    """A live table of what a cache holds and proves. Also a streamer: `generate` tells it of every token."""

    def __init__(self, cache: CertifiedQuantizedCache, tokens: int, made: str = "tokens") -> None:
        self.cache, self.tokens, self.made = cache, tokens, made
        self.new = -1  # the first thing that a streamer is given is the prompt
        self.began = self.read_by = self.first = self.last = self.shown = time.perf_counter()
        # Where stderr is no terminal, only the last table is printed.
        self.console = Console(stderr=True)
        self.live = Live(self.table(), console=self.console, auto_refresh=False)

    def __enter__(self) -> Watch:
        self.live.start(refresh=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.update(self.table(), refresh=True)
        self.live.stop()
        if not self.console.is_terminal:
            self.console.line()

    def show(self) -> None:
        """Draw the table anew, unless that was done a moment ago."""
        if time.perf_counter() - self.shown > EVERY:
            self.live.update(self.table(), refresh=True)
            self.shown = time.perf_counter()

    def put(self, value: Any) -> None:
        """The prompt first, then one new token a call."""
        self.new += 1
        self.last = time.perf_counter()
        if self.new == 1:
            self.first = self.last
        self.show()

    def end(self) -> None:
        """The last token was put."""

    def table(self) -> Table:
        """Tokens, memory, and the certificate so far."""
        held, report = self.cache.get_seq_length(), self.cache.report().to_dict()
        memory, overall, rtol = self.cache.memory(), report["overall"], self.cache.settings.rtol
        table = Table.grid(padding=(0, 2))
        read, seconds = min(held, self.tokens), self.read_by - self.began
        table.add_row("read", f"{read:,} of {self.tokens:,} tokens" + (f", {read / seconds:,.0f} a second" if seconds else ""))
        share = f"{human_bytes(memory.device)}, {memory.ratio:.2f} of the {human_bytes(memory.dense)} of a dense cache"
        table.add_row("on the device", share if held else "nothing yet")
        table.add_row("on the host", human_bytes(memory.host))
        if self.new > 1:
            speed = (self.new - 1) / (self.last - self.first)
            table.add_row("generated", f"{self.new:,} {self.made}, {speed:,.1f} a second")
        bound, shares = overall["relative"]["bound"], overall["rung_share"]
        if overall["head_steps"]:
            largest = "none: all heads were dense" if bound is None else f"{bound['max']:.3%} of the output's norm"
            table.add_row("largest bound", f"{largest}; the tolerance is {rtol:.3%}")
            raised, dense = (shares[a] + shares[b] for a, b in (("keys", "values"), ("dense_head", "dense_layer")))
            steps = f"{shares['fast']:.1%} fast, {raised:.1%} raised, {dense:.1%} dense"
            table.add_row("heads", f"{steps}, of {overall['head_steps']:,} head-steps")
        elif self.new > 1:
            table.add_row("largest bound", "none: so few tokens are not quantised, and every step was exact")
        return table


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, cache: CertifiedQuantizedCache, chunk: int, watch: Watch) -> None:
    """Fill the cache with `[1, tokens]`, so many at a time that no more of the model's memory is needed for them."""
    for part in ids.to(model.device).split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        watch.read_by = time.perf_counter()
        watch.show()


@torch.inference_mode()
def find_needles(model: Any, haystack: Haystack, cache: CertifiedQuantizedCache, watch: Watch) -> list[int]:
    """Ask for every needle of a haystack that was read; each question is taken out of the cache again."""
    answers = []
    watch.put(None)
    for index in range(len(haystack.needles)):
        question = haystack.question(index).to(model.device)
        logits = model(input_ids=question, past_key_values=cache, use_cache=True).logits
        answers.append(int(logits[0, -1].argmax()))
        cache.crop(-1)
        watch.put(None)
    return answers


def write_text(tokens: int, seed: int) -> str:
    """A text of at least `tokens` tokens that the embedded model prose makes up, all passages at the same time."""
    tokens = tokens * 3 // 2 + 16  # other tokenizers need fewer for the same words
    model, tokenizer = load_embedded("prose")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = tokenizer(["CHAPTER I.\n\nIt was"] * -(-tokens // PASSAGE), return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    length = min(tokens, PASSAGE)
    written: Any = model.generate(
        **start, do_sample=True, temperature=0.8, top_k=50, min_new_tokens=length, max_new_tokens=length
    )
    return "\n\n".join(tokenizer.batch_decode(written, skip_special_tokens=True))


def most_tokens(model: Any, name: str, wanted: int | None, reserved: int) -> int | None:
    """How many tokens of a text fit into the positions that the model was made for; None where it does not say.

    Raises: ValueError: so many as wanted do not fit, or none.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if wanted is not None and wanted < 1:
        raise ValueError(f"--context {wanted}: expected at least one token.")
    if longest is None:
        return wanted
    room = longest - reserved
    if room < 1 or (wanted or 1) > room:
        raise ValueError(
            f"{name} was made for {longest:,} tokens, and {reserved:,} are needed besides the text, so at most "
            f"{max(room, 0):,} tokens of it can be read. Give a smaller --context (or none: what fits is read) or fewer "
            "--max-new-tokens."
        )
    return wanted or room


def encode(tokenizer: Any, text: str, question: str | None, most: int | None) -> tuple[torch.Tensor, int]:
    """The first `most` tokens of a text, and the question after them, as a chat where the model is made for that.

    Returns: ids `[1, tokens]`, and how many tokens the whole text has.
    """
    whole = tokenizer(text, verbose=False).input_ids
    ids = whole[:most]
    if question is not None:
        asked = f"{tokenizer.decode(ids, skip_special_tokens=True)}\n\n{question}"
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": asked}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(f"{asked}\n\n", verbose=False).input_ids
    return torch.tensor([ids]), len(whole)


def search(model: Any, tokenizer: Any, args: argparse.Namespace, cache: CertifiedQuantizedCache) -> None:
    """The retriever reads a haystack and is asked for what is hidden in it."""
    if args.text is not None or args.question is not None:
        raise ValueError("retriever knows no language: leave out --text and --question, or take another --model.")
    length = most_tokens(model, args.model, CONTEXT if args.context is None else args.context, reserved=1)
    haystack = make_haystack(tokenizer, length or CONTEXT, args.needles, args.seed)
    with Watch(cache, haystack.input_ids.shape[1], "answers") as watch:
        read(model, haystack.input_ids, cache, args.chunk, watch)
        answers = find_needles(model, haystack, cache, watch)
    right = 0
    for needle, answer in zip(haystack.needles, answers, strict=True):
        right += answer == needle.value_id
        verdict = "right" if answer == needle.value_id else f"WRONG: the text says {needle.value}"
        depth = needle.position / haystack.input_ids.shape[1]
        print(f"{needle.key} (at {depth:.0%} of the text)? {tokenizer.convert_ids_to_tokens(answer)} - {verdict}")
    print(f"{right} of {len(answers)} answers are right.")


def continue_text(model: Any, tokenizer: Any, args: argparse.Namespace, cache: CertifiedQuantizedCache) -> None:
    """A model of a language reads a text and goes on with it, or answers a question about it."""
    question = 0 if args.question is None else ROOM + len(tokenizer(args.question).input_ids)
    most = most_tokens(model, args.model, args.context, reserved=args.max_new_tokens + question)
    if args.text is None:
        most = min(args.context or CONTEXT, most or CONTEXT)
        with Console(stderr=True).status(f"prose writes a text of {most:,} tokens"):
            text = write_text(most, args.seed)
    else:
        try:
            text = args.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {args.text}: not a text in UTF-8 ({error.reason} at byte {error.start:,}).") from error
    if not text.strip():
        raise ValueError(f"--text {args.text}: the file is empty.")
    ids, whole = encode(tokenizer, text, args.question, most)
    if args.text is not None and most is not None and whole > most:
        print(f"note: of the {whole:,} tokens of {args.text} the first {most:,} are read.", file=sys.stderr)
    ids = ids.to(model.device)
    with Watch(cache, ids.shape[1]) as watch:
        read(model, ids[:, :-1], cache, args.chunk, watch)  # `generate` needs one token to begin with
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            streamer=watch,
        )
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())


def main(arguments: list[str] | None = None) -> None:
    """Read, and answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="retriever", help="'retriever' (the default), 'prose', a folder or a Hub name")
    parser.add_argument("--text", type=Path, help="a UTF-8 file; without one a text is made")
    parser.add_argument("--question", help="what to ask about the text; without one it is continued")
    parser.add_argument("--context", type=int, help=f"tokens of the text to read (default: what fits; {CONTEXT:,} if made)")
    parser.add_argument("--needles", type=int, default=8, help="facts to hide in the retriever's text")
    parser.add_argument("--rtol", type=float, default=0.02, help="how far an attention output may be off, over its norm")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens that the model reads at a time")
    parser.add_argument("--seed", type=int, default=0, help="of a text that is made")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if args.chunk < 1 or args.max_new_tokens < 1:
            raise ValueError("--chunk and --max-new-tokens: expected at least 1.")
        settings = CertKVConfig(rtol=args.rtol)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
        model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype="auto", device_map="auto")
        cache = CertifiedQuantizedCache(model.config, settings=settings)
        (search if hasattr(model.config, "retrieval_margin") else continue_text)(model, tokenizer, args, cache)
    except (OSError, ValueError) as error:  # each message says what was given and what to do
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped.\n")


if __name__ == "__main__":
    main()
