"""The handles: what `update` returns while a layer is quantised.

A handle is a tensor of the right shape, dtype and device without storage. Handed to `scaled_dot_product_attention` it runs
certified attention; asked for its shape it answers; in any other operation it becomes the exact originals, so no code ever
sees quantised data. The three steps by which transformers repeats KV heads (`[:, :, None]`, `expand`, `reshape`) are
followed without materialising.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .compiled import outside_graphs
from .errors import CachePicklingError, InputError, StaleHandleError

if TYPE_CHECKING:
    from .layers import CertifiedLayer

KEYS, VALUES = 0, 1

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "itemsize", "nbytes")
_PLACES = ("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_quantized", "is_nested")
METADATA = {getattr(Tensor, name).__get__ for name in (*_PROPERTIES, *_PLACES)} | {
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.get_device,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.__len__,
}
UNCHANGED = {Tensor.contiguous, Tensor.detach, Tensor.detach_}


class Lazy(Tensor):
    """A tensor without storage that stands for something computed from a layer's originals."""

    layer: CertifiedLayer

    def materialise(self) -> Tensor:
        """What it stands for."""
        raise NotImplementedError

    def hold(self, plain: Tensor) -> None:
        """Stand for a plain tensor from now on."""
        raise NotImplementedError

    def wrote(self) -> None:
        """Note that it was written to."""
        raise NotImplementedError

    @classmethod
    def answer(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What this kind of tensor makes of an operation by itself; NotImplemented where that is nothing."""
        return NotImplemented

    @classmethod
    @outside_graphs
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            # No `with`: what Ctrl-C raises at its end would leave subclasses disabled for the rest of the process.
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs)
        answer = cls.answer(func, args, kwargs)
        if answer is not NotImplemented:
            return answer
        followed = _written_out().follow(func, args, kwargs)
        return carried_out(func, args, kwargs) if followed is None else followed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached only by code that switched `__torch_function__` off: it gets the originals too, never anything else.
        args, kwargs = all_plain(str(func), args, kwargs or {})
        return func(*args, **kwargs)


class Handle(Lazy):
    """Keys or values of a `CertifiedLayer`, without storage.

    Attributes: layer; kind (KEYS or VALUES); first, length: of the layer's tokens it stands for; epoch: the layer's when it was
        made; repeats: how often each KV head is repeated; pending: the shape is `[batch, kv_heads, repeats, tokens, channels]`,
        on its way there.
    """

    kind: int
    first: int
    length: int
    epoch: int
    repeats: int
    pending: bool

    @classmethod
    def make(cls, layer: CertifiedLayer, kind: int) -> Handle:
        """A handle for everything that `layer` shows now."""
        place = (layer.hidden, layer.sequence_length - layer.hidden)
        return cls._make(layer, kind, place, layer.epoch, 1, False)

    @classmethod
    def _make(cls, layer: CertifiedLayer, kind: int, place: tuple[int, int], epoch: int, repeats: int, pending: bool) -> Handle:
        first, length = place
        middle = (layer.heads, repeats) if pending else (layer.heads * repeats,)
        shape = (layer.batch, *middle, length, layer.widths[kind])
        handle: Handle = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        handle.layer, handle.kind, handle.first, handle.length, handle.epoch = layer, kind, first, length, epoch
        handle.repeats, handle.pending = repeats, pending
        return handle

    def _with(self, repeats: int, pending: bool) -> Handle:
        return self._make(self.layer, self.kind, (self.first, self.length), self.epoch, repeats, pending)

    @property
    def is_current(self) -> bool:
        """Whether it stands for exactly what its layer holds now."""
        layer = self.layer
        return self.epoch == layer.epoch and (self.first, self.first + self.length) == (layer.hidden, layer.sequence_length)

    def materialise(self) -> Tensor:
        """The exact originals that this handle stands for, in its shape.

        Raises: StaleHandleError: the layer was cropped, reordered or reset meanwhile; CorruptedPageError.
        """
        if self.epoch != self.layer.epoch:
            raise StaleHandleError(
                f"Layer {self.layer.layer_idx}: keys or values of {self.length} tokens are used after the cache was cropped, "
                "reordered, selected from or reset. Use those that the latest `update` returned."
            )
        with self.layer.cache.step_guard():
            plain = self.layer.materialise(self.kind, self.first + self.length)[:, :, self.first :]
        if self.repeats > 1 or self.pending:
            batch, heads, tokens, channels = plain.shape
            plain = plain[:, :, None, :, :].expand(batch, heads, self.repeats, tokens, channels)
            if not self.pending:
                plain = plain.reshape(batch, heads * self.repeats, tokens, channels)
        return plain

    def _lazily(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handle | None:
        """The handle that a known, harmless step makes of this one; None if the step is not one of them."""
        if func in UNCHANGED or (func is Tensor.to and _same_place(self, args[1:], kwargs)):
            return self
        if kwargs:
            return None
        if func is Tensor.__getitem__ and self.repeats == 1 and not self.pending:
            full = slice(None)
            return self._with(1, True) if args[1] == (full, full, None, full, full) else None
        if func not in (Tensor.expand, Tensor.reshape):
            return None
        shape = args[1:] if len(args) != 2 or isinstance(args[1], int) else tuple(args[1])
        if not all([isinstance(size, int) for size in shape]):
            return None
        layer, (tokens, channels) = self.layer, (self.length, self.layer.widths[self.kind])
        if func is Tensor.expand and self.pending and len(shape) == 5:
            target = tuple(own if size == -1 else size for own, size in zip(self.shape, shape, strict=True))
            if target == (layer.batch, layer.heads, target[2], tokens, channels) and self.repeats in (1, target[2]):
                return self._with(target[2], True)
        if func is Tensor.reshape and self.pending and shape == (layer.batch, layer.heads * self.repeats, tokens, channels):
            return self._with(self.repeats, False)
        return None

    @classmethod
    def answer(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention, a name, and the steps by which transformers repeats heads."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention().scaled_dot_product_attention(*args, **kwargs)
        if func in (Tensor.__repr__, Tensor.__str__, Tensor.__format__):
            handle = args[0]
            name = "values" if handle.kind else "keys"
            return f"Handle({name} of layer {handle.layer.layer_idx}, shape={tuple(handle.shape)}, dtype={handle.dtype})"
        if func in (Tensor.__reduce_ex__, Tensor.__deepcopy__):
            raise CachePicklingError("A handle has no data of its own; use `handle.materialise()` for a plain tensor.")
        if args and isinstance(args[0], Handle):
            lazy = args[0]._lazily(func, args, kwargs)
            if lazy is not None:
                return lazy
        return NotImplemented


def carried_out(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the exact originals. Raises: InputError: it would write into the cache."""
    name = getattr(func, "__name__", str(func))
    written = args[0] if args and (writes(name) or kwargs.get("inplace")) else kwargs.get("out")
    if isinstance(written, Handle):
        raise InputError(
            f"`{name}` would write into the cached {('keys', 'values')[written.kind]} of layer {written.layer.layer_idx}, "
            "which are written by `update` only. Change a copy: `handle.materialise().clone()`."
        )
    lazy = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Lazy) and not isinstance(part, Handle)]
    if not lazy:
        args, kwargs = all_plain(name, args, kwargs)
        return func(*args, **kwargs)
    # What is deferred is computed for this; it goes on as the plain tensor if that was written to, or if a view of it is out.
    plain = {id(part): versioned(partial(_plain, part, name)) for part in lazy}
    before = {key: value._version for key, value in plain.items()}
    args, kwargs = tree_map(lambda part: plain.get(id(part), part), (args, kwargs))
    args, kwargs = all_plain(name, args, kwargs)
    found = func(*args, **kwargs)
    shown = {part.untyped_storage().data_ptr() for part in tree_leaves(found) if type(part) is Tensor}
    for part in {id(part): part for part in lazy}.values():
        value = plain[id(part)]
        written = value._version != before[id(part)]
        if written or value.untyped_storage().data_ptr() in shown:
            part.hold(value)
        if written:
            part.wrote()
    return found


