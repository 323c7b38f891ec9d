"""Faults: flipped bits, refused memory, Ctrl-C, NaN and threads, through the laboratory's own parts and one by one."""

from __future__ import annotations

import gc
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from conftest import BareCache, new_cache, prompt, random_states, shared_model
from torch import Tensor
from transformers import LlamaConfig

from hf_certkv import CacheStateError, CertifiedQuantizedCache, precision, steps
from hf_certkv.interrupts import uninterrupted
from hf_certkv.store import BlockStore, HotSlots
from hf_certkv.verify import bit_flips, faults_steps, faults_threads, faults_values
from hf_certkv.verify.faults_inject import Fault, interrupted, tensors_fail, tensors_keep_failing
from hf_certkv.verify.faults_operations import Operation, operations
from hf_certkv.verify.faults_state import another_thread_is_served, process_settings, quiet
from hf_certkv.verify.parts import Clock, Part

CPU = torch.device("cpu")
CONFIG = LlamaConfig(num_hidden_layers=2)
NOW = Clock(0.0)
SOME = (
    "a decode step that finishes a block",
    "a decode step that promotes",
    "a decode step with hot blocks",
    "a prefill",
    "a chunk of many queries",
    "crop of everything quantised",
    "repeat",
)


@cache
def every_operation() -> dict[str, Operation]:
    return {operation.name: operation for operation in operations(CPU, 0)}


def assert_passed(part: Part) -> None:
    assert part.passed, part.failures


def test_flipped_bits() -> None:
    part = bit_flips.run(Clock(1.0), CPU, 0)
    assert_passed(part)
    routes = part.figures["by_route"]
    assert part.checked > 5000 and part.checked == sum(routes.values())
    assert min(routes[name] for name in ("audited step", "promotion in a step", "cache.scrub(), blocks")) >= 5
    assert part.figures["exact_tokens"]["noticed"] == 0 and part.figures["unused_room"]["flipped"] > 0


def test_a_checksum_that_leaves_something_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = BlockStore.damaged

    def without_numbers(store: BlockStore, index: Any) -> Tensor:
        wrong = damaged(store, index)
        whole = [store.keys["numbers"].view, store.values["numbers"].view]
        return wrong & ~torch.stack([(part[index] > 1e3).any(dim=-1) for part in whole]).any(dim=0)

    monkeypatch.setattr(BlockStore, "damaged", without_numbers)
    part, routes = Part("", "", ""), Counter[str]()
    with quiet():
        bit_flips._every_bit(part, routes, Clock(2.0), bit_flips.FORMATS[0], CPU, 0)
    assert part.failed and "numbers" in part.failures[0]


@pytest.mark.parametrize("run", [faults_steps.run_allocations, faults_steps.run_interrupts])
def test_failures_at_some_points(run: Any) -> None:
    part = run(NOW, CPU, 0, (997,), [every_operation()[name] for name in SOME])
    assert_passed(part)
    assert part.checked >= 10


@pytest.mark.parametrize("name", ["crop within the tail", "crop of blocks", "reorder", "scrub"])
def test_interrupts_between_steps_at_many_points(name: str) -> None:
    assert_passed(faults_steps.run_interrupts(NOW, CPU, 0, (61,), [every_operation()[name]]))


def test_a_crop_that_is_undone_by_half_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def attributes_only(layer: Any) -> Any:
        before = dict(layer.__dict__)
        return lambda: layer.__dict__.update(before)

    operation = every_operation()["crop of blocks"]
    monkeypatch.setattr(steps, "_everything", attributes_only)
    part = faults_steps.run_interrupts(NOW, CPU, 0, (7,), [operation])
    assert part.failed and "neither before nor after" in part.failures[0]


def test_an_interrupt_behind_a_step_does_not_undo_the_next_one() -> None:
    """The guard of an interrupted call may be forgotten late, when a traceback is: by then it must not undo anything."""
    cache = CertifiedQuantizedCache(CONFIG)
    cache.update(*random_states(300), 0)
    guard = cache.step_guard()
    guard.__enter__()
    cache.update(*random_states(300), 1)
    del guard  # as if `__exit__` had been interrupted
    assert [layer.sequence_length for layer in cache.certified_layers] == [300, 300]


