"""Attention that a model writes out: a product with the keys, a scale, a mask, a softmax, a product with the values.

transformers' "eager" implementation and many models' own code do this instead of calling `scaled_dot_product_attention`. Each
step on a handle is noted (deferred.py), and the last product is one `AttentionCall`, served like any other: certified where it
can be. A rule gives None for what is not such a step: it is then carried out on the exact originals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .deferred import Deferred, Largest, Node, Part, Scores, part_of, scores_of
from .handle import KEYS, UNCHANGED, VALUES, Lazy
from .layers import QUANTISABLE

LIFTED = 1e4  # the most that may be added to a score that is masked
FLOOR = -6e4  # what is added to, or put in place of, a score to mask it is at most this: float16's least is -65504


def follow(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a step towards attention gives, deferred or, at the last one, computed; None if it is no such step."""
    rule = _rules().get(func)
    if rule is None or not args or kwargs.get("out") is not None or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return None
    if any(isinstance(part, Deferred) for part in tree_leaves((args, kwargs))):
        # Plain tensors as they are now: who writes into one later does not change what was asked for.
        args, kwargs = tree_map(_copied, (args, kwargs))
    found: Tensor | None = rule(func, args, kwargs)
    return found


def _copied(x: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, Lazy):
        return x
    one = x
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        one = one.narrow(axis, 0, 1) if stride == 0 and size > 1 else one
    return one.clone().expand(x.shape)


def _same(x: Tensor, meaning: Part | Scores, dtype: torch.dtype, *step: Any) -> Deferred:
    """A step that keeps the shape."""
    return Deferred.make(meaning, tuple(x.shape), dtype, (step[0], step[1], step[2]))


def _transpose(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    part, axes = part_of(args[0]), args[1:]
    if part is None or kwargs:
        return None
    count = args[0].dim()
    if axes and sorted(axis % count for axis in axes) != [count - 2, count - 1]:
        return None
    shape = (*args[0].shape[:-2], args[0].shape[-1], args[0].shape[-2])
    return Deferred.make(replace(part, transposed=not part.transposed), shape, args[0].dtype, (func, args, kwargs), view=True)


def _shape(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`view` and `reshape` that join batch and heads, or part them again."""
    x = args[0]
    if len(args) == 2 and not isinstance(args[1], (int, tuple, list)):
        return None
    wanted = args[1:] if len(args) != 2 or isinstance(args[1], int) else tuple(args[1])
    if kwargs or not all(isinstance(size, int) for size in wanted) or wanted.count(-1) > 1:
        return None
    if 0 in wanted:
        return None
    wanted = tuple(-(x.numel() // torch.Size(wanted).numel()) if size == -1 else size for size in wanted)
    part, scores = part_of(x), scores_of(x)
    meaning: Part | Scores
    if part is not None and not part.transposed:
        handle = part.handle
        whole: tuple[int, ...] = tuple(handle.shape)
        meaning = part
    elif scores is not None and not scores.column:
        whole, meaning = scores.full, scores
    else:
        return None
    if wanted == tuple(x.shape):
        return x
    if wanted == (whole[0] * whole[1], *whole[2:]) and not meaning.flat:
        return Deferred.make(replace(meaning, flat=True), wanted, x.dtype, (func, args, kwargs), view=True)
    if wanted == whole and meaning.flat:
        return Deferred.make(replace(meaning, flat=False), wanted, x.dtype, (func, args, kwargs), view=True)
    return None


def _cast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`.to(dtype)`, `.float()` and the like."""
    x = args[0]
    meaning = part_of(x) or scores_of(x)
    if meaning is None:
        return None
    names = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}
    rest = [*args[1:], *kwargs.values()]
    if func in names:
        dtype = names[func]
    elif func is Tensor.type_as and len(rest) == 1 and isinstance(rest[0], Tensor):
        dtype, rest = rest[0].dtype, []
    elif len(rest) == 1 and isinstance(rest[0], torch.dtype):
        dtype = rest[0]
    else:
        return None
    # Scores and keys may become wider only: narrower, they would be other numbers, or none.
    wider = dtype in (torch.float32, torch.float64) and dtype.itemsize >= x.dtype.itemsize
    if dtype != x.dtype and not (dtype in QUANTISABLE if isinstance(meaning, Scores) and meaning.weights else wider):
        return None
    if isinstance(meaning, Part):
        meaning = replace(meaning, copied=True)
    return x if dtype == x.dtype else _same(x, meaning, dtype, func, args, kwargs)


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Query times keys, or weights times values."""
    if len(args) != 2 or kwargs:
        return None
    weights, value = scores_of(args[0]), part_of(args[1])
    if value is not None and not isinstance(args[0], Lazy) and args[0].dim() > 1:
        limit = value.handle.layer.config.certify_queries
        if args[0].shape[-2] > limit:  # exact, as it would be with SDPA
            if value.handle.kind == KEYS:
                value.handle.layer.cache.recorder.add_exact(args[0].shape[:-1].numel())
            exact: Tensor = func(args[0], args[1].materialise())
            return exact
    if weights is not None and value is not None:
        return _attention(weights, value, func, args)
    if part_of(args[0]) is None and weights is None and value is not None:
        return _first(args[0], args[1], value, 1.0, None, (func, args, kwargs))
    return None


def _first(query: Tensor, keys: Tensor, part: Part, alpha: float, bias: Tensor | None, step: Any) -> Tensor | None:
    """Scores of a query `[batch, heads, positions, channels]`, or flat, by transposed keys."""
    handle = part.handle
    if not isinstance(query, Tensor) or handle.kind != KEYS or not part.transposed or query.dim() != (3 if part.flat else 4):
        return None
    batch, heads, tokens, channels = handle.shape
    full = query.reshape(batch, heads, -1, channels) if part.flat and query.shape[0] == batch * heads else query
    if full.dim() != 4 or full.shape[:2] != (batch, heads) or full.shape[3] != channels or query.dtype != keys.dtype:
        return None
    scores = Scores(full, handle, part.flat, alpha)
    if bias is not None:
        by_head = scores.by_head(bias)
        if by_head is None:
            return None
        scores = replace(scores, bias=by_head)
    return Deferred.make(scores, (*query.shape[:-1], tokens), query.dtype, step)


def _baddbmm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`beta * input + alpha * query @ keys`."""
    names = ("input", "batch1", "batch2")
    given = dict(zip(names, args, strict=False)) | kwargs
    known = len(args) <= 3 and not set(given) - {*names, "beta", "alpha"}
    if not known or not all(isinstance(given.get(name), Tensor) for name in names):
        return None
    added, keys = given["input"], given["batch2"]
    part, beta, alpha = part_of(keys), _number(given.get("beta", 1.0)), _number(given.get("alpha", 1.0))
    if part is None or not part.flat or isinstance(added, Lazy) or beta is None or alpha is None or alpha <= 0:
        return None
    bias = None if beta == 0 else added if beta == 1 else added.float() * beta
    ordered = (added, given["batch1"], keys)
    return _first(given["batch1"], keys, part, alpha, bias, (func, ordered, {"beta": beta, "alpha": alpha}))


def _number(x: Any) -> float | None:
    """A finite number, also one in a tensor without axes."""
    if isinstance(x, Tensor) and not isinstance(x, Lazy) and x.dim() == 0 and not x.is_complex():
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float)) or x - x != 0:
        return None
    return float(x)


