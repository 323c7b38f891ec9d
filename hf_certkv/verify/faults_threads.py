"""Threads: two caches in two threads go their own ways; two threads on one cache are told, and nothing wrong is returned.

A cache is for one thread at a time. Which calls of two threads come in which order is not left to chance: all orders of two
steps are gone through, and at every tensor operation of a step another thread tries to come in.

What cannot be noticed: a thread that comes in before another one's forward pass has reached the first layer, but after that one
has asked for the length, is served in turn, and the other's positions are one token off. One model, one thread.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from ..cache import CertifiedQuantizedCache
from ..errors import CertKVError
from .faults_operations import forward, on_layer, same
from .faults_state import BASE, State, differences, fresh_copy, process_settings, quiet, small_model, state_of, token_ids
from .parts import Clock, Part

LAYERS = 2


Threads = tuple[int, ...]  # those that have taken their step, in order


def _random(tokens: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of some tokens."""
    keys, values = (torch.randn(1, 2, tokens, 32, generator=generator).to(device) for _ in range(2))
    return keys, values


class Caller:
    """One thread's step through both layers of a cache: update and attention, layer by layer."""

    def __init__(self, cache: CertifiedQuantizedCache, seed: int, device: torch.device) -> None:
        self.cache = cache
        self.outputs: list[Tensor] = []
        self.error: BaseException | None = None
        g = torch.Generator().manual_seed(seed)
        self.new = [_random(1, g, device) for _ in range(LAYERS)]
        self.query = torch.randn(1, 4, 1, 32, generator=g).to(device)
        self.held: Any = None
        self.calls = [call for layer in range(LAYERS) for call in (self._update(layer), self._attend)]

    def _update(self, layer: int) -> Callable[[], None]:
        def call() -> None:
            self.held = self.cache.update(*self.new[layer], layer)

        return call

    def _attend(self) -> None:
        self.outputs.append(F.scaled_dot_product_attention(self.query, self.held[0], self.held[1], enable_gqa=True))

    def next(self) -> None:
        """The next call, unless one has failed: then this thread has given up."""
        if self.error is None and self.calls:
            try:
                self.calls.pop(0)()
            except CertKVError as error:
                self.error = error

    def all(self) -> list[Tensor]:
        """The whole step at once."""
        while self.calls and self.error is None:
            self.next()
        return self.outputs

    def exactly(self, originals: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """What exact attention over these originals gives, layer by layer."""
        return [F.scaled_dot_product_attention(self.query, keys, values, enable_gqa=True) for keys, values in originals]


def _filled(device: torch.device, seed: int, tokens: int, **settings: Any) -> CertifiedQuantizedCache:
    cache = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=LAYERS), **{**BASE, "rtol": 0.3, **settings})
    g = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        cache.update(*_random(tokens, g, device), layer)
    return cache


def one_cache(part: Part, device: torch.device, seed: int) -> None:
    """All orders in which the calls of two threads' steps on one cache can come."""
    ends: Counter[str] = Counter()
    base = _filled(device, seed, 175)  # the next token finishes a block

    def after(*seeds: int) -> CertifiedQuantizedCache:
        cache = fresh_copy(base)
        for each in seeds:
            Caller(cache, each, device).all()
        return cache

    orders: tuple[Threads, ...] = ((), (1,), (2,), (1, 2), (2, 1))
    serial = {seeds: after(*seeds) for seeds in orders}
    states = {seeds: state_of(cache) for seeds, cache in serial.items()}
    follow = {seeds: Caller(fresh_copy(cache), 9, device).all() for seeds, cache in serial.items()}
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for order in sorted(set(itertools.permutations([1] * 2 * LAYERS + [2] * 2 * LAYERS))):
            cache = fresh_copy(base)
            callers = {1: Caller(cache, 1, device), 2: Caller(cache, 2, device)}
            for who in order:
                (first if who == 1 else second).submit(callers[who].next).result()
            part.checked += 1
            what = "".join(map(str, order))
            for who, caller in callers.items():
                ends["typed error" if caller.error else "right"] += 1
                if caller.error is None and not _right(caller, serial, who):
                    part.fail(f"order {what}: thread {who} was given a wrong output, the other {callers[3 - who].error!r}")
            _settled(part, cache, states, follow, f"order {what}", device)
    part.figures["orders_of_two_steps"] = dict(ends)


def _right(caller: Caller, serial: dict[Threads, CertifiedQuantizedCache], who: int) -> bool:
    """Whether outputs are within the tolerance of exact attention: over this thread's token, or behind the other's."""
    for seeds in ((who,), (3 - who, who)):
        exact = caller.exactly([(layer.materialise(0), layer.materialise(1)) for layer in serial[seeds].certified_layers])
        rtol = serial[seeds].settings.rtol
        if all(
            bool(((a - b).norm(dim=-1) <= rtol * a.norm(dim=-1) + 1e-5).all())
            for a, b in zip(caller.outputs, exact, strict=True)
        ):
            return True
    return False


def _settled(
    part: Part,
    cache: CertifiedQuantizedCache,
    states: dict[Threads, State],
    follow: dict[Threads, list[Tensor]],
    words: str,
    device: torch.device,
) -> None:
    """After `rollback` the cache is one that took whole steps, and goes on like it."""
    try:
        cache.rollback()
        found = [seeds for seeds, state in states.items() if not differences(state_of(cache), state)]
        if not found:
            part.fail(f"{words}: afterwards the cache is not one that took whole steps")
        elif not same(Caller(cache, 9, device).all(), follow[found[0]]):
            part.fail(f"{words}: afterwards the next step gives another output")
    except CertKVError as error:
        part.fail(f"{words}: afterwards {type(error).__name__}: {error}")


