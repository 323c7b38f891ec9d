"""What a task is to the runner: pieces of work in a fixed order, each measured with every cache, and the rows they give."""

from __future__ import annotations

import hashlib
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Makers = Mapping[str, Callable[[], Any]]  # name -> makes an empty cache; the dense one is first
WARMUP = 3  # steps of an item whose times are not counted: compiling, first allocations


@dataclass(frozen=True)
class Metric:
    """The score of a row. `right_or_wrong`: 1 is right, anything less is wrong, and pairs can be discordant."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    right_or_wrong: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dict(vars(self))


@dataclass(frozen=True)
class Row:
    """One pair (or more) of scores. `scores`: cache name -> {"score": ..., further figures}."""

    id: str
    context: int
    group: dict[str, Any]
    scores: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dict(vars(self))


@dataclass
class Run:
    """A filled cache after a piece of work. taken: decode steps, up to its last step; None: those it has records of."""

    cache: Any
    taken: int | None = None


@dataclass
class Outcome:
    """What a piece of work gave: rows, the caches by name, and the median decode step by name in milliseconds, where timed."""

    rows: list[Row]
    runs: dict[str, list[Run]] = field(default_factory=dict)
    decode_ms: dict[str, float] | None = None


class Task(ABC):
    """One task on one model. Attributes: name; metric; steps: decode steps of the longest piece of work."""

    name: str
    metric: Metric
    steps: int

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the prompts and scores, as plain JSON types; texts by their SHA-256."""

    @abstractmethod
    def pieces(self) -> list[str]:
        """Names of the pieces of work, the same for the same settings."""

    @abstractmethod
    def measure(self, piece: str, makers: Makers) -> Outcome:
        """One piece of work with every cache."""


@torch.inference_mode()
def read(model: PreTrainedModel, cache: Any, ids: Tensor, chunk: int | None = None) -> None:
    """Fill a cache with `[1, tokens]`; nothing happens with none. `chunk`: tokens at a time."""
    if ids.shape[1]:
        for part in ids.split(chunk or ids.shape[1], dim=1):
            forward(model, cache, part)


@torch.inference_mode()
def forward(model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
    """Logits after the last of the new tokens `[1, tokens]`: `[vocabulary]`."""
    kind: Any = type(model)
    options = {"logits_to_keep": 1} if _keeps_few(kind) else {}
    logits: Tensor = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, **options).logits
    return logits[0, -1]


@memoised
def _keeps_few(kind: Any) -> bool:
    """Whether a model computes logits of the last token only, when asked."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters


def clock(device: torch.device) -> float:
    """Seconds, when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def text_hash(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def greedy(model: PreTrainedModel, ids: Tensor, cache: Any, new_tokens: int, stop: bool = True) -> list[int]:
    """At most (without `stop` exactly) so many greedy tokens after `[1, tokens]`, whose first ones the cache may hold."""
    ids = ids.to(model.device)
    options: dict[str, Any] = {} if stop else {"min_new_tokens": new_tokens}
    pad = model.generation_config.pad_token_id
    if pad is None:
        options["pad_token_id"] = 0  # one row is never padded
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new_tokens, do_sample=False,
        num_beams=1, **options,
    )  # fmt: skip
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found
