"""Float32 products as float32, whatever the process has set: no autocast, no TF32 or bfloat16 short cuts.

torch has two ways to ask for such short cuts, an old one (`set_float32_matmul_precision`) and a newer one (`fp32_precision` of
each backend); mixing them makes the old getter raise. Here the newer one is used where there is one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .interrupts import uninterrupted

FULL = ("none", "ieee")
_lock = threading.RLock()  # a guard that Ctrl-C left open may be collected, and left, while its own thread holds the lock
_inside: list[_Guard] = []  # guards open, in all threads: the settings belong to the process
_here = threading.local()
_put_back: Callable[[], None] | None = None  # by the last one out; None where the settings were full to begin with


@functools.cache
def _backends() -> list[Any]:
    """The backends whose float32 matrix products can be cut short; empty where torch has only the old way."""
    found = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def float32_is_full() -> bool:
    """Whether a float32 matrix product outside `full_precision` is a float32 matrix product."""
    with uninterrupted(), _lock:
        return _put_back is None and _settings_are_full()


def _settings_are_full() -> bool:
    backends = _backends()
    for backend in backends:  # no generator: what Ctrl-C raises while one is given up half-way gets lost
        if backend.fp32_precision not in FULL:
            return False
    return bool(backends) or torch.get_float32_matmul_precision() == "highest"


def ambient_is_full(device_type: str, dtype: torch.dtype) -> bool:
    """Whether attention over tensors of `dtype`, called here and now, is computed from them as they are."""
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != dtype:
        return False
    if dtype == torch.float16 and device_type == "cuda" and sums_in_half():
        return False
    return dtype != torch.float32 or float32_is_full()


def sums_in_half() -> bool:
    """Whether the process lets float16 products be added up in float16 on CUDA: nothing can be proven of such sums."""
    try:
        return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)
    except AttributeError:  # torch before 2.7 cannot
        return False


class _Guard:
    """One use of `full_precision`. Leaving again does nothing, and Ctrl-C at any line leaves something that can be left.

    Where there is nothing to set, entering and leaving are single operations on lists; else they are not interrupted. No lock
    is taken but where Ctrl-C is kept back: what it raises at the end of a `with` would leave the lock taken for ever.

    Whoever enters is in `_inside` before it looks at `_put_back`. That is there before settings are changed, until they are put
    back. So who sees full settings and nothing to put back was seen by any guard that will put back later: it will not.
    """

    __slots__ = ("autocast", "device_type", "opened")

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.autocast: torch.autocast | None = None
        self.opened = _opened()

    def enter(self) -> None:
        global _put_back
        _inside.append(self)  # from here on nobody begins to put settings back
        self.opened.append(self)
        if _put_back is None and _settings_are_full() and not torch.is_autocast_enabled(self.device_type):
            return
        with uninterrupted(), _lock:
            autocast = torch.autocast(self.device_type, enabled=False)
            autocast.__enter__()
            self.autocast = autocast
            if _put_back is None and not _settings_are_full():
                _put_back = _way_back()
                _set_full()

    def leave(self) -> None:
        global _put_back
        if self in self.opened:
            self.opened.remove(self)
        if self in _inside:
            _inside.remove(self)
        if self.autocast is not None:
            with uninterrupted():
                autocast, self.autocast = self.autocast, None
                autocast.__exit__(None, None, None)
        if _put_back is not None and not _inside:
            with uninterrupted(), _lock:
                if _put_back is not None and not _inside:  # nobody came meanwhile
                    _put_back()
                    _put_back = None


def _opened() -> list[_Guard]:
    """The guards that this thread has open, the innermost last."""
    opened: list[_Guard] | None = getattr(_here, "opened", None)
    if opened is None:
        opened = _here.opened = []
    return opened


def guards_open() -> int:
    """How many guards this thread has open."""
    return len(_opened())


def leave_all_but(count: int) -> None:
    """Leave the guards that this thread has opened beyond `count`: Ctrl-C may have kept them from being left."""
    while len(_opened()) > count:
        _opened()[-1].leave()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Everything inside is computed in the precision of its tensors; the settings are put back behind it.

    Several threads may be inside, each with its own cache: the first sets, the last puts back.
    """
    guard = _Guard(device_type)
    try:
        try:
            guard.enter()
            yield
        finally:
            guard.leave()
    finally:
        guard.leave()  # again: Ctrl-C may have kept the first from beginning


def _set_full() -> None:
    """Ask for full float32 products."""
    for backend in _backends():
        backend.fp32_precision = "ieee"
    if not _backends():
        torch.set_float32_matmul_precision("highest")


def _way_back() -> Callable[[], None]:
    """What puts the settings back as they are now."""
    backends = _backends()
    if not backends:
        precision = torch.get_float32_matmul_precision()
        return lambda: torch.set_float32_matmul_precision(precision)
    # A backend that follows the setting above it is made to follow it again.
    above = getattr(torch.backends, "fp32_precision", "none")
    kept = [(backend, backend.fp32_precision) for backend in backends]

    def put_back() -> None:
        for backend, precision in kept:
            backend.fp32_precision = "none" if precision == above else precision

    return put_back
