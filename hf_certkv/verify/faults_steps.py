"""Failures at every point: the k-th tensor operation, the k-th host allocation, Ctrl-C at the k-th line.

After each failure the error must be the injected one or a typed one, the cache as before the operation or as after it, the
process's settings as they were, and the same operation, repeated, must give what it gives undisturbed, bit for bit.

Where the failure falls into the model's own code, between two layers, the cache cannot see it. Then the next step must say so
(`CacheStateError`), `rollback()` must bring back the state before, and the repeated step is compared in the same way.
"""

from __future__ import annotations

import gc
import signal
import threading
from collections import Counter
from typing import Any

import torch

from ..errors import CacheStateError, CertKVError
from . import kernel
from .faults_inject import Fault, Inject, host_fails, interrupted, tensors_fail, tensors_keep_failing
from .faults_operations import Operation, few_operations, operations, same
from .faults_state import another_thread_is_served, counts_of, differences, process_settings, quiet, state_of
from .parts import Clock, Part

IN_FULL = 8  # of so many trials that leave the cache as before, one is followed up by the same operation and a later step
STRIDES = (997, 389, 151, 61, 23, 7, 3, 1)  # ever finer, so that any budget is spread over all points


def allowed(error: BaseException, fault: Fault) -> bool:
    """Whether a caller may be given this: what was injected, or a typed error that says why."""
    if isinstance(fault.error, KeyboardInterrupt):
        return isinstance(error, KeyboardInterrupt)
    chain: BaseException | None = error
    while chain is not None and chain is not fault.error:
        chain = chain.__cause__
    return error is fault.error or (isinstance(error, CertKVError) and chain is fault.error)


def attempt(operation: Operation, inject: Inject, at: int, cache: Any = None) -> tuple[str, str | None, int]:
    """One trial: how it ended, what is wrong about that (or None), and how many points were passed.

    Args: cache: one that is as before the operation. Where it is so afterwards, nothing more is asked of it; else, and without
        one, the operation is repeated and a step follows.
    """
    brief, fault = cache is not None, Fault(at)
    cache = operation.fresh() if cache is None else cache
    settings = process_settings()
    where = f"{operation.name}, point {at}"
    output, ended = None, "passed"
    try:
        with inject(fault):
            output = operation.act(cache)
    except BaseException as error:
        if fault.error is None or not allowed(error, fault):
            return "failed", f"{where}: {type(error).__name__}: {error}", fault.seen
        ended = type(error).__name__
    else:
        if isinstance(fault.error, KeyboardInterrupt):  # a refused allocation may have been done without
            return "swallowed", f"{where} ({fault.error}): nothing was raised", fault.seen
    where += f" ({fault.error})" if fault.error is not None else ""
    gc.collect(0)  # a traceback may have kept a guard open
    if process_settings() != settings:
        return ended, f"{where}: settings are {process_settings()}, were {settings}", fault.seen
    if not another_thread_is_served(cache):
        return ended, f"{where}: the cache is still taken", fault.seen
    if brief and ended != "passed" and not differences(state_of(cache), operation.before):
        return f"{ended}, before", None, fault.seen
    try:
        state, wrong = _after(operation, cache, output)
    except Exception as error:
        return ended, f"{where}: afterwards {type(error).__name__}: {error}", fault.seen
    return f"{ended}, {state}", wrong and f"{where}: {wrong}", fault.seen


def _after(operation: Operation, cache: Any, output: list[torch.Tensor] | None) -> tuple[str, str | None]:
    """Where the cache stands after a trial, and what is wrong about it; it is taken to the state after and one step on."""
    with quiet():
        found = operation.healthy_state(cache)
    state = "before" if not differences(found, operation.before) else "after"
    if output is not None:
        if not same(output, operation.output):
            return "returned", "another output than undisturbed"
        if differences(found, operation.after):
            return "returned", f"another state than undisturbed: {differences(found, operation.after)[:4]}"
        state = "returned"
    elif operation.is_step and len(cache._lengths()) > 1:
        state = "between layers, rolled back"
        with quiet():
            try:
                operation.later(cache)
                return state, "the next step did not notice"
            except CacheStateError:
                cache.rollback()
        found = operation.healthy_state(cache)
    repeat = state != "returned" and bool(differences(found, operation.after) or not differences(found, operation.before))
    if repeat and (wrong := differences(found, operation.before)):
        wrong = min(wrong, differences(found, operation.after), key=len)
        return state, f"neither before nor after: {wrong[:4]}"
    exact = not cache.settings.hot_blocks  # hot blocks of a failed step are forgotten: other bits, as good ones
    with quiet():
        if repeat:
            again = operation.act(cache)
            if exact and not same(again, operation.output):
                return state, "the repeated operation gives another output"
            if wrong := differences(state_of(cache), operation.after):
                return state, f"the repeated operation gives another state: {wrong[:4]}"
        counts = counts_of(cache)
        differ = counts != operation.counts if exact else _total(counts) != _total(operation.counts)
        if (repeat or output is not None) and differ:
            return state, f"counts {counts}, undisturbed {operation.counts}"
        if _total(counts) > _total(operation.counts):
            return state, f"counted {counts}, more than {operation.counts}"
        if exact and not same(operation.later(cache), operation.follow):
            return state, "a later step gives another output"
    return state, None


