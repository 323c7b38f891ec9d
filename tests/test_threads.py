"""Shares of work among threads: every unit once, exceptions arrive, nothing runs on; threads at once, forks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from hf_certkv.kernels import openmp, threads


@pytest.fixture(params=["torch's team", "a pool"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "a pool":
        monkeypatch.setattr(openmp, "parallel", lambda: None)
    return str(request.param)


@pytest.fixture(params=[1, 2, 5])
def count(request: pytest.FixtureRequest, way: str) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("units", [0, 1, 2, 3, 4, 5, 6, 17, 1000])
def test_every_unit_once(count: int, units: int) -> None:
    done = np.zeros(units, dtype=np.int64)
    called = []

    def work(start: int, stop: int) -> None:
        called.append((start, stop))
        done[start:stop] += 1

    threads.run(work, units)
    assert (done == 1).all()
    assert len(called) == min(units, count)
    assert sum(stop - start for start, stop in called) == units


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_exception_arrives_when_all_have_ended(count: int, place: int) -> None:
    running = []

    def work(start: int, stop: int) -> None:
        running.append(start)
        time.sleep(0.01)
        running.remove(start)
        if start <= place < stop:
            raise KeyError(place)

    for _ in range(5):
        with pytest.raises(KeyError):
            threads.run(work, 5)
        assert not running
    threads.run(lambda start, stop: None, 5)


def test_a_handler_that_raises_at_any_line_is_answered_or_all_is_done(count: int) -> None:
    """Another signal than Ctrl-C, whose handler raises: an exception, or every piece is done; never less in silence."""

    class Alarm(Exception):
        pass

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != threads.__file__:
            return None
        if event in ("call", "line"):
            seen[0] += 1
            if seen[0] == at:
                raise Alarm
        return watch

    at, seen, before = 0, [1], sys.gettrace()
    while seen[0] >= at:
        at, seen = at + 1, [0]
        done: list[int] = []
        pieces = [partial(done.append, i) for i in range(6)]
        sys.settrace(watch)
        try:
            threads.share(pieces)
        except Alarm:
            continue
        finally:
            sys.settrace(before)
        assert sorted(set(done)) == list(range(6)), at
    assert at > 10


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer threads, then; and nothing is running when `share` returns."""
    done: list[int] = []

    class Pool:
        def submit(self, take: Callable[[], None]) -> Future[None]:
            if done:
                raise RuntimeError("can't start new thread")
            done.append(-1)
            future: Future[None] = Future()
            return future

    monkeypatch.setattr(openmp, "parallel", lambda: None)
    monkeypatch.setattr(threads, "_workers", lambda count: Pool())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threads.share([partial(done.append, i) for i in range(9)])
    assert done == [-1, *range(9)]


def test_nested(count: int) -> None:
    done = np.zeros((6, 6), dtype=np.int64)

    def rows(start: int, stop: int) -> None:
        for row in range(start, stop):

            def cells(first: int, last: int, row: int = row) -> None:
                done[row, first:last] += 1

            threads.run(cells, 6)

    threads.run(rows, 6)
    assert (done == 1).all()


def test_callers_at_once(count: int) -> None:
    done = np.zeros((8, 200, 7), dtype=np.int64)

    def caller(place: int) -> None:
        for i in range(200):

            def work(start: int, stop: int, i: int = i) -> None:
                done[place, i, start:stop] += 1

            threads.run(work, 7)

    callers = [threading.Thread(target=caller, args=(place,)) for place in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert (done == 1).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(count: int) -> None:
    threads.run(lambda start, stop: time.sleep(0.001), count)
    child = os.fork()
    if child == 0:
        done = np.zeros(9, dtype=np.int64)

        def work(start: int, stop: int) -> None:
            done[start:stop] += 1

        threads.run(work, 9)
        os._exit(0 if (done == 1).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    threads.run(lambda start, stop: time.sleep(0.001), count)
