"""Flipped bits where nobody looks, or looks only at a scrub: hot slots, exact tokens on the device, unused room."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from . import kernel
from .cases import judge
from .faults_bits import FORMATS, Subject, bits_stored, buffer_of, bytes_of, flip
from .faults_state import differences, state_of
from .parts import Part

ALL, SOME = 1e-3, 0.05  # tolerances that promote every block of every head, and some


def hot_slots(part: Part, routes: Counter[str], device: torch.device, seed: int, rng: np.random.Generator) -> dict[str, int]:
    """Bits of hot slots: scrub compares them with their pages; a step between scrubs does not."""
    counts: Counter[str] = Counter()
    start = Subject(FORMATS[0], device, seed, blocks=3, changes={"hot_blocks": 2, "rtol": ALL})
    start.step()
    start.layer.prefetch()  # what was promoted goes into the slots
    start.cache.crop(-1)
    for turn in range(3 if kernel.slow() else 48):
        subject = start.copy()
        hot = subject.layer.hot
        name = ("keys", "values", "blocks")[turn % 3]
        held = getattr(hot, name)
        if held is None or hot.blocks is None or not bool((hot.blocks >= 0).all()):
            part.fail("no hot slots to flip bits in")
            break
        raw = _bytes_of_slots(held)
        flip(raw, (0, int(rng.integers(2)), int(rng.integers(2))), int(rng.integers(8 * raw.shape[-1])))
        between = subject.copy()
        output = between.step()
        breaches = judge(between.case, output, between.cache.recorder.records[-1], between.cache.settings).breaches
        counts[f"{name}: a step {'beyond' if breaches else 'within'} its bound"] += 1
        hot_damaged = subject.cache.scrub().hot_damaged
        # A number out of range names no block: the slot counts as empty, and there is nothing to compare.
        named = subject.layer.hot.blocks
        gone = named is not None and bool(((named < 0) | (named >= subject.layer.store.blocks)).any())
        part.checked += 1
        routes["cache.scrub(), hot slots"] += 1
        if not hot_damaged and not gone:
            part.fail(f"hot slots, {name}: not seen by scrub")
        if subject.cache.scrub().hot_damaged:
            part.fail(f"hot slots, {name}: not repaired by scrub")
    return dict(sorted(counts.items()))


def _bytes_of_slots(held: torch.Tensor) -> torch.Tensor:
    """The bytes of a part of hot slots: uint8 `[batch, kv_heads, slots, bytes a slot]`, a view."""
    return (held.flatten(3) if held.dim() > 3 else held.unsqueeze(-1)).view(torch.uint8)


def exact_tokens(part: Part, device: torch.device, seed: int, rng: np.random.Generator) -> dict[str, int]:
    """Bits of exact tokens on the device: nobody can notice, and certificates speak of what is there."""
    flipped = noticed = within = 0
    for turn in range(2 if kernel.slow() else 16):
        subject = Subject(FORMATS[0], device, seed, blocks=3, changes={"rtol": SOME})
        layer, kind = subject.layer, turn % 2
        sink = layer.sink_tokens
        if not sink:
            part.fail("no sink block to flip bits in")
            break
        where = layer.exact_tokens(kind)[:, :, slice(sink, None) if turn % 4 < 2 else slice(sink)]
        token, channel = int(rng.integers(where.shape[2])), int(rng.integers(where.shape[3]))
        where.view(torch.int32)[0, 0, token, channel] ^= 1 << int(rng.integers(23))  # of the fraction: it stays a number
        noticed += subject.cache.scrub().repaired
        output, flipped = subject.step(), flipped + 1
        held = replace(subject.case, keys=layer.materialise(0), values=layer.materialise(1))
        breaches = judge(held, output, subject.cache.recorder.records[-1], subject.cache.settings).breaches
        within += not breaches
        if breaches:
            part.fail(f"exact tokens, turn {turn}: not even sound for what is held: {breaches[:1]}")
    return {"flipped": flipped, "noticed": noticed, "within the bound for what is held": within}


def unused_room(part: Part, device: torch.device, seed: int, rng: np.random.Generator) -> dict[str, int]:
    """Bits of room that holds nothing, left by a crop: nothing changes."""
    subject = Subject(FORMATS[1], device, seed, blocks=6, changes={"rtol": SOME})
    subject.cache.crop(-3 * subject.form.block)
    fresh = subject.copy()
    before, held, flipped = state_of(subject.cache), subject.layer.store.blocks, 0
    for kind, name in bits_stored(subject.layer):
        buffer = buffer_of(subject.layer, kind, name)
        assert buffer is not None
        raw = bytes_of(buffer)
        if raw.shape[2] > held:
            flip(raw, (0, 0, int(rng.integers(held, raw.shape[2]))), int(rng.integers(8 * raw.shape[3])))
            flipped += 1
    repaired = subject.cache.scrub().repaired
    if not flipped or repaired or differences(state_of(subject.cache), before) or not torch.equal(subject.step(), fresh.step()):
        part.fail(f"{flipped} flips in unused room made a difference")
    return {"flipped": flipped, "noticed": repaired}
