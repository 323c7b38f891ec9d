"""One C function on several threads at once: torch's own OpenMP team where there is one, else plain threads."""

from __future__ import annotations

from ..interrupts import uninterrupted
from . import openmp, threads


def run(address: int, data: int, threads_wanted: int) -> None:
    """Call the C function `void f(void *)` at `address` on so many threads, the calling one among them, and wait for all.

    How the work is divided is the function's matter: there may be fewer threads than were asked for, one at least. It must
    neither raise nor need the interpreter's lock. Ctrl-C waits until all have returned.
    """
    parallel = openmp.parallel() if threads_wanted > 1 else None
    if parallel is not None:
        parallel(address, data, threads_wanted, 0)
        return
    call = openmp.function_type(address)
    with uninterrupted():
        if threads_wanted > 1:
            threads.run(lambda start, stop: call(data), threads_wanted)
        else:
            call(data)
