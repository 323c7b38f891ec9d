"""Results of operations on handles that have not been carried out, and what they mean for attention.

A `Deferred` is a tensor without storage. The rules of written_out.py make one of another; whatever they do not know carries out
the very operations that the model asked for, on the exact originals.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .errors import InputError
from .handle import Handle, Lazy, carried_out, versioned, writes

if TYPE_CHECKING:
    from .layers import CertifiedLayer


Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A handle in another form. Attributes: transposed: the last two axes; flat: batch and heads are one; copied: no view."""

    handle: Handle
    transposed: bool = False
    flat: bool = False
    copied: bool = False


@dataclass(frozen=True)
class Scores:
    """Scores, or weights, as `factor * (cap(inner * q.k)) + bias`, masked tokens at most `FLOOR`.

    Attributes: query `[batch, query_heads, positions, channels]`; key: with as many heads; flat: batch and heads are one axis
        of the tensor that stands for this; inner: the factor inside tanh, None without; masks: bool, True where a score was
        replaced; weights: softmax has been taken; sinks: logits `[query_heads]` of a column that attends to nothing; column: it
        is still there, behind the tokens; shifted: each row but for a number that softmax does not see; floored: masked tokens
        may be at the floor in place of what they were masked with.
    """

    query: Tensor
    key: Handle
    flat: bool = False
    factor: float = 1.0
    inner: float | None = None
    bias: Tensor | None = None
    masks: tuple[Tensor, ...] = ()
    weights: bool = False
    sinks: Tensor | None = None
    column: bool = False
    shifted: bool = False
    floored: bool = False

    @property
    def full(self) -> tuple[int, int, int, int]:
        """`(batch, query_heads, positions, tokens)`."""
        batch, heads, positions, _ = self.query.shape
        return batch, heads, positions, self.key.length

    def by_head(self, x: Tensor) -> Tensor | None:
        """Something that broadcasts to the tensor which stands for this, as it broadcasts to `full`; None where it does not."""
        batch, heads, _, tokens = self.full
        if self.column:
            return None
        if self.flat and x.dim() == 3 and x.shape[0] == batch * heads:
            x = x.reshape(batch, heads, *x.shape[1:])
        elif self.flat and (x.dim() > 3 or (x.dim() == 3 and x.shape[0] != 1)):
            return None
        fits = x.dim() <= 4 and all(size in (1, whole) for size, whole in zip(x.shape[::-1], self.full[::-1], strict=False))
        return x if fits and x.dim() >= 2 and x.shape[-1] == tokens else None


@dataclass(frozen=True)
class Largest:
    """The largest score of each row, that softmax does without."""

    scores: Scores


Meaning = Part | Scores | Largest


@dataclass(frozen=True)
class Node:
    """An operation, its arguments and keywords, and what its result means; None: nothing that is known here."""

    operation: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    meaning: Meaning | None

    def carry_out(self) -> Tensor:
        """The result on the exact originals, without autocast: within it nothing is deferred."""
        with _without_autocast():
            plain = [part.carry_out() if isinstance(part, Node) else _exact(part) for part in self.arguments]
            found: Tensor = self.operation(*plain, **self.keywords)
            return found


class _Storage:
    """What views of one another share.

    Attributes: version: how often one of them was written to; held: plain tensors that one of them stands for by now, with that
        one and how often they had been written to.
    """

    def __init__(self) -> None:
        self.version = 0
        self.held: list[tuple[Deferred, Tensor, int]] = []

    def changed_for(self, one: Deferred) -> bool:
        """Whether another view was written to since this one was made."""
        return one.version != self.version or any(x._version != seen for other, x, seen in self.held if other is not one)