class Visitor(TorchDispatchMode):
    """At the k-th tensor operation of one thread, another thread does something."""

    def __init__(self, at: int, visit: Callable[[], None]) -> None:
        super().__init__()
        self.at, self.seen, self.visit = at, 0, visit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            self.visit()
        return func(*args, **(kwargs or {}))


def visits(part: Part, clock: Clock, device: torch.device, seed: int) -> None:
    """While one thread is in a forward pass, another one comes with a step, a crop, a reorder, a scrub or a rollback."""
    model = small_model(device, seed)
    base = CertifiedQuantizedCache(model.config, **{**BASE, "rtol": 0.3})
    forward(model, token_ids(150, device, 1, seed))(base)
    one, other = (forward(model, token_ids(1, device, 1, seed + i)) for i in (1, 2))
    alone = fresh_copy(base)
    counter = Visitor(0, lambda: None)
    with counter:
        expected = one(alone)
    states = {"before": state_of(base), "after": state_of(alone)}
    guests: dict[str, Callable[[CertifiedQuantizedCache], Any]] = {
        "step": other,
        "crop": lambda cache: cache.crop(-20),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])),
        "scrub": lambda cache: cache.scrub(),
        "rollback": lambda cache: cache.rollback(),
    }
    ends: Counter[str] = Counter()
    stride = 211
    with ThreadPoolExecutor(1) as pool:
        for number, at in enumerate(_spread(counter.seen, stride)):
            if number >= 3 and clock.over():
                break
            for name, guest in guests.items():
                cache = fresh_copy(base)
                told: list[str] = []

                def visit(cache: Any = cache, guest: Any = guest, told: list[str] = told) -> None:
                    # Before its first layer a forward pass has not told the cache anything: there, threads take turns.
                    told.append("inside" if cache._journal else "outside")
                    try:
                        pool.submit(guest, cache).result()
                        told.append("served")
                    except CertKVError as error:
                        told.append(type(error).__name__)

                output, words = None, f"{name} at operation {at}"
                try:
                    with Visitor(at, visit):
                        output = one(cache)
                    end = "output"
                except CertKVError as error:
                    end = type(error).__name__
                where, reply = told
                ends[f"{name} {where} the step: {reply}, step under way: {end}"] += 1
                part.checked += 1
                cache.rollback()
                left = [which for which, state in states.items() if not differences(state_of(cache), state)]
                if name in ("scrub", "rollback") and not left:
                    part.fail(f"{words}: the cache is neither before nor after the step")
                if reply != "served" and (output is None or not same(output, expected) or left != ["after"]):
                    part.fail(f"{words}: was refused ({reply}), and yet the step ended with {end}, {left}")
                if name == "scrub" and output is not None and not same(output, expected):
                    part.fail(f"{words}: another output")
                if where == "inside" and reply == "served" and name in ("step", "crop") and not _whole(output, expected, left):
                    part.fail(f"{words}: both were served, and the step ended with {end}, {left}")
    part.figures["visits"] = dict(sorted(ends.items()))


def _whole(output: list[Tensor] | None, expected: list[Tensor], left: list[str]) -> bool:
    """Whether a step that another thread came into was over by then: its output is right, whatever was done after it."""
    return output is not None and same(output, expected) and "before" not in left


def _spread(count: int, stride: int) -> list[int]:
    """1..count in an order that is spread over all of it from the start."""
    return [at for offset in range(stride) for at in range(1 + (offset * 83) % stride, count + 1, stride)]


def two_caches(part: Part, device: torch.device, seed: int, steps: int = 12) -> None:
    """Two caches in two threads at the same time, in a process that has asked for less precision."""
    acts = [on_layer(1, 1, device, seed + i, batch=1) for i in range(steps)]
    kinds = [{"rtol": 0.3}, {"rtol": 0.05, "audit": True}, {"rtol": 0.3, "hot_blocks": 2, "value_bits": 8}]

    def decode(cache: CertifiedQuantizedCache, gate: threading.Barrier | None = None) -> list[Tensor]:
        outputs = []
        for act in acts:
            if gate is not None:
                gate.wait()
            outputs += act(cache)
        return outputs

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        settings = process_settings()
        for changes in kinds:
            bases = [_filled(device, seed + i, 170, **changes) for i in range(2)]
            for base in bases:
                base.crop(0)
            expected = [decode(fresh_copy(base)) for base in bases]
            gate = threading.Barrier(2)
            with ThreadPoolExecutor(2) as pool:
                caches = [fresh_copy(base) for base in bases]
                found = [future.result() for future in [pool.submit(decode, cache, gate) for cache in caches]]
            part.checked += 2 * steps
            for i in range(2):
                served = caches[i].report().to_dict()["overall"]["rungs"]
                if not same(found[i], expected[i]):
                    part.fail(f"{changes}: thread {i} gives other outputs than alone, {served}")
            if process_settings() != settings:
                part.fail(f"{changes}: settings were {settings}, are {process_settings()}")
    finally:
        torch.set_float32_matmul_precision(before)


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """Two caches, then one cache."""
    part = Part(
        "threads", "two caches in two threads: as alone; two threads on one cache: a typed error, no wrong output", "runs"
    )
    with quiet():
        two_caches(part, device, seed)
        one_cache(part, device, seed)
        visits(part, clock, device, seed)
    part.seconds = clock.spent
    return part
