"""Random decodes: every format, policy, mask, dtype and shape; several calls on one cache, with crops and reorders between.

What is drawn is drawn by one function from a sequence, so the same list serves a seeded generator and hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..certificate import StepRecord
from ..codecs import ValueCodec
from ..config import CertKVConfig
from . import kernel
from .cases import BEYOND, BITS, MASKS, REGIMES, Case, call_on, mask_of, new_cache, tensors
from .kernel import both

Pick = Callable[[Sequence[Any]], Any]

# Most draws are of what models do; the rest is spread evenly.
USUAL = ("normal", "drifting", "outlier", "one-hot", "wild values", "lined keys", "lined values")
POLICIES = ("budget",) * 5 + ("paper",) * 3 + ("naive",)
BLOCK_SIZES = (16, 16, 16, 16, 32, 32, 64, 128)
VALUE_GROUPS = (None, None, 0, 2, 3, 8, 16, 32)
RTOLS = (0.0, 1e-4, 0.01, 0.02, 0.05, 0.1, 0.1, 0.3, 0.3, 1.0, 1.0, 4.0)
POSITIONS = (1, 1, 1, 1, *range(2, 17), 16, 16)
MOST_TOKENS: tuple[int, ...] = (96,) * 12 + (160,) * 4 + (300,)
FEW_TOKENS: tuple[int, ...] = (48,) * 8 + (96,) * 3 + (300,)  # where a call takes seconds


@dataclass(frozen=True)
class Call:
    """One call of a decode.

    Attributes: case: the queries `[batch, query_heads, positions, channels]`, the originals of as many new tokens, and the mask
        over all tokens; crop: tokens removed before it; order: batch rows that the cache goes on with, or None.
    """

    case: Case
    crop: int = 0
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Story:
    """A prefill and the calls that follow it on the same cache.

    Attributes: keys, values: of the prefill `[batch, kv_heads, tokens, ...]`; chunk: tokens of it at a time; packed: query
        heads lie along the position axis, as transformers lays them for a single new token; regime, mask: their names.
    """

    keys: Tensor
    values: Tensor
    calls: tuple[Call, ...]
    settings: dict[str, Any]
    chunk: int
    packed: bool
    regime: str
    mask: str


@dataclass(frozen=True)
class Served:
    """One call that had a certificate: the case in full, for the oracle, and what was returned."""

    number: int
    case: Case
    output: Tensor
    record: StepRecord
    config: CertKVConfig


def seeded(*seed: int) -> Pick:
    """Draws from a generator of its own."""
    rng = np.random.default_rng(seed)
    return lambda options: options[int(rng.integers(len(options)))]


def random_settings(pick: Pick) -> dict[str, Any]:
    """Formats, policies and ladder settings; the tolerance is `random_tolerance`'s."""
    block = pick(BLOCK_SIZES)
    settings = {
        "block_size": block,
        "value_bits": pick((4, 4, 8)),
        "value_group": pick(VALUE_GROUPS),
        "refine": pick(("device", "host", "off")),
        "policy": pick(POLICIES),
        "scope": pick(("head", "head", "layer")),
        "sink_blocks": pick((0, 0, 1, 2) if block < 64 else (0, 0, 1)),
        "recent_window": pick((0, 0, 1, 7, 32)),
        "hot_blocks": pick((0, 0, 1, 4)),
        "audit": pick((False,) * 7 + (True,)),
        "max_rounds": pick((1, 2, 4, 4)),
        "dense_head_share": pick((0.3, 0.6, 1.0, 1.0, 1.0)),
        "dense_layer_share": pick((0.5, 1.0, 1.0, 1.0)),
    }
    if settings["policy"] == "paper":
        settings["paper_tau_cov"] = pick((0.3, 0.9, 0.995))
        settings["paper_k_min"], settings["paper_k_max"] = pick(((0, 1), (0, 128), (2, 4), (2, 128)))
        settings["paper_v_tol"] = pick((0.05, 0.5))
        settings["paper_rank_depth"] = pick((0, 1, 2))
        settings["paper_explore"] = pick((0.0, 0.02, 0.4))
    return settings


def random_tolerance(pick: Pick, values: Tensor, rtols: Sequence[float]) -> dict[str, float]:
    """rtol, and an atol in units of the largest value: else no case with tiny or huge values would be certified."""
    size = float(values.double().abs().max())
    return {
        "rtol": pick(rtols),
        "atol": pick((0.0, 0.0, 0.0, 1e-3, 0.05, 1.0, 10.0)) * size,
    }


def sizes_for_triton(pick: Pick, settings: dict[str, Any]) -> tuple[int, int]:
    """Channels of keys and values that the Triton kernels take; settings are changed to such, too."""
    from ..kernels.triton_step import format_of

    settings["scope"] = "head"
    if settings["policy"] == "paper":
        settings["policy"] = "budget"
    bits, group = settings["value_bits"], pick((None, None, 0, 16, 32, 64))
    channels, width = pick((4, 8, 16, 16, 20, 33, 64, 96, 128)), pick((2, 8, 16, 16, 20, 32, 32, 48, 64, 96, 128))
    codec = ValueCodec(bits, (32 if bits == 4 else 0) if group is None else group, False)
    settings["value_group"] = group if format_of(codec, width, settings["block_size"]) is not None else 0
    return channels, width


