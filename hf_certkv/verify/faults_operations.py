"""The operations that are made to fail: steps of a small model and everything that is done between steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..cache import CertifiedQuantizedCache
from .faults_state import BASE, State, counts_of, fresh_copy, quiet, small_model, state_of, token_ids

Act = Callable[[CertifiedQuantizedCache], list[Tensor]]


@dataclass
class Operation:
    """Something that is done to a cache.

    Attributes: name; base: the cache before; act: does it, and returns what a caller gets; is_step: whether tokens are added;
        later: one more step, whose output shows that nothing was left behind; heals: whether it repairs damage, which may be
        done for some blocks when it fails; before, after, output, follow, counts: of an undisturbed run.
    """

    name: str
    base: CertifiedQuantizedCache
    act: Act
    is_step: bool
    later: Act
    heals: bool = False
    before: State = field(init=False)
    after: State = field(init=False)
    output: list[Tensor] = field(init=False)
    follow: list[Tensor] = field(init=False)
    counts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        cache = self.fresh()
        with quiet():
            self.before = self.healthy_state(self.fresh())
            self.output = self.act(cache)
            self.after = state_of(cache)
            self.counts = counts_of(cache)
            self.follow = self.later(fresh_copy(cache))

    def healthy_state(self, cache: CertifiedQuantizedCache) -> State:
        """The state, once what damage there may be is repaired."""
        if self.heals:
            cache.scrub()
        return state_of(cache)

    def fresh(self) -> CertifiedQuantizedCache:
        """A cache as it is before the operation."""
        return fresh_copy(self.base)


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Equality of outputs, bit for bit."""
    return len(actual) == len(expected) and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def forward(model: LlamaForCausalLM, ids: Tensor) -> Act:
    """A forward pass of the model over new tokens."""

    def act(cache: CertifiedQuantizedCache) -> list[Tensor]:
        with torch.no_grad():
            return [model(ids, past_key_values=cache, use_cache=True).logits]

    return act


def on_layer(tokens: int, positions: int, device: torch.device, seed: int, batch: int = 2) -> Act:
    """Update and attention of a single layer, without a model; `positions` 0: no attention."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 2, tokens, 32, generator=generator).to(device) for _ in range(2))
    query = torch.randn(batch, 4, max(1, positions), 32, generator=generator).to(device)

    def act(cache: CertifiedQuantizedCache) -> list[Tensor]:
        held = cache.update(keys, values, 0)
        return [F.scaled_dot_product_attention(query, *held, enable_gqa=True)] if positions else []

    return act


def damage(cache: CertifiedQuantizedCache) -> None:
    """Flip a bit in the codes of every layer's second block and in a scale of its third."""
    for layer in cache.certified_layers:
        codes, scale = layer.store.keys["codes"].view, layer.store.values["scale"].view
        codes[0, 0, 1].view(-1)[3] ^= 64
        scale[0, 1, 2].view(torch.int16).view(-1)[1] ^= 1 << 12


def _scrub(cache: CertifiedQuantizedCache) -> list[Tensor]:
    cache.scrub()
    return []


def _deepcopy(cache: CertifiedQuantizedCache) -> list[Tensor]:
    return [layer.materialise(kind) for layer in copy.deepcopy(cache).certified_layers for kind in range(2)]


def _between(change: Callable[[CertifiedQuantizedCache], Any]) -> Act:
    def act(cache: CertifiedQuantizedCache) -> list[Tensor]:
        change(cache)
        return []

    return act