def test_the_settings_are_put_back_although_leaving_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        before, left = process_settings(), []

        def once(guard: Any, leave: Any = precision._Guard.leave) -> None:
            left.append(guard)
            if len(left) == 1:
                raise KeyboardInterrupt
            leave(guard)

        monkeypatch.setattr(precision._Guard, "leave", once)
        with pytest.raises(KeyboardInterrupt), precision.full_precision("cpu"):
            assert process_settings() != before
        assert process_settings() == before and len(left) == 2
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at_every_point(act: Callable[[], object]) -> Iterator[int]:
    """Number of points passed, after each Ctrl-C. It must be raised, wherever it comes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for at in count(1):
        fault = Fault(at)
        try:
            with interrupted(fault):
                act()
            assert fault.error is None, f"swallowed at {fault.error}"
            return
        except KeyboardInterrupt:
            pass
        yield at


@pytest.mark.usefixtures("handler")
@pytest.mark.parametrize("ambient", ["highest", "medium"])
def test_an_interrupted_guard_leaves_no_lock_taken(ambient: str) -> None:
    def act() -> None:
        with precision.full_precision("cpu"):
            assert precision.float32_is_full() == (ambient == "highest")

    cache = CertifiedQuantizedCache(CONFIG)
    torch.set_float32_matmul_precision(ambient)
    try:
        before, points = process_settings(), []
        for point in interrupted_at_every_point(act):
            gc.collect(0)
            assert another_thread_is_served(cache) and process_settings() == before
            points.append(point)
        assert len(points) > 20
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("handler")
def test_an_interrupted_look_at_a_handle_leaves_it_a_handle() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    cache.update(*random_states(300), 0)
    handle, _ = cache.update(*random_states(1), 0)
    expected, points = cache.certified_layers[0].materialise(0).sum(), []
    for point in interrupted_at_every_point(lambda: (handle.shape, handle.dtype, handle.stride(), len(handle))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(handle.sum(), expected)
        points.append(point)
    assert len(points) > 8


@pytest.mark.usefixtures("handler")
def test_ctrl_c_while_originals_are_signed_is_raised() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    cache.update(*random_states(300), 0)
    shadow = cache.certified_layers[0].shadow
    assert shadow is not None and shadow.blocks > 0
    assert len(list(interrupted_at_every_point(lambda: shadow._sign(0, shadow.blocks)))) > 8


@pytest.mark.usefixtures("handler")
def test_ctrl_c_is_kept_back_and_then_answered_as_the_process_does() -> None:
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        assert received == []
    assert received == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        done.append(signal.raise_signal(signal.SIGINT) is None)
    assert done == [True]


def test_a_step_that_never_ended_is_not_counted() -> None:
    model = shared_model("llama")
    cache = new_cache(model, rtol=0.3)
    with torch.no_grad():
        model(prompt(330), past_key_values=cache)
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1), past_key_values=cache)
        hook.remove()
        with pytest.raises(CacheStateError, match="rollback"):
            model(prompt(1), past_key_values=cache)
        assert cache.rollback() == 330
        model(prompt(1), past_key_values=cache)
    assert cache.report().to_dict()["overall"]["head_steps"] == 8


def test_another_batch_may_come_after_a_prefill_that_was_rolled_back() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    cache.update(*random_states(300, batch=3), 0)
    assert cache.rollback() == 0
    for layer in range(2):
        cache.update(*random_states(300, batch=1), layer)
    assert cache.rollback() == 300


def test_a_step_does_not_go_on_where_it_was_undone() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    for layer in range(2):
        cache.update(*random_states(300), layer)
    cache.update(*random_states(1), 0)
    assert cache.rollback() == 300
    with pytest.raises(CacheStateError, match="first layer"):
        cache.update(*random_states(1), 1)
    assert cache.rollback() == 300


def hot_slots() -> tuple[HotSlots, tuple[Tensor, Tensor, Tensor], Tensor]:
    index = (torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([3, 4]))
    return HotSlots(1), index, torch.randn(2, 16, 8)


def test_a_hot_slot_never_names_a_block_that_it_does_not_hold() -> None:
    for at in range(1, 200):
        slots, index, pages = hot_slots()
        fault = Fault(at)
        try:
            with tensors_fail(fault):
                slots.insert(index, pages, pages, 1, 2, 0)
        except torch.OutOfMemoryError:
            found = slots.lookup(10**6)
            held = {} if found is None else {int(block): page for block, page in zip(found[0][2], found[1], strict=True)}
            assert all(torch.equal(page, pages[block - 3]) for block, page in held.items())
            slots.insert(index, pages, pages, 1, 2, 1)
        found = slots.lookup(10**6)
        assert found is not None and torch.equal(found[1], pages) and torch.equal(found[2], pages)
        if fault.error is None:
            break
    assert fault.error is None and at > 10


def test_hot_slots_are_given_up_where_there_is_no_memory_to_look_through_them() -> None:
    slots, index, pages = hot_slots()
    slots.insert(index, pages, pages, 1, 2, 0)
    fault = Fault(1)
    with tensors_keep_failing(fault):
        slots.truncate(4)
    assert fault.error is not None and slots.lookup(10**6) is None and slots.nbytes == 0
    slots.insert(index, pages, pages, 1, 2, 0)
    assert slots.lookup(10**6) is not None


def test_an_interrupted_layer_is_served_again_by_any_thread() -> None:
    bare = BareCache()
    bare.update(*random_states(300))
    with pytest.raises(KeyboardInterrupt), interrupted(Fault(60)):
        bare.update(*random_states(1))
    assert bare.cache.get_seq_length() == 300
    bare.update(*random_states(1))
    assert bare.cache.get_seq_length() == 301


def test_not_numbers() -> None:
    part = faults_values.run(NOW, CPU, 0)
    assert_passed(part)
    outcomes = part.figures["outcomes"]
    assert outcomes["untouched, certified"] > 300 and outcomes["touched, dense, not finite"] > 100


def test_threads() -> None:
    part = faults_threads.run(NOW, CPU, 0)
    assert_passed(part)
    assert part.figures["orders_of_two_steps"]["typed error"] > 0
