"""How kernels are compiled by numba: cached on disk where that is possible, with a word to the user when it takes time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_announced = False


def announce() -> None:
    """Say on stderr, once per process, that kernels are being compiled."""
    global _announced
    if not _announced:
        _announced = True
        print("hf_certkv: compiling CPU kernels (once; kept on disk where the cache can be written)", file=sys.stderr)


def is_kept(function: Any) -> bool:
    """Whether an earlier process left this version of a kernel on disk, or this one has compiled it."""
    if function.signatures:
        return True
    try:
        return bool(function._cache._cache_file._load_index())
    except Exception:  # these are numba's own matters, and may change
        return False


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter's lock, cached on disk. Args: options: further ones of `njit`."""
    import numba

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # there is no place to write to
            return numba.njit(nogil=True, **options)(function)

    return compiled