class Deferred(Lazy):
    """The result of operations on handles that have not been carried out.

    Attributes: layer: whose handles; owner: its cache, which lives as long as this; node; shared: with its views; version: of
        what is shared, that it shows.
    """

    layer: CertifiedLayer
    owner: Any
    node: Node
    shared: _Storage
    version: int

    @classmethod
    def make(
        cls, meaning: Meaning | None, shape: tuple[int, ...], dtype: torch.dtype, step: Step, view: bool = False
    ) -> Deferred:
        """One for `step`, a function, its arguments (a lazy one among them) and keywords; a view of the first one, or not."""
        func, args, kwargs = step
        layer = next(part.layer for part in args if isinstance(part, Lazy))
        made: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=layer.device)
        made.layer, made.owner = layer, layer.cache
        made.node = Node(func, tuple(arg.node if isinstance(arg, Deferred) else arg for arg in args), kwargs, meaning)
        made.shared = args[0].shared if view and isinstance(args[0], Deferred) else _Storage()
        made.version = made.shared.version
        if isinstance(meaning, Scores) and meaning.weights:
            layer.lend(made)  # the model may return them
        return made

    def materialise(self) -> Tensor:
        """What the operations give on the exact originals.

        Raises: StaleHandleError: the layer was cropped, reordered or reset meanwhile; CorruptedPageError.
        """
        return self.node.carry_out()

    def settle(self) -> None:
        """Carry the operations out now: the layer is about to change."""
        self.hold(versioned(self.materialise))

    def hold(self, plain: Tensor) -> None:
        """Stand for a plain tensor from now on, as it will be."""
        self.node = Node(lambda: plain, (), {}, None)
        self.shared.held.append((self, plain, plain._version))

    def overwrite(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred:
        """Carry out an operation that writes into this. Raises: InputError: it would write into the cache."""
        name, meaning = getattr(func, "__name__", str(func)), self.node.meaning
        if isinstance(meaning, Part) and not meaning.copied:
            raise InputError(
                f"`{name}` would write into the cached {('keys', 'values')[meaning.handle.kind]} of layer "
                f"{self.layer.layer_idx}, which are written by `update` only. Change a copy: `x.materialise().clone()`."
            )
        known = _rules().in_place().get(func)
        found = _rules().follow(known, args, kwargs) if known is not None else None
        if isinstance(found, Deferred) and (found.shape, found.dtype) == (self.shape, self.dtype):
            self.node = found.node
            self.wrote()
        else:
            carried_out(func, args, kwargs)
        return self

    def wrote(self) -> None:
        """This was written to: views of it can no longer be followed."""
        self.shared.version += 1
        self.version = self.shared.version

    @classmethod
    def answer(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Writes, and a name; refuses what was changed through another view."""
        for part in tree_leaves((args, kwargs)):
            if isinstance(part, Deferred) and part.shared.changed_for(part):
                raise InputError(
                    "Attention scores were changed in place through a view of them, and are now used by another name, which "
                    "cannot be followed. Use what the operation returned, or attn_implementation='sdpa'."
                )
        if args and isinstance(args[0], Deferred) and writes(getattr(func, "__name__", "")):
            return args[0].overwrite(func, args, kwargs)
        if func in (Tensor.__repr__, Tensor.__str__, Tensor.__format__):
            return f"Deferred({type(args[0].node.meaning).__name__}, shape={tuple(args[0].shape)}, dtype={args[0].dtype})"
        return NotImplemented


def _without_autocast() -> Any:
    """No autocast, on the device types that have it on."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not on:
        return nullcontext()
    stack = ExitStack()
    for kind in on:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _exact(x: Any) -> Any:
    return x.materialise() if isinstance(x, Lazy) else x


def part_of(x: Any) -> Part | None:
    """The view of a handle that something is."""
    if isinstance(x, Handle):
        return None if x.pending else Part(x)
    return x.node.meaning if isinstance(x, Deferred) and isinstance(x.node.meaning, Part) else None


def scores_of(x: Any) -> Scores | None:
    return x.node.meaning if isinstance(x, Deferred) and isinstance(x.node.meaning, Scores) else None


@cache
def _rules() -> Any:
    from . import written_out  # which needs Deferred: imported when used

    return written_out
