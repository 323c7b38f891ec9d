"""Work on arrays divided among threads, for kernels that release the interpreter's lock (`nogil=True`).

numba's own threading layers abort after a fork, or when two Python threads use them at once. torch's OpenMP team, where there
is one, and else a pool of plain threads, do not.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial

import torch

from ..interrupts import uninterrupted
from . import openmp

Piece = Callable[[], object]
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process id, workers, pool


def _workers(count: int) -> ThreadPoolExecutor:
    """The pool of this process, with at least `count` threads; they are started when there is work.

    A pool that is replaced, because it is smaller or another thread made one too, finishes what was given to it and goes when
    its last user lets go of it. One from before a fork has no workers here.
    """
    global _pool
    found = _pool
    if found is None or found[0] != os.getpid() or found[1] < count:
        _pool = found = (os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="certkv"))
    return found[2]


def shares(units: int, count: int) -> list[tuple[int, int]]:
    """`range(units)` cut into at most `count` contiguous shares `(start, stop)`, none of them empty, the largest first."""
    count = max(1, min(units, count))
    size, more = divmod(units, count)
    edges = [i * size + min(i, more) for i in range(count + 1)]
    return [(edges[i], edges[i + 1]) for i in range(count)]


def run(function: Callable[[int, int], object], units: int, least: int = 1) -> None:
    """Call `function(start, stop)` for contiguous shares that make up `range(units)`, one for each of torch's threads.

    Args: least: units for which another thread is worth its while.
    """
    if units > 0:
        share([partial(function, *part) for part in shares(units, min(torch.get_num_threads(), -(-units // least)))])


def share(pieces: Iterable[Piece]) -> None:
    """Call each of the pieces, on several threads at once, and wait for all.

    Every thread takes the next piece that nobody has taken, the calling one too. So a call never waits for a thread that is
    busy with somebody else's work, and calls may be nested. When `share` returns, all are done; when it returns or raises,
    none is still running: what they write may be used or thrown away. With several threads, Ctrl-C waits until then.

    Args: pieces: work on arrays (numpy, numba). torch's settings of a thread, such as inference mode, are not carried over.
    Raises: the first exception of a piece; pieces that had not begun by then are left out.
    """
    given = list(pieces)
    count = min(len(given), torch.get_num_threads())
    if count <= 1:
        for piece in given:
            piece()
        return
    places, done, failed = iter(range(len(given))), list[int](), list[BaseException]()

    def take(data: object = None) -> None:
        try:
            for place in places:
                if failed:
                    return
                given[place]()
                done.append(place)
        except BaseException as error:
            failed.append(error)

    with uninterrupted():
        _on_threads(take, count)
    if failed:
        raise failed[0]
    # The handler of some other signal may have raised outside of that `try`, where ctypes drops what is raised.
    for place in sorted(set(range(len(given))).difference(done)):
        given[place]()


def _on_threads(take: Callable[..., None], count: int) -> None:
    """Call what does not raise on so many threads, or fewer, the calling one among them."""
    parallel = openmp.parallel()
    if parallel is not None:
        parallel(ctypes.cast(openmp.function_type(take), ctypes.c_void_p), None, count, 0)
        return
    pool, futures = _workers(count - 1), []
    try:
        with suppress(RuntimeError):  # no more threads can be started: fewer, then
            for _ in range(count - 1):
                futures.append(pool.submit(take))
        take()
    finally:
        wait([future for future in futures if not future.cancel()])
