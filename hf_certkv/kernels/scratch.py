"""What kernels work in: arrays that are kept from one call to the next."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

_scratch = threading.local()


class Scratch:
    """Arrays that calls of a thread use one after the other: they grow, and are not cleared."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[np.ndarray, int]] = {}

    def __call__(self, name: str, count: int, dtype: Any) -> tuple[np.ndarray, int]:
        """`count` numbers that an earlier call may have used too, and where they begin."""
        found = self._held.get(name)
        if found is None or len(found[0]) < count:
            array = np.empty(count + count // 64, dtype)
            found = self._held[name] = (array, array.ctypes.data)
        return found[0][:count], found[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array, _ in self._held.values())


def scratch_for(user: object) -> Scratch:
    """This thread's arrays; new ones while an earlier user still lives, whose numbers they are."""
    last = getattr(_scratch, "user", None)
    if last is not None and last() is not None:
        return Scratch()
    _scratch.user = weakref.ref(user)
    if not hasattr(_scratch, "arrays"):
        _scratch.arrays = Scratch()
    arrays: Scratch = _scratch.arrays
    return arrays


def scratch_bytes() -> int:
    """Bytes that this thread's calls hold between steps, for all layers and caches together."""
    return _scratch.arrays.nbytes if hasattr(_scratch, "arrays") else 0
