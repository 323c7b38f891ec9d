"""The published policy (arXiv 2605.20868) as a way to choose promotions; what may be returned is decided as always.

Keys of the blocks that hold `tau_cov` of the weight go back to the originals (between k_min and k_max of them), values of
blocks whose error share is above `v_tol`; a few blocks more at random. Then the monitors: did the ranking of the heaviest
blocks change, could an unraised block outrank a raised one, are the scores of raised blocks where their bound says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import bounds, ladder
from .codecs import ETA
from .errors import CertificateViolation

if TYPE_CHECKING:
    from .decode import DecodeStep


def paper_promotions(step: DecodeStep) -> None:
    """Promote as the published method would, and run its monitors."""
    config = step.config
    before, old_maximum = step.mass, step.segments.maximum[..., :-1].double()
    selected = ladder.coverage(before, config.paper_tau_cov, config.paper_k_min, config.paper_k_max)
    explore = int(config.paper_explore * step.blocks)
    if explore:
        generator = torch.Generator().manual_seed(config.seed + step.layer.cache.recorder.step)
        extra = torch.randperm(step.blocks, generator=generator)[:explore].to(selected.device)
        selected[..., extra] = True
    share = before * step.step * step._value_number(ETA)
    heavy = (share > config.paper_v_tol * step.norm.unsqueeze(-1)).any(dim=2)
    two = torch.full_like(step.key_level, 2)
    values = torch.where(heavy, two, step.value_level)
    shift = step.shift
    rounded = step.fused.score_errors() if step.fused is not None else torch.zeros_like(shift)
    step.raise_to(torch.where(selected, two, step.key_level), values)
    if config.paper_canary:
        _canary(step, old_maximum, shift + rounded, selected)
    depth = config.paper_rank_depth
    if depth == 0:
        return
    moved = ladder.ranking_changed(before, step.mass, depth) | ladder.boundary_open(step.mass, shift, selected)
    any_moved, widest = step.layer.cache.ranks.most(int(moved.any()), int(selected.sum(-1).amax()))
    if any_moved:
        twice = min(2 * config.paper_k_max, step.blocks)
        wider = ladder.coverage(step.mass, config.paper_tau_cov, 2 * widest, twice)
        wider &= moved.any(dim=-1, keepdim=True)
        step.raise_to(torch.where(wider, two, step.key_level), step.value_level)


def _canary(step: DecodeStep, old_maximum: torch.Tensor, shift: torch.Tensor, selected: torch.Tensor) -> None:
    """A raised block's largest score may have moved by its bound and two roundings, and no further."""
    moved = (step.segments.maximum[..., :-1].double() - old_maximum).abs()
    allowed = shift + 2 * step.slack.unsqueeze(-1)
    fresh = selected & (step.hot_level < 2)
    broken = fresh.unsqueeze(2) & torch.isfinite(moved) & (moved > allowed * bounds.OUTWARD)
    if bool(broken.any()):
        row, head, place, block = (int(part) for part in broken.nonzero()[0])
        raise CertificateViolation(
            f"Score canary: layer {step.layer.layer_idx}, batch row {row}, KV head {head}, row {place}, block {block}: the "
            f"largest score moved by {float(moved[row, head, place, block]):.6g}, its bound is "
            f"{float(allowed[row, head, place, block]):.6g}.",
            {"layer": step.layer.layer_idx, "block": block, "query": step.call.query.detach().clone()},
        )