def versioned(compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives, as a tensor that counts writes: those made in inference mode do not."""
    if not torch.is_inference_mode_enabled():
        return compute()
    with torch.inference_mode(False), torch.no_grad():
        found = compute()
        return found.clone() if found.is_inference() else found


def all_plain(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an operation of this name, with the originals in place of what stands for them."""
    plain: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(lambda part: _plain(part, name), (args, kwargs))
    return plain


@cache
def _attention() -> Any:
    """The module, and not its function, which may be another one by the next call."""
    from . import attention  # which needs Handle: imported when used

    return attention


@cache
def _written_out() -> Any:
    from . import written_out  # which needs Handle: imported when used

    return written_out


def _plain(part: Any, operation: str) -> Any:
    if not isinstance(part, Lazy):
        return part
    part.layer.cache.note_materialised(part.layer.layer_idx, operation)
    return part.materialise()


def writes(name: str) -> bool:
    """Whether a function of this name changes its first argument in place."""
    if name.startswith("__"):
        return name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__")
    return name.endswith("_") and not name.endswith("__")


def _same_place(handle: Handle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `.to(...)` asks for the dtype and device that the handle has."""
    wanted = [*args, *kwargs.values()]
    return bool(wanted) and all([part == handle.layer.dtype or part == handle.layer.device for part in wanted])
