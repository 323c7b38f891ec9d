"""Greedy continuations beside the dense cache's: how many tokens until the first that differs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .caches import DENSE
from .task import Filled, Makers, Metric, Outcome, Row, greedy
from .texts import Source
from .windows import WindowTask

SHOWN = 400  # characters of a continuation that a row keeps


class Divergence(WindowTask):
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
        super().__init__(model, tokenizer, source, contexts, items, more=new_tokens)
        self.new_tokens = new_tokens
        self.steps = new_tokens - 1  # the first comes of the prompt itself
        self.metric = Metric(
            "until", "tokens until the first that differs from dense", f"of {new_tokens} tokens", higher_is_better=True,
            right_or_wrong=False,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What decides the scores."""
        return {**super().settings(), "new_tokens": self.new_tokens}

    def measure_window(self, piece: str, ids: Tensor, makers: Makers) -> Outcome:
        """Continue one prompt with every cache."""
        scores: dict[str, dict[str, Any]] = {}
        runs: dict[str, list[Filled]] = {}
        dense: list[int] = []
        for name, make in makers.items():
            cache = make()
            found = greedy(self.model, ids, cache, self.new_tokens, stop=False)
            dense = found if name == DENSE else dense
            until = next((i for i, (a, b) in enumerate(zip(found, dense, strict=True)) if a != b), len(dense))
            text = self.tokenizer.decode(found)[:SHOWN]
            scores[name] = {"score": float(until), "equal": float(until == len(dense)), "text": text}
            runs[name] = [Filled(cache, self.steps)]
        return Outcome([Row(piece, ids.shape[1], {}, scores)], runs)
