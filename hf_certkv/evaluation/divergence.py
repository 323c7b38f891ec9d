"""Greedy continuations beside the dense cache's: how many tokens until the first that differs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .caches import DENSE
from .task import Filled, Makers, Metric, Outcome, Row, Task, greedy, ids_hash
from .texts import Source

SHOWN = 400  # characters of a continuation that a row keeps


class Divergence(Task):
    """Tokens of a greedy continuation before the first that is not the dense cache's.

    Args: contexts: tokens of a prompt; items: prompts of each context; new_tokens: of a continuation.

    Raises: InputError: sizes out of range, or too short a text.
    """

    name = "divergence"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        contexts: tuple[int, ...],
        items: int,
        new_tokens: int = 64,
    ) -> None:
        if new_tokens < 1:
            raise InputError(f"--new-tokens {new_tokens}: expected at least 1.")
        super().__init__(model, tokenizer, max(contexts) + new_tokens)
        self.source, self.contexts, self.new_tokens = source, contexts, new_tokens
        self.steps = new_tokens - 1  # the first comes of the prompt itself
        self.windows = {context: source.windows(tokenizer, context, items) for context in contexts}
        self.metric = Metric(
            "until", "tokens until the first that differs from dense", f"of {new_tokens} tokens", higher_is_better=True,
            right_or_wrong=False,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What decides the scores."""
        items = len(next(iter(self.windows.values())))
        return {
            "contexts": list(self.contexts),
            "items": items,
            "new_tokens": self.new_tokens,
            **self.source.describe(),
            "windows_sha256": ids_hash(*self.windows.values()),
        }

    def pieces(self) -> list[str]:
        """A prompt each."""
        return [f"{context}/{index}" for context, windows in self.windows.items() for index in range(len(windows))]

    def measure(self, piece: str, makers: Makers) -> Outcome:
        """Continue one prompt with every cache."""
        context, index = (int(part) for part in piece.split("/"))
        prompt = self.windows[context][index : index + 1]
        scores: dict[str, dict[str, Any]] = {}
        runs: dict[str, list[Filled]] = {}
        dense: list[int] = []
        for name, make in makers.items():
            cache = make()
            found = greedy(self.model, prompt, cache, self.new_tokens, stop=False)
            dense = found if name == DENSE else dense
            until = next((i for i, (a, b) in enumerate(zip(found, dense, strict=True)) if a != b), len(dense))
            text = self.tokenizer.decode(found)[:SHOWN]
            scores[name] = {"score": float(until), "equal": float(until == len(dense)), "text": text}
            runs[name] = [Filled(cache, self.steps)]
        return Outcome([Row(piece, context, {}, scores)], runs)
