"""torch's own OpenMP team: threads that are awake, and would else wait for the cores that others want.

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

Call = Callable[[Any, Any, int, int], None]  # function, data, threads, flags
function_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_forked = False


def _note_fork() -> None:
    """In a child: the team's threads do not exist here, and OpenMP would wait for them."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@lru_cache(maxsize=1)
def _found() -> Call | None:
    """`GOMP_parallel` of the OpenMP that torch is linked to; LLVM's has it too."""
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
        call: Call = found
        return call
    return None


def parallel() -> Call | None:
    """What calls a C function `void f(void *)` on so many threads, the calling one among them; None where there is no team.

    There may be fewer threads than were asked for, one at least. It returns when all have.
    """
    return None if _forked else _found()
