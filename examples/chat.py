"""A conversation whose cache is kept from turn to turn: each turn reads only what is new.

    python examples/chat.py --model Qwen/Qwen2.5-0.5B-Instruct
    printf 'Who are you?\\nAnd who am I?\\n/report\\n' | python examples/chat.py

Commands: /report, /memory, /reset, /quit, /help. Ctrl-C during an answer ends it after the next token and keeps what was said,
twice ends it at once; at the prompt it ends the chat. Answers go to stdout, what a turn took to stderr. The embedded model
prose, which is used where none is named, only dreams along.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from hf_certkv import CacheStateError, CertifiedQuantizedCache, CertKVConfig
from hf_certkv.embedded import resolve_model

HELP = "/report: what was proven so far. /memory: what the cache holds. /reset: begin anew. /quit: leave (as Ctrl-D)."


class TemplateFormat:
    """What the tokenizer's chat template makes of a conversation: all of it, anew for each turn."""

    stop: str | None = None

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> list[int]:
        """The tokens of the conversation so far and of a question, up to where the answer begins."""
        messages = [*self.messages, {"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    def answered(self, text: str, asked: list[int], answer: list[int]) -> None:
        """Take a question and the tokens of its answer into the conversation."""
        words = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": words}]


class PlainFormat:
    """`User: ...` and `Assistant: ...` on lines of their own, for models without a chat template."""

    stop = "\nUser:"

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.begin = f"{system}\n\n" if system else ""
        self.ids: list[int] = []

    def ask(self, text: str) -> list[int]:
        """As `TemplateFormat.ask`."""
        before = "\n" if self.ids else self.begin
        return self.ids + self.tokenizer(f"{before}User: {text}\nAssistant:", add_special_tokens=not self.ids).input_ids

    def answered(self, text: str, asked: list[int], answer: list[int]) -> None:
        """As `TemplateFormat.answered`. The model's own end of the answer, and a question it went on with, are left out."""
        words = list(answer)
        while words and words[-1] in self.tokenizer.all_special_ids:
            words.pop()
        said, stop, _ = self.tokenizer.decode(words).partition(self.stop)
        self.ids = asked + (self.tokenizer(said, add_special_tokens=False).input_ids if stop else words)


class Printer(TextStreamer):
    """Prints an answer as it comes, and notes its tokens at the end of a list."""

    def __init__(self, tokenizer: Any, tokens: list[int], stop: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens, self.stop = tokens, stop

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is sure by now, without the string that ended the answer."""
        if stream_end and self.stop:
            text = "" if text.startswith(self.stop.strip()) else text.partition(self.stop)[0]
        super().on_finalized_text(text, stream_end)


class Interruption:
    """Ctrl-C during an answer: the first stops `generate` after the next token, the second at once, wherever it is."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Interruption:
        self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), self.came, device=ids.device)

    def note(self, *_: Any) -> None:
        """What the signal does."""
        if self.came:
            raise KeyboardInterrupt
        self.came = True


@dataclass
class Turn:
    """What one turn took, in tokens: `kept` were in the cache, `read` were read, `new` were written."""

    kept: int
    read: int
    new: int
    interrupted: bool


class Chat:
    """One conversation. The cache always holds the first so many of `tokens`, whatever was interrupted, and wherever."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cache: CertifiedQuantizedCache,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.cache, self.system = model, tokenizer, cache, system
        self.options: dict[str, Any] = {"do_sample": temperature > 0, "temperature": temperature or None}
        self.max_new_tokens = max_new_tokens
        self.longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.reset()

    def reset(self) -> None:
        """Forget what was said. What was proven stays in the report."""
        self.cache.reset()
        self.tokens: list[int] = []
        self.format = (TemplateFormat if self.tokenizer.chat_template else PlainFormat)(self.tokenizer, self.system)

    def held(self) -> int:
        """How many tokens the cache holds, after whatever was interrupted in the middle of a forward pass is undone."""
        try:
            return self.cache.rollback()
        except CacheStateError:  # states of linear attention, for instance, cannot go back
            self.cache.reset()
            return 0

    def keep(self, wanted: list[int]) -> int:
        """Take out of the cache what is not the beginning of the wanted tokens; how many are left.

        The last of them is always read again, for its logits are needed.
        """
        held, kept = self.held(), 0
        # A template may show earlier turns in other words, as those do that leave out what a model thought.
        while kept < min(held, len(wanted) - 1) and self.tokens[kept] == wanted[kept]:
            kept += 1
        if kept < held:
            try:
                self.cache.crop(kept - held)
            except RuntimeError:  # layers with a sliding window cannot go back: everything is read again
                self.cache.reset()
                kept = 0
        return kept

    def turn(self, text: str) -> Turn:
        """Read what is new, and print the answer as it comes.

        Raises: ValueError: the conversation has become longer than the model can read; nothing has changed.
        """
        wanted = self.format.ask(text)
        room = self.max_new_tokens if self.longest is None else min(self.max_new_tokens, self.longest - len(wanted))
        if room < 1:
            raise ValueError(f"this conversation has {len(wanted):,} tokens and the model takes {self.longest:,}; try /reset")
        kept = self.keep(wanted)
        self.tokens = list(wanted)
        printer, interruption = Printer(self.tokenizer, self.tokens, self.format.stop), Interruption()
        ids = torch.tensor([wanted], device=self.model.device)
        try:
            with interruption:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self.cache,
                    streamer=printer,
                    stopping_criteria=[interruption],
                    max_new_tokens=room,
                    stop_strings=self.format.stop,
                    tokenizer=self.tokenizer,
                    **self.options,
                )
        except KeyboardInterrupt:  # perhaps in the middle of a forward pass, which `held` undoes
            printer.end()
        read = min(self.held(), len(wanted)) - kept
        answer = self.tokens[len(wanted) :]
        if answer:  # what was said until it was interrupted counts
            self.format.answered(text, wanted, answer)
        return Turn(kept, read, len(answer), interruption.came)


def command(chat: Chat, line: str) -> None:
    """Do what a line with a slash asks for."""
    if line == "/report":
        print(chat.cache.report())
    elif line == "/memory":
        print(chat.cache.memory())
    elif line == "/reset":
        chat.reset()
        print("Everything that was said is forgotten.")
    else:
        print(HELP if line == "/help" else f"There is no command {line}. {HELP}")


def answer(chat: Chat, line: str) -> None:
    """One turn, and what it took."""
    try:
        turn = chat.turn(line)
    except ValueError as error:
        print(f"note: {error}", file=sys.stderr)
        return
    bound = chat.cache.report().to_dict()["overall"]["relative"]["bound"]
    proven = "" if bound is None else f"; largest bound so far {bound['max']:.2%} of a head's output"
    stopped = ", stopped by Ctrl-C" if turn.interrupted else ""
    print(f"[kept {turn.kept:,} tokens, read {turn.read:,}, wrote {turn.new:,}{stopped}{proven}]", file=sys.stderr)


def talk(chat: Chat) -> None:
    """Turns from stdin until it ends."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            importlib.import_module("readline")  # lines can be edited
        print(HELP)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        if not typed:
            print(f"> {line}")  # so that a transcript can be read
        if line == "/quit":
            return
        if line.startswith("/"):
            command(chat, line)
        elif line:
            answer(chat, line)


def main(arguments: list[str] | None = None) -> None:
    """Load a model, and talk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="prose", help="a Hub name, a folder, or the embedded 'prose' (the default)")
    parser.add_argument("--system", help="what the model is told before the first turn")
    parser.add_argument("--rtol", type=float, default=0.02, help="how far an attention output may be off, over its norm")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 (the default) takes the likeliest")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if args.max_new_tokens < 1 or not 0 <= args.temperature < float("inf"):
            raise ValueError("--max-new-tokens: expected at least 1; --temperature: expected a number from 0 on.")
        settings = CertKVConfig(rtol=args.rtol)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
        model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype="auto", device_map="auto")
        cache = CertifiedQuantizedCache(model.config, settings=settings)
        talk(Chat(model, tokenizer, cache, args.system, args.max_new_tokens, args.temperature))
    except (OSError, ValueError, TemplateError) as error:  # each message says what was given and what to do
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")


if __name__ == "__main__":
    main()
