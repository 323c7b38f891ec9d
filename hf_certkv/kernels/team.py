"""One C function on several threads at once: torch's own OpenMP team where there is one, else plain threads.

A team of OpenMP keeps its threads spinning for a while after a parallel region, and torch's regions are everywhere in a model.
Threads of our own would wait for a core until those go to sleep: measured, two such threads were no faster than one beside
torch. The same team has them at hand.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..interrupts import uninterrupted
from . import threads

_function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def _note_fork() -> None:
    """In a child: the team's threads do not exist here, and OpenMP would wait for them."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@lru_cache(maxsize=1)
def _parallel() -> Callable[..., None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP that torch is linked to; LLVM's has it too."""
    if sys.platform == "win32":
        return None
    folder, suffix = Path(torch.__file__).parent / "lib", "dylib" if sys.platform == "darwin" else "so"
    for name in ("libtorch_cpu", "libtorch"):
        try:
            # Symbols of a library are looked for in those that it needs as well.
            library = ctypes.CDLL(str(folder / f"{name}.{suffix}"), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            found: Any = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return found
    return None


def run(address: int, data: int, threads_wanted: int) -> None:
    """Call the C function `void f(void *)` at `address` on so many threads, the calling one among them, and wait for all.

    How the work is divided is the function's matter: there may be fewer threads than were asked for, one at least. It must
    neither raise nor need the interpreter's lock. Ctrl-C waits until all have returned.
    """
    parallel = _parallel() if threads_wanted > 1 and not _forked else None
    if parallel is not None:
        parallel(address, data, threads_wanted, 0)
        return
    call = _function(address)
    with uninterrupted():
        if threads_wanted > 1:
            threads.run(lambda start, stop: call(data), threads_wanted)
        else:
            call(data)