def random_story(
    pick: Pick,
    regimes: Sequence[str] = USUAL * 3 + REGIMES + BEYOND,
    dtypes: Sequence[torch.dtype] = tuple(BITS),
    most: int = 1024,
) -> Story:
    """A decode drawn with `pick`. Args: most: head-steps of one call, at most (or one of every query head)."""
    regime = pick(regimes)
    dtype = pick([dtype for dtype in dtypes if regime not in BEYOND or dtype != torch.float16])
    settings = random_settings(pick)
    busy = pick(range(5)) == 0  # a long decode in which much is promoted, kept on the device, cropped and reordered
    if busy:
        settings["hot_blocks"], settings["dense_head_share"] = pick((1, 4)), 1.0
    block = settings["block_size"]
    heads, groups = pick((1, 1, 2, 3, 4)), pick((1, 2, 4, 8, 8))
    batch = pick((2, 3) if busy else (1, 1, 1, 2, 4))
    if kernel.slow():
        heads, groups, batch = min(heads, 2), min(groups, 4), min(batch, 2)
    while batch > 1 and batch * heads * groups > most:
        batch //= 2
    most_positions = max(1, most // (batch * heads * groups))
    packed = groups > 1 and pick(range(8)) == 0
    kinds = [kind for kind in MASKS if not packed or kind not in ("heads", "alibi")]
    kind = pick(["none"] * len(kinds) + kinds)
    softcap = None if packed else pick((None,) * 6 + (0.7, 5.0, 50.0))
    has_sinks = not packed and pick(range(6)) == 0
    scale = pick((None, None, None, 1.0, 0.1, 1 / 3, -0.25))
    channels, width = pick((4, 8, 8, 16, 16, 20, 33)), pick((4, 8, 9, 16, 16, 20, 33))
    if pick(range(20)) == 0:
        channels, width = 64, 64
    if pick(both((False,), (True, True))):  # sizes that fill the CPU kernel's vectors, and groups that do
        eight = settings["value_bits"] == 8
        channels, width = pick((16, 16, 32, 32, 48, 64)), pick((16, 32, 32, 48, 64) if eight else (32, 32, 64, 96))
        settings["value_group"] = pick((None, 0, 16, 32))

    count, most_tokens = 6 if busy else pick((1, 1, 1, 1, 2, 3)), MOST_TOKENS
    positions: Sequence[int] = range(1, 5) if busy else POSITIONS
    if kernel.chosen() == "triton":
        channels, width = sizes_for_triton(pick, settings)
        positions = [new for new in positions if new * groups <= 64]
    if kernel.slow():
        count, positions, most_tokens = min(count, 3), range(1, 3), FEW_TOKENS
    news = [1 if packed else min(most_positions, pick(positions)) for _ in range(count)]
    fixed = settings["sink_blocks"] * block + max(1, settings["recent_window"])
    blocks = pick(range(1, max(2, (pick(most_tokens) - fixed) // block + 1)))
    first = fixed + blocks * block + pick(range(block))
    seed = pick(range(2**30))
    drawn = (channels, width, batch)
    q, k, v = tensors(regime, dtype, first + sum(news[1:]), *drawn, sum(news), seed, heads, groups)
    settings.update(random_tolerance(pick, v, (0.01, 0.03, 0.05, 0.1) if busy else RTOLS))
    g = torch.Generator().manual_seed(seed)
    sinks = (torch.randn(heads * groups, generator=g) * 3).to(dtype) if has_sinks else None

    calls: list[Call] = []
    held, asked, taken = first - news[0], 0, first - news[0]
    for number, new in enumerate(news):
        crop = pick((0, 0, 0, 1, 5, block, 2 * block)) if number else 0
        crop = min(crop, held - fixed)
        reordered = number > 0 and batch > 1 and pick(range(2 if busy else 4)) == 0
        order = tuple(pick(range(batch)) for _ in range(batch)) if reordered else None
        held += new - crop
        mask = mask_of(kind, dtype, batch, new, held, seed + number, heads * groups)
        part = slice(taken, taken + new)
        case = Case(q[:, :, asked : asked + new], k[:, :, part], v[:, :, part], mask, scale, softcap, sinks, settings)
        calls.append(Call(case, crop, order))
        asked, taken = asked + new, taken + new
    start = first - news[0]
    chunk = pick((start, start, 7, 40))
    return Story(k[:, :, :start], v[:, :, :start], tuple(calls), settings, max(1, chunk), packed, regime, kind)


def walk(story: Story, device: torch.device | None = None) -> Iterator[Served]:
    """Tell a story to a new cache, call by call. The originals are kept here as well: the cache's own are not trusted."""
    device = device or torch.device("cpu")
    keys, values = story.keys, story.values
    cache = new_cache(replace(story.calls[0].case, settings=story.settings))
    for start in range(0, keys.shape[2], story.chunk):
        part = slice(start, start + story.chunk)
        cache.update(keys[:, :, part].to(device), values[:, :, part].to(device), 0)
    for number, call in enumerate(story.calls):
        if call.crop:
            cache.crop(-call.crop)
        if call.order is not None:
            cache.reorder_cache(torch.tensor(call.order, device=device))
        rows = slice(None) if call.order is None else list(call.order)
        held = keys.shape[2] - call.crop
        keys, values = keys[rows, :, :held], values[rows, :, :held]
        keys, values = torch.cat([keys, call.case.keys], dim=2), torch.cat([values, call.case.values], dim=2)
        handles = cache.update(call.case.keys.to(device), call.case.values.to(device), 0)
        query = call.case.query
        asked = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[3]) if story.packed else query
        before = len(cache.recorder.records)
        output = call_on(replace(call.case, query=asked).to(device), *handles)
        cache.recorder.commit()
        if len(cache.recorder.records) == before:
            continue  # cropped until nothing was quantised: exact attention, no certificate
        case = replace(call.case, keys=keys, values=values)
        record = cache.recorder.records[-1]
        yield Served(number, case, output.reshape(*query.shape[:3], -1).cpu(), record, cache.settings)