def operations(device: torch.device, seed: int) -> list[Operation]:
    """All of them. 150 tokens are 7 quantised blocks of 16; the 176th token finishes the 9th, which needs another slab."""
    model = small_model(device, seed)

    def built(tokens: int, batch: int = 1, **settings: Any) -> CertifiedQuantizedCache:
        cache = CertifiedQuantizedCache(model.config, **{**BASE, **settings})
        if tokens:
            forward(model, token_ids(tokens - 1, device, batch, seed))(cache)
            forward(model, token_ids(1, device, batch, seed + 1))(cache)
        return cache

    one, two = (forward(model, token_ids(1, device, batch, seed + 2)) for batch in (1, 2))
    later, later_two = (forward(model, token_ids(1, device, batch, seed + 3)) for batch in (1, 2))
    three, chunk = (forward(model, token_ids(count, device, 1, seed + 4)) for count in (3, 20))
    prefill = forward(model, token_ids(90, device, 1, seed))
    alone = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1), **BASE)
    on_layer(175, 0, device, seed)(alone)
    rows = torch.tensor([1, 0])

    def steps() -> list[Operation]:
        return [
            Operation("a decode step", built(150, rtol=0.5), one, True, later),
            Operation("a decode step that finishes a block", built(175, refine="device"), one, True, later),
            Operation("a decode step that promotes", built(150, rtol=0.004, dense_head_share=1.0), one, True, later),
            Operation("a dense decode step", built(175, rtol=0.0), one, True, later),
            Operation("a shared budget", built(150, scope="layer", rtol=0.01), three, True, later),
            Operation("the paper's policy", built(150, policy="paper", refine="off", value_group=16), one, True, later),
            Operation("an audited decode step", built(150, audit=True), one, True, later),
            Operation("a decode step with hot blocks", built(150, hot_blocks=2, rtol=0.004), one, True, later),
            Operation("a step of one layer", alone, on_layer(1, 1, device, seed + 5), True, on_layer(1, 1, device, seed + 6)),
            Operation("a prefill", built(0), prefill, True, later),
            Operation("the first tokens that are quantised", built(40, exact_below=40), one, True, later),
            Operation("a chunk of many queries", built(150), chunk, True, later),
        ]

    def between() -> list[Operation]:
        return [
            Operation("crop within the tail", built(150), _between(lambda cache: cache.crop(-2)), False, later),
            Operation("crop of blocks", built(175, hot_blocks=2), _between(lambda cache: cache.crop(-60)), False, later),
            Operation("crop of everything quantised", built(150), _between(lambda cache: cache.crop(-140)), False, later),
            Operation("reorder", built(150, 2), _between(lambda cache: cache.reorder_cache(rows)), False, later_two),
            Operation("repeat", built(100), _between(lambda cache: cache.batch_repeat_interleave(2)), False, later_two),
            Operation("select", built(100, 2), _between(lambda cache: cache.batch_select_indices(rows[1:])), False, later),
            Operation("deepcopy", built(100), _deepcopy, False, later),
            Operation("scrub", built(150, hot_blocks=2, rtol=0.004), _scrub, False, later),
        ]

    def hurt(tokens: int, **settings: Any) -> CertifiedQuantizedCache:
        cache = built(tokens, **settings)
        damage(cache)
        return cache

    with quiet():
        return [
            *steps(),
            Operation("a step of two rows", built(150, 2), two, True, later_two),
            Operation("an audited step over damage", hurt(150, audit=True), one, True, later, heals=True),
            *between(),
            Operation("scrub with damage", hurt(150), _scrub, False, later, heals=True),
        ]


def few_operations(device: torch.device, seed: int, most: int) -> list[Operation]:
    """Steps of one small layer, at most so many, others first with another seed; the 32nd token finishes a block."""

    def built(**settings: Any) -> CertifiedQuantizedCache:
        few = {"sink_blocks": 0, "recent_window": 0, "dense_head_share": 1.0, "refine": "off"}
        cache = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1), **{**BASE, **few, **settings})
        on_layer(31, 0, device, seed, batch=1)(cache)
        return cache

    one, later = (on_layer(1, 1, device, seed + i, batch=1) for i in (1, 2))
    rtols = {"a step of one layer": 0.3, "a step of one layer that promotes": 0.02, "a dense step of one layer": 1e-9}
    names = list(rtols)[seed % 3 :] + list(rtols)[: seed % 3]
    with quiet():
        return [Operation(name, built(rtol=rtols[name]), one, True, later) for name in names[:most]]
