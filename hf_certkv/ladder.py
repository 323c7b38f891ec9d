"""From contributions and a budget to what is promoted: the choices of the ladder. Pure; moves nothing itself.

Rungs: the fast path; keys raised; values raised (with or without keys); the head dense on the originals; the whole layer
dense. See docs/certificate.md, section 6. What is chosen here never decides what may be returned: `bounds.meets` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

LARGE = 1e300  # stands for an infinite contribution where finite arithmetic is needed
AIM = 0.95  # share of the room that a choice aims at: raising changes the weights, so the aim must not be the edge
DEVICE_DISCOUNT = 1 / 64  # a byte read on the device costs this much of a byte moved from the host


class Rung(IntEnum):
    """How a head-step was served. `UNCERTIFIED` occurs in the naive baseline only."""

    FAST = 0
    KEYS = 1
    VALUES = 2
    DENSE_HEAD = 3
    DENSE_LAYER = 4
    UNCERTIFIED = 5


@dataclass(frozen=True)
class Costs:
    """Bytes of one block: a refinement plane of keys and of values (None where the format has none), and the originals."""

    key_plane: float | None
    value_plane: float | None
    key_originals: float
    value_originals: float


def head_budget(rtol: float, atol: float, output_norm: Tensor) -> Tensor:
    """atol + rtol * ||O||, rounded down: float64, shaped as `output_norm`   [section 1]."""
    return (float(atol) + float(rtol) * output_norm) * (1 - 2.0**-30)


def water_level(bound: Tensor, budget: Tensor) -> Tensor:
    """The per-head budget t with sum_h min(B_h, t)^2 = budget^2, for a budget shared by heads.

    Args: bound: `[groups, heads]`; budget: `[groups]`. Returns `[groups]`; infinite where the bounds fit as they are.
    """
    # In units of the budget, so that squares do not overflow.
    unit = torch.where(torch.isfinite(budget) & (budget > 0), budget, torch.ones_like(budget))
    shares = bound / unit[:, None]
    ordered = shares.nan_to_num(nan=LARGE**0.5, posinf=LARGE**0.5).clamp(max=LARGE**0.5).sort(dim=-1).values
    squares = ordered.square().cumsum(dim=-1)
    count = ordered.shape[-1]
    before = torch.cat([torch.zeros_like(squares[:, :1]), squares[:, :-1]], dim=-1)
    rest = torch.arange(count, 0, -1, device=bound.device, dtype=bound.dtype)
    level = (((budget / unit)[:, None].square() - before).clamp_min(0) / rest).sqrt()
    # The right level is the first that the next-larger head exceeds; below it, heads keep their own bound.
    exceeds = ordered > level
    first = exceeds.to(torch.int8).argmax(dim=-1, keepdim=True)
    found = level.gather(-1, first).squeeze(-1) * unit
    return torch.where(exceeds.any(dim=-1), found, torch.full_like(budget, torch.inf))


def choose(
    key_parts: Tensor,
    value_parts: Tensor,
    key_refined: Tensor | None,
    value_refined: Tensor | None,
    key_level: Tensor,
    value_level: Tensor,
    room: Tensor,
    failing: Tensor,
    costs: Costs,
) -> tuple[Tensor, Tensor]:
    """New levels: what lowers the failing rows' contributions to their room at the fewest bytes, greedily.

    Args:
        key_parts, value_parts: float64 `[..., rows, blocks]`, contributions at the present levels, of some KV heads.
        key_refined, value_refined: expected contributions at level 1, shaped alike; None where there is no such level.
        key_level, value_level: int64 `[..., blocks]`, 0 to 2; room: `[..., rows]`, what the contributions may add up to;
            failing: bool, shaped as `room`.
    Returns: key and value levels, nowhere lower than given.
    """
    gains, prices = [], []
    for parts, refined, level, plane, originals in (
        (key_parts, key_refined, key_level, costs.key_plane, costs.key_originals),
        (value_parts, value_refined, value_level, costs.value_plane, costs.value_originals),
    ):
        now = _finite(parts)
        base, movable = (level == 0).unsqueeze(-2), (level < 2).unsqueeze(-2)
        if refined is None or plane is None:
            to_plane, left = torch.zeros_like(now), now
        else:
            after = torch.minimum(_finite(refined), now)
            to_plane = torch.where(base, now - after, torch.zeros_like(now))
            left = torch.where(base, after, now)
        gains += [to_plane, torch.where(movable, left, torch.zeros_like(left))]
        prices += [plane if plane is not None else 1.0, originals]
    blocks = key_parts.shape[-1]
    gain = torch.cat(gains, dim=-1)
    price = torch.tensor(prices, dtype=gain.dtype, device=gain.device).repeat_interleave(blocks)
    need = (_finite(key_parts) + _finite(value_parts)).sum(dim=-1) - AIM * room
    need = torch.where(failing, need, torch.full_like(need, -1.0))
    order = torch.argsort(gain / price, dim=-1, descending=True)
    ranked = gain.gather(-1, order)
    taken = ((ranked.cumsum(dim=-1) - ranked) < need.unsqueeze(-1)) & (ranked > 0)
    chosen = torch.zeros_like(taken).scatter(-1, order, taken).any(dim=-2)
    key_plane, key_full, value_plane, value_full = chosen.split(blocks, dim=-1)
    return _raised(key_level, key_plane, key_full), _raised(value_level, value_plane, value_full)


def _finite(parts: Tensor) -> Tensor:
    return parts.nan_to_num(nan=LARGE, posinf=LARGE)


def _raised(level: Tensor, to_plane: Tensor, to_originals: Tensor) -> Tensor:
    level = torch.where(to_plane, level.clamp_min(1), level)
    return torch.where(to_originals, torch.full_like(level, 2), level)


def coverage(mass: Tensor, share: float, least: int, most: int) -> Tensor:
    """The published selection: the fewest heaviest blocks of each row that hold `share` of the blocks' weight.

    Args: mass: `[batch, kv_heads, rows, blocks]`; least, most: limits of how many.
    Returns: bool `[batch, kv_heads, blocks]`, what any row selects.
    """
    order = torch.argsort(mass, dim=-1, descending=True)
    ranked = mass.gather(-1, order)
    held = ranked.cumsum(dim=-1) - ranked
    place = torch.arange(mass.shape[-1], device=mass.device)
    taken = ((held < share * mass.sum(dim=-1, keepdim=True)) | (place < least)) & (place < most)
    return torch.zeros_like(taken).scatter(-1, order, taken).any(dim=2)


def ranking_changed(before: Tensor, after: Tensor, depth: int) -> Tensor:
    """Whether the `depth` heaviest blocks of a row are no longer the same: bool `[batch, kv_heads, rows]`."""
    depth = min(depth, before.shape[-1])
    if depth == 0:
        return torch.zeros(before.shape[:-1], dtype=torch.bool, device=before.device)
    old = before.topk(depth, dim=-1).indices.sort(dim=-1).values
    new = after.topk(depth, dim=-1).indices.sort(dim=-1).values
    return (old != new).any(dim=-1)


def boundary_open(mass: Tensor, shift: Tensor, raised: Tensor) -> Tensor:
    """Whether an unraised block could outweigh the lightest raised one after its worst score error: bool per row.

    Args: mass, shift: `[batch, kv_heads, rows, blocks]`; raised: bool `[batch, kv_heads, blocks]`.
    """
    inside = raised.unsqueeze(2)
    lightest = torch.where(inside, mass, torch.full_like(mass, torch.inf)).amin(dim=-1)
    reach = torch.where(inside, torch.zeros_like(mass), mass * torch.exp(shift.clamp(max=80.0))).amax(dim=-1)
    return reach > lightest
