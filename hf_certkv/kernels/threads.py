"""Work on arrays divided among threads, for kernels that release the interpreter's lock (`nogil=True`).

numba's own threading layers abort after a fork, or when two Python threads use them at once. torch's OpenMP team, where there
is one, and else a pool of plain threads, do not.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import torch

from ..interrupts import uninterrupted
from . import openmp

Piece = Callable[[], object]
_lock = threading.Lock()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process id, workers, pool


def _new_lock() -> None:
    """In a forked child: the lock may have been held, by a thread that does not exist here; and nor do the workers."""
    global _lock, _pool
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _workers(count: int) -> ThreadPoolExecutor:
    """The pool of this process, with at least `count` threads; they are started when there is work."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid() or _pool[1] < count:
            # A smaller pool finishes what was given to it and goes when its last user lets go of it.
            _pool = (os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="certkv"))
        return _pool[2]


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
    busy with somebody else's work, and calls may be nested. When `share` returns or raises, no piece is still running: what
    they write may be used or thrown away. Ctrl-C waits until then.

    Args: pieces: work on arrays (numpy, numba). torch's settings of a thread, such as inference mode, are not carried over.
    Raises: the first exception of a piece; pieces that had not begun by then are left out.
    """
    waiting, failed = deque(pieces), list[BaseException]()

    def take() -> None:
        while not failed:
            try:
                piece = waiting.popleft()
            except IndexError:
                return
            try:
                piece()
            except BaseException as error:
                failed.append(error)

    count = min(len(waiting), torch.get_num_threads())
    with uninterrupted():
        if count > 1:
            _on_threads(take, count)
        else:
            take()
    if failed:
        raise failed[0]


def _on_threads(take: Callable[[], None], count: int) -> None:
    """Call what does not raise on so many threads, or fewer, the calling one among them."""
    parallel = openmp.parallel()
    if parallel is not None:
        function = openmp.function_type(lambda data: take())
        parallel(ctypes.cast(function, ctypes.c_void_p), None, count, 0)
        return
    pool = _workers(count - 1)
    futures = [pool.submit(take) for _ in range(count - 1)]
    take()
    wait([future for future in futures if not future.cancel()])
