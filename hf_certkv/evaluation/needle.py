"""Needle in a haystack: facts at a grid of depths and contexts, one or several in each haystack, answers compared exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .haystacks import Hidden, english, words
from .task import Filled, Makers, Metric, Outcome, Row, Task, check_model, greedy, ids_hash, read, text_hash


class Needle(Task):
    """Facts hidden at depths from the beginning (0) to the end (1) of a haystack, and asked for.

    The embedded retriever gets words of its own vocabulary, any other model English.

    Args: contexts: tokens of a haystack; depths: how many depths, evenly spread; needles: in each haystack, which divide the
        depths among them; items: haystacks of each context and depth; text: to hide facts in, None repeats a few sentences;
        chunk: tokens read at a time.

    Raises: InputError: sizes out of range, or a text too short.
    """

    name = "needle"
    metric = Metric("accuracy", "facts found", "share", higher_is_better=True, right_or_wrong=True)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        contexts: tuple[int, ...],
        depths: int = 10,
        needles: int = 1,
        items: int = 1,
        text: str | None = None,
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, max(contexts))
        if depths < 1 or needles < 1 or items < 1:
            raise InputError(f"--depths {depths}, --needles {needles}, --items {items}: expected at least 1 of each.")
        if depths % needles:
            raise InputError(f"--needles {needles}: expected a divisor of the {depths} --depths, which haystacks share.")
        self.contexts, self.depths, self.needles, self.items = contexts, depths, needles, items
        self.text, self.chunk, self.seed = text, chunk, seed
        self.margin = getattr(model.config, "retrieval_margin", None)  # the retriever's
        if self.margin is not None and text is not None:
            raise InputError("--text: the retriever knows no English; leave it out, or take another --model.")
        first = [self._hidden(context, 0, 0) for context in contexts]
        self.steps = needles * max(hidden.answer_tokens for hidden in first)
        asked = max(question.ids.shape[1] for hidden in first for question in hidden.questions)
        check_model(model, max(contexts) + asked + max(hidden.answer_tokens for hidden in first))
        self.first_hash = ids_hash(*(hidden.ids for hidden in first))

    def settings(self) -> dict[str, Any]:
        """What decides the scores."""
        names = ("depths", "needles", "items", "chunk", "seed", "margin")
        return {
            "contexts": list(self.contexts), **{name: getattr(self, name) for name in names},
            "text_sha256": None if self.text is None else text_hash(self.text), "haystacks_sha256": self.first_hash,
        }  # fmt: skip

    def pieces(self) -> list[str]:
        """A haystack each."""
        groups = self.depths // self.needles
        return [f"{c}/{item}/{group}" for c in self.contexts for item in range(self.items) for group in range(groups)]

    def _hidden(self, context: int, item: int, group: int) -> Hidden:
        groups = self.depths // self.needles
        grid = [index / max(1, self.depths - 1) for index in range(self.depths)][group::groups]
        seed = f"{self.seed}/{context}/{item}/{group}"
        if self.margin is not None:
            return words(context, grid, seed)
        return english(self.tokenizer, context, grid, seed, self.text)

    def measure(self, piece: str, makers: Makers) -> Outcome:
        """Read one haystack with each cache and ask for its facts, taking each question out of the cache again."""
        context, item, group = (int(part) for part in piece.split("/"))
        hidden = self._hidden(context, item, group)
        depths = [round(question.depth, 4) for question in hidden.questions]
        rows = [Row(f"{piece}/{depth:.2f}", context, {"depth": depth}, {}) for depth in depths]
        runs: dict[str, list[Filled]] = {}
        for name, make in makers.items():
            runs[name], answers = self._ask(hidden, make)
            for row, question, found in zip(rows, hidden.questions, answers, strict=True):
                row.scores[name] = {"score": float(question.right(found)), "text": self.tokenizer.decode(found)}
        return Outcome(rows, runs)

    def _ask(self, hidden: Hidden, make: Callable[[], Any]) -> tuple[list[Filled], list[list[int]]]:
        runs: list[Filled] = []
        answers: list[list[int]] = []
        length = hidden.ids.shape[1]
        for question in hidden.questions:
            if not runs or not _rewound(runs[-1].cache, length):
                cache = make()
                read(self.model, cache, hidden.ids, self.chunk)
                runs.append(Filled(cache))
            found = greedy(self.model, torch.cat([hidden.ids, question.ids], dim=1), runs[-1].cache, hidden.answer_tokens)
            answers.append(found)
        return runs, answers


def _rewound(cache: Any, length: int) -> bool:
    """Take what came after the first `length` tokens out of a cache; False where its layers cannot."""
    if any(cache.is_sliding) or any(getattr(cache, "is_linear", [])):
        return False
    cache.crop(length - cache.get_seq_length())
    return bool(cache.get_seq_length() == length)
