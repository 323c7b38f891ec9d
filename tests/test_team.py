"""A C function on several threads: every item once, whatever runs it; callers at once, forks."""

from __future__ import annotations

import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from test_cpu_kernel import served

from hf_certkv.kernels import compiling, cpu, memory, openmp, team
from hf_certkv.verify.cases import Case, run, tensors


@compiling.kernel()
def _mark(data: int) -> None:
    """Add 1 to each of the numbers behind the first two, their count and the number taken."""
    count = memory.int64s(data, 1)[0]
    while True:
        item = memory.add_shared(data + 8, 1)
        if item >= count:
            return
        memory.add_shared(data + 16 + 8 * item, 1)


def marked(count: int, threads: int) -> np.ndarray:
    """What `_mark` leaves of `count` zeros."""
    data = np.zeros(2 + count, np.int64)
    data[0] = count
    team.run(compiling.address(_mark), data.ctypes.data, threads)
    return data[2:]


@pytest.fixture(params=["torch's team", "plain threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain threads":
        monkeypatch.setattr(openmp, "parallel", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_once(way: str, threads: int) -> None:
    for count in (0, 1, 7, 1000):
        assert (marked(count, threads) == 1).all()


def test_torch_has_a_team_here() -> None:
    found = openmp.parallel()
    assert found is not None if "OpenMP" in torch.__config__.parallel_info() and os.name == "posix" else found is None


def test_callers_at_once(way: str) -> None:
    wrong = []

    def caller() -> None:
        wrong.extend(i for i in range(100) if not (marked(i, 3) == 1).all())

    callers = [threading.Thread(target=caller) for _ in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def _child() -> bool:
    return bool((marked(100, 4) == 1).all())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork() -> None:
    assert _child()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_child).get(60)
    assert _child()


@pytest.mark.parametrize("number", [0, 3, 9])
def test_the_same_bits_whoever_runs_it(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.add(served(number))
            with monkeypatch.context() as patch:
                patch.setattr(openmp, "parallel", lambda: None)
                found.add(served(number))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_the_blocks_of_one_head_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads and many threads: several items a head, and the same bits."""
    q, k, v = tensors("normal", torch.float32, 16 * 40 + 3, 64, 64, 1, 1, 3, 1, 4)
    case = Case(q, k, v, settings={"rtol": 0.5, "kernel": "cpu", "block_size": 16})
    spans = []
    do = cpu.FusedStep._do

    def noted(self: cpu.FusedStep, what: int, count: int = 1) -> None:
        spans.append(count)
        do(self, what, count)

    monkeypatch.setattr(cpu.FusedStep, "_do", noted)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            output, record, _ = run(case)
            found.append((output.numpy().tobytes(), np.asarray(record.bound).tobytes()))
    finally:
        torch.set_num_threads(before)
    assert max(spans) > 1 and found[0] == found[1]


def test_work_that_was_not_finished_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "run", lambda *given: None)
    with pytest.raises(MemoryError, match="0 of"):
        served(0)
