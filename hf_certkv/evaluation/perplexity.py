"""Teacher-forced perplexity: every scored token is decoded by itself through the cache, in lockstep with the dense one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .caches import DENSE
from .task import WARMUP, Filled, Makers, Metric, Outcome, Row, clock, forward, read
from .texts import Source
from .windows import WindowTask


class Perplexity(WindowTask):
    """Negative log likelihood of the last tokens of windows of a text, or of all but the first.

    All caches hold the same window and take turns at every token, so that times are paired and no logits need be kept.

    Args: contexts: tokens of a window; items: windows of each context; score_last: tokens scored at a window's end, None
        scores all but the first; chunk: tokens read at a time before that.

    Raises: InputError: sizes that do not fit together, or too short a text.
    """

    name = "ppl"
    metric = Metric("nll", "negative log likelihood", "nats a token", higher_is_better=False, right_or_wrong=False)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        contexts: tuple[int, ...],
        items: int,
        score_last: int | None = 256,
        chunk: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, source, contexts, items)
        if score_last is not None and not all(1 <= score_last < context for context in contexts):
            raise InputError(f"--score-last {score_last}: expected at least 1, fewer than a window's {min(contexts)} tokens.")
        if min(contexts) < 2:
            raise InputError(f"--context {min(contexts)}: a window needs at least 2 tokens, one to read and one to score.")
        self.score_last, self.chunk = score_last, chunk
        self.steps = max(self._scored(context) for context in contexts)

    def _scored(self, context: int) -> int:
        return context - 1 if self.score_last is None else self.score_last

    def settings(self) -> dict[str, Any]:
        """What decides the scores."""
        return {**super().settings(), "score_last": self.score_last, "chunk": self.chunk}

    @torch.no_grad()
    def measure_window(self, piece: str, ids: Tensor, makers: Makers) -> Outcome:
        """Decode one window with all caches."""
        context = ids.shape[1]
        scored = self._scored(context)
        begin = context - scored - 1  # the token whose successor is scored first
        caches = {name: make() for name, make in makers.items()}
        for cache in caches.values():
            read(self.model, cache, ids[:, :begin], self.chunk)
        sums = {name: np.zeros(3) for name in caches}  # nll, kl, same
        widest = dict.fromkeys(caches, 0.0)
        times: dict[str, list[float]] = {name: [] for name in caches}
        names = list(caches)
        for place in range(begin, context - 1):
            turn = place % len(names)
            found: dict[str, Tensor] = {}
            for name in names[turn:] + names[:turn]:
                start = clock(self.model.device)
                logits = forward(self.model, caches[name], ids[:, place : place + 1])
                times[name].append(clock(self.model.device) - start)
                found[name] = logits.double().log_softmax(dim=-1)
            target = int(ids[0, place + 1])
            dense = found[DENSE]
            for name, logs in found.items():
                kl = max(0.0, float((dense.exp() * (dense - logs)).nan_to_num(nan=0.0).sum()))
                sums[name] += (-float(logs[target]), kl, float(logs.argmax() == dense.argmax()))
                widest[name] = max(widest[name], kl)
        scores = {}
        for name in names:
            nll, kl, same = (float(part) / scored for part in sums[name])
            if not math.isfinite(nll):
                raise InputError(f"window {piece}: the likelihood with the cache {name!r} is {nll}; try another --dtype.")
            scores[name] = {"score": nll, "kl": kl, "kl_max": widest[name], "same_top": same, "tokens": scored}
        row = Row(piece, context, {}, scores)
        runs = {name: [Filled(cache, scored)] for name, cache in caches.items()}
        if scored <= WARMUP:
            return Outcome([row], runs)
        return Outcome([row], runs, {name: 1e3 * float(np.median(spent[WARMUP:])) for name, spent in times.items()})
