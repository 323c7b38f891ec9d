"""Work on arrays divided among threads, for kernels that release the interpreter's lock (`nogil=True`).

numba's own threading layers abort after a fork, or when two Python threads use them at once. A pool of plain threads does not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from ..interrupts import uninterrupted

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


def run(function: Callable[[int, int], object], units: int) -> None:
    """Call `function(start, stop)` for contiguous shares that make up `range(units)`, at the same time, and wait for all.

    There are as many shares as torch has threads, or fewer. The calling thread takes the first, and then each that no worker
    has begun. So a call never waits for a worker that is busy with somebody else's work, and calls may be nested. When `run`
    returns or raises, no share is still running: what they write may be used or thrown away. Ctrl-C waits until then.

    Args: function: works on arrays (numpy, numba). torch's settings of a thread, such as inference mode, are not carried over.
    Raises: the first exception of a share; shares that had not begun by then are left out.
    """
    if units <= 0:
        return
    first, *others = shares(units, torch.get_num_threads())
    if not others:
        function(*first)
        return
    futures: list[tuple[Future[object], tuple[int, int]]] = []
    with uninterrupted():
        try:
            pool = _workers(len(others))
            for share in others:
                futures.append((pool.submit(function, *share), share))
            function(*first)
            for future, share in reversed(futures):
                if future.cancel():
                    function(*share)
        finally:
            begun = [future for future, _ in futures if not future.cancel()]
            wait(begun)
    for future in begun:
        future.result()