def _scale(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Times, or divided by, a positive number."""
    divides = func in (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide)
    if len(args) != 2 or kwargs:
        return None
    given, other = args if divides or scores_of(args[0]) is not None else args[::-1]
    scores, number = scores_of(given), _number(other)
    if scores is None or scores.weights or number is None or number <= 0 or scores.sinks is not None:
        return None
    factor = 1.0 / number if divides else number
    if factor < 1 and (scores.masks or scores.floored):
        return None  # what masks might come to weigh something
    scaled = scores.factor / number if divides else scores.factor * number
    bias = None if scores.bias is None else scores.bias.float() * factor
    return _same(given, replace(scores, factor=scaled, bias=bias), given.dtype, func, args, kwargs)


def _add(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Plus a mask or a position bias."""
    if len(args) != 2 or kwargs:
        return None
    given, other = args if scores_of(args[0]) is not None else args[::-1]
    scores = scores_of(given)
    if scores is None or scores.weights or not isinstance(other, Tensor) or isinstance(other, Lazy):
        return None
    bias = scores.by_head(other) if other.dtype in QUANTISABLE else None
    if bias is None or torch.broadcast_shapes(other.shape, given.shape) != given.shape:
        return None
    if scores.masks or scores.floored:  # what is added must not lift masked tokens up again
        alone = scores.key.layer.cache.ranks.alone  # else ranks might find different things
        if not alone or bool((bias > LIFTED).any()):
            return None
    total = bias if scores.bias is None else scores.bias.float() + bias.float()
    dtype = torch.promote_types(given.dtype, other.dtype)
    return _same(given, replace(scores, bias=total), dtype, func, args, kwargs)


def _tanh(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    scores = scores_of(args[0])
    if scores is None or len(args) != 1 or kwargs or scores.weights or scores.bias is not None or scores.inner is not None:
        return None
    if scores.sinks is not None or scores.shifted or scores.floored:
        return None
    return _same(args[0], replace(scores, inner=scores.factor, factor=1.0), args[0].dtype, func, args, kwargs)


def _fill(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`masked_fill` with a number that weighs nothing; of weights, with 0 where they are 0 already."""
    scores = scores_of(args[0])
    if scores is None or len(args) != 3 or kwargs:
        return None
    return _masked(scores, args[0], args[1], args[2], (func, args, kwargs))


def _where(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`where(mask, scores, number)`."""
    if len(args) != 3 or kwargs or isinstance(args[0], Lazy):
        return None
    scores = scores_of(args[1])
    if scores is None or args[0].dtype != torch.bool:
        return None
    return _masked(scores, args[1], ~args[0], args[2], (func, args, kwargs))


def _masked(scores: Scores, given: Tensor, mask: Tensor, value: Any, step: Any) -> Tensor | None:
    """Scores with a number in place of those where `mask` is True, as a bias: the same as long as each row keeps one."""
    if isinstance(value, Tensor) and (value.dim() or isinstance(value, Lazy) or value.dtype != given.dtype):
        return None
    number = float(value)
    hidden = scores.by_head(mask) if mask.dtype == torch.bool else None
    if hidden is None or not scores.key.layer.cache.ranks.alone:  # ranks might find different things
        return None
    if scores.weights:
        known = number == 0 and any(torch.equal(hidden, one) for one in scores.masks)
        return _same(given, scores, given.dtype, *step) if known else None
    if not number <= FLOOR or scores.shifted or bool(hidden.all(dim=-1).any()):
        return None
    before = torch.zeros((), device=hidden.device) if scores.bias is None else scores.bias.float()
    bias = torch.where(hidden, number, before)
    return _same(given, replace(scores, bias=bias, masks=(*scores.masks, hidden)), given.dtype, *step)


def _joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Scores with a column of sink logits behind them: `cat([scores, sinks], -1)`."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    parts = given.get("tensors")
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or given.get("dim") not in (-1, 3) or len(given) != 2:
        return None
    scores, sinks = scores_of(parts[0]), parts[1]
    if scores is None or scores.flat or scores.weights or scores.sinks is not None or isinstance(sinks, Lazy):
        return None
    if scores.shifted or not isinstance(sinks, Tensor):
        return None
    *rows, tokens = scores.full
    if tuple(sinks.shape) != (*rows, 1) or sinks.dtype not in QUANTISABLE:
        return None
    # One number a head, which `expand` repeats for rows of the batch and for positions.
    if (sinks.stride(0) and sinks.shape[0] > 1) or (sinks.stride(2) and sinks.shape[2] > 1):
        return None

    def join(*both: Tensor) -> Tensor:
        return torch.cat(both, dim=-1)

    meaning = replace(scores, sinks=sinks[0, :, 0, 0], column=True)
    dtype = torch.promote_types(parts[0].dtype, sinks.dtype)
    return Deferred.make(meaning, (*rows, tokens + 1), dtype, (join, tuple(parts), {}))


def _cut(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Weights without the column of the sinks: `weights[..., :-1]`."""
    scores = scores_of(args[0])
    if scores is None or not (scores.weights and scores.column) or args[1] != (Ellipsis, slice(None, -1)):
        return None
    return Deferred.make(replace(scores, column=False), scores.full, args[0].dtype, (func, args, kwargs), view=True)


def _largest(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The largest score of each row, and where it is: `max(dim=-1, keepdim=True)`."""
    scores = scores_of(args[0])
    given = dict(zip(("dim", "keepdim"), args[1:], strict=False)) | kwargs
    if (
        scores is None
        or scores.weights
        or given not in ({"dim": -1, "keepdim": True}, {"dim": args[0].dim() - 1, "keepdim": True})
    ):
        return None
    shape, names = (*args[0].shape[:-1], 1), (("values", args[0].dtype), ("indices", torch.int64))
    found = [
        Deferred.make(
            Largest(scores) if name == "values" else None,
            shape,
            dtype,
            (lambda x, name=name: getattr(torch.max(x, -1, keepdim=True), name), args[:1], {}),
        )
        for name, dtype in names
    ]
    return torch.return_types.max(tuple(found))  # type: ignore[arg-type]


def _minus(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Minus the largest of each row, which changes no weight."""
    if len(args) != 2 or kwargs or not isinstance(args[1], Deferred):
        return None
    scores, other = scores_of(args[0]), args[1].node.meaning
    if scores is None or not isinstance(other, Largest) or other.scores is not scores:
        return None
    return _same(args[0], replace(scores, shifted=True), args[0].dtype, func, args, kwargs)


def _at_least(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The larger of scores and a number that weighs nothing; or the largest of each row."""
    if "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int)):
        return _largest(func, args, kwargs)
    if len(args) != 2 or kwargs:
        return None
    scores, number = scores_of(args[0]), _number(args[1])
    if scores is None or scores.weights or number is None or number > FLOOR or scores.sinks is not None or scores.shifted:
        return None
    return _same(args[0], replace(scores, floored=True), args[0].dtype, func, args, kwargs)


def _softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    scores = scores_of(args[0])
    names = ("dim", "_stacklevel", "dtype") if func is F.softmax else ("dim", "dtype")
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    if scores is None or scores.weights or given.get("dim") not in (-1, args[0].dim() - 1):
        return None
    kind = given.get("dtype") or args[0].dtype
    if kind not in (*QUANTISABLE, torch.float64):
        return None
    return _same(args[0], replace(scores, weights=True), kind, func, args, kwargs)


def _dropout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = dict(zip(("p", "training", "inplace"), args[1:], strict=False)) | kwargs
    off = not given.get("training", given.get("train", True)) or given.get("p", 0.5) == 0
    return args[0] if off and scores_of(args[0]) is not None else None


def _attention(weights: Scores, part: Part, func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
    """The last product: attention itself."""
    value, key = part.handle, weights.key
    alike = value.layer is key.layer and value.kind == VALUES and value.repeats == key.repeats and value.epoch == key.epoch
    if (
        not alike
        or not weights.weights
        or weights.column
        or part.transposed
        or part.flat != weights.flat
        or args[0].dtype != args[1].dtype
    ):
        return None
    from . import attention  # which needs Handle: imported when used

    query = weights.query
    if query.dtype != key.dtype and key.layer.cache.ranks.alone:
        narrow = query.to(key.dtype)
        query = narrow if torch.equal(narrow.to(query.dtype), query) else query  # as it was before it was widened
    bias = weights.bias
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.float()
    scale, softcap = weights.factor, None
    if weights.inner is not None:
        scale, softcap = weights.inner * weights.factor, weights.factor
    nodes = [part.node if isinstance(part, Deferred) else part for part in args]

    def as_written() -> Tensor:
        found = Node(func, tuple(nodes), {}, None).carry_out()
        return found.reshape(*weights.full[:3], -1)

    call = attention.AttentionCall(
        query, key, value, bias, scale=scale, enable_gqa=key.repeats > 1, softcap=softcap, sinks=weights.sinks,
        as_written=as_written,
    )  # fmt: skip
    found = attention.attend(call).to(args[1].dtype)
    return found.flatten(0, 1) if weights.flat else found


@cache
def _rules() -> dict[Any, Callable[..., Tensor | None]]:
    t = Tensor
    return {
        **dict.fromkeys((torch.transpose, t.transpose, t.swapaxes, torch.swapaxes, t.mT.__get__), _transpose),  # type: ignore[attr-defined]
        **dict.fromkeys((t.view, t.reshape, torch.reshape), _shape),
        **dict.fromkeys((t.to, t.type, t.float, t.half, t.bfloat16, t.type_as), _cast),
        **dict.fromkeys((torch.matmul, t.matmul, t.__matmul__, torch.bmm, t.bmm), _product),
        **dict.fromkeys((torch.baddbmm, t.baddbmm), _baddbmm),
        **dict.fromkeys((torch.mul, t.mul, t.__mul__, t.__rmul__, torch.multiply, t.multiply), _scale),
        **dict.fromkeys((torch.div, t.div, t.__truediv__, torch.true_divide, t.true_divide), _scale),
        **dict.fromkeys((torch.add, t.add, t.__add__, t.__radd__), _add),
        **dict.fromkeys((torch.tanh, t.tanh, F.tanh), _tanh),
        **dict.fromkeys((torch.masked_fill, t.masked_fill), _fill),
        torch.where: _where,
        **dict.fromkeys((torch.cat, torch.concat), _joined),
        t.__getitem__: _cut,
        **dict.fromkeys((torch.sub, t.sub, t.__sub__), _minus),
        **dict.fromkeys((torch.max, torch.maximum, t.max, t.maximum), _at_least),
        **dict.fromkeys((F.softmax, torch.softmax, t.softmax), _softmax),
        **dict.fromkeys((F.dropout, torch.dropout), _dropout),
        **dict.fromkeys(UNCHANGED, lambda func, args, kwargs: args[0] if isinstance(args[0], Deferred) else None),
    }


@cache
def in_place() -> dict[Any, Callable[..., Tensor]]:
    """Operations that write into their first argument, and those that give the same in a new one."""
    t = Tensor
    return {
        **dict.fromkeys((t.add_, t.__iadd__), torch.add),
        **dict.fromkeys((t.mul_, t.__imul__), torch.mul),
        **dict.fromkeys((t.div_, t.__itruediv__), torch.div),
        t.masked_fill_: torch.masked_fill,
        t.tanh_: torch.tanh,
    }
