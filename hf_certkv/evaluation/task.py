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

from ..errors import InputError, UnsupportedModelError

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
class Filled:
    """A filled cache after a piece of work. taken: decode steps, up to its last step; None: those it has records of."""

    cache: Any
    taken: int | None = None


@dataclass
class Outcome:
    """What a piece of work gave: rows, the caches by name, and the median decode step by name in milliseconds, where timed."""

    rows: list[Row]
    runs: dict[str, list[Filled]] = field(default_factory=dict)
    decode_ms: dict[str, float] | None = None


class Task(ABC):
    """One task on one model. Attributes: name; metric; steps: decode steps of the longest piece of work.

    Args: tokens: the most that a cache will hold.
    Raises: UnsupportedModelError: the model takes no cache; InputError: it was made for fewer tokens.
    """

    name: str
    metric: Metric
    steps: int

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        check_model(model, tokens)
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


@torch.no_grad()
def read(model: PreTrainedModel, cache: Any, ids: Tensor, chunk: int | None = None) -> None:
    """Fill a cache with `[1, tokens]`; nothing happens with none. `chunk`: tokens at a time."""
    if ids.shape[1]:
        for part in ids.split(chunk or ids.shape[1], dim=1):
            forward(model, cache, part)


@torch.no_grad()
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


def ids_hash(*ids: Tensor) -> str:
    """SHA-256 of token ids."""
    digest = hashlib.sha256()
    for part in ids:
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def greedy(model: PreTrainedModel, ids: Tensor, cache: Any, new_tokens: int, stop: bool = True) -> list[int]:
    """At most (without `stop` exactly) so many likeliest tokens after `[1, tokens]`, whose first ones the cache may hold.

    Whatever else a model's generation config asks for (penalties, a cache of its own) is left out: it would be compared, too.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None or not stop else ends if isinstance(ends, list) else [ends]
    found: list[int] = []
    new = ids[:, cache.get_seq_length() :]
    while True:
        found.append(int(forward(model, cache, new).argmax()))
        if len(found) == new_tokens or found[-1] in ends:
            return found
        new = torch.tensor([found[-1:]])


def check_model(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a model that takes no cache, or was not made for so many tokens.

    Raises: UnsupportedModelError, InputError.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(f"{type(model).__name__} takes no cache of keys and values (past_key_values).")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise InputError(
            f"{tokens:,} tokens are more than the {longest:,} that the model was made for: take a shorter --context."
        )