def _total(counts: dict[str, Any]) -> int:
    return counts["exact"] + sum(sum(part) for part in counts.values() if isinstance(part, list))


def done_some(done: dict[str, set[int]]) -> bool:
    """Whether the coarsest stride may be broken off: where a step takes seconds, after one point."""
    return kernel.slow() and any(map(bool, done.values()))


def every_point(part: Part, clock: Clock, every: list[Operation], inject: Inject, strides: tuple[int, ...], label: str) -> None:
    """Fail every operation at every point, as far as the clock goes: coarse strides first, so that all get their share."""
    points = {}
    for operation in every:
        with quiet():
            _, wrong, points[operation.name] = attempt(operation, inject, 0)
        if wrong:
            part.fail(f"{label}: undisturbed: {wrong}")
    ends: Counter[str] = Counter()
    done: dict[str, set[int]] = {name: set() for name in points}
    for number, stride in enumerate(strides):
        if (number or done_some(done)) and clock.over():
            break
        for operation in every:
            kept, ended = None, "before"
            for at in range(1 + number % stride, points[operation.name] + 1, stride):
                if at in done[operation.name]:
                    continue
                if (number or done_some(done)) and clock.over():
                    break
                alike = not operation.heals and not operation.base.settings.hot_blocks  # whatever failed before
                if len(done[operation.name]) % IN_FULL == 0 or not ended.endswith("before") or not alike:
                    kept = None
                elif kept is None:
                    kept = operation.fresh()
                with quiet():
                    ended, wrong, _ = attempt(operation, inject, at, kept)
                done[operation.name].add(at)
                ends[ended] += 1
                part.checked += 1
                if wrong:
                    part.fail(f"{label}: {wrong}")
            clock.tell(f"{label}: {operation.name}")
    part.figures[label] = {
        "points": sum(points.values()),
        "tried": sum(map(len, done.values())),
        "ends": dict(sorted(ends.items())),
        "by_operation": {name: f"{len(done[name])} of {count}" for name, count in points.items()},
    }


def chosen_operations(clock: Clock, device: torch.device, seed: int) -> list[Operation]:
    """All of them; where a step takes seconds, as many small ones as there are minutes."""
    return few_operations(device, seed, 1 + int(clock.seconds / 60)) if kernel.slow() else operations(device, seed)


def run_allocations(
    clock: Clock,
    device: torch.device,
    seed: int,
    strides: tuple[int, ...] = STRIDES,
    every: list[Operation] | None = None,
) -> Part:
    """Every operation on tensors, and every host allocation, fails once; then from every one on all fail."""
    part = Part(
        "allocation_failures",
        "whatever cannot be allocated: a typed error or torch's own, the cache as before, and repeating gives the same bits",
        "failures",
    )
    every = chosen_operations(clock, device, seed) if every is None else every
    for kind in (RuntimeError, MemoryError) if not kernel.slow() else ():  # these have none
        every_point(part, clock, every, host_fails(kind), (1,), f"host allocation ({kind.__name__})")
    every_point(part, Clock((clock.seconds - clock.spent) / 2), every, tensors_fail, strides, "tensor operation")
    every_point(part, clock, every, tensors_keep_failing, strides, "all tensor operations from one on")
    part.seconds = clock.spent
    return part


def run_interrupts(
    clock: Clock,
    device: torch.device,
    seed: int,
    strides: tuple[int, ...] = STRIDES,
    every: list[Operation] | None = None,
) -> Part:
    """Ctrl-C at every line of the package that an operation executes."""
    part = Part("interrupts", "Ctrl-C at any point leaves the cache before or after the operation", "interrupts")
    if threading.current_thread() is not threading.main_thread():
        part.fail("Python answers signals in the main thread only: run this part there")
        return part
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    medium = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        chosen = chosen_operations(clock, device, seed) if every is None else every
        for operation in every or []:
            operation.__post_init__()  # the model, too, computes otherwise in less precision
        every_point(part, clock, chosen, interrupted, strides, "line")
    finally:
        torch.set_float32_matmul_precision(medium)
        signal.signal(signal.SIGINT, before)
    part.seconds = clock.spent
    return part
