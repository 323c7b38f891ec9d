"""One certified decode step of one layer: pass, certificate, promotions, dense rungs, record.

A reader follows it downwards: `certified_decode` -> `first_pass` (certified_pass.py) -> `climb` -> `finish`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from . import bounds, device_decode, ladder, stages
from .attention import AttentionCall
from .audit import audit_step
from .certificate import StepRecord
from .certified_pass import CertifiedPass
from .codecs import ETA, PER_LEVEL
from .dense import dense_bound, dense_layer, dense_unit
from .errors import FaultyMemoryError
from .handle import KEYS, VALUES
from .layers import CertifiedLayer
from .paper import paper_promotions
from .parallel import ALONE
from .precision import full_precision
from .recording import settled_record, step_record
from .scrub import BlocksRepairedError, require_intact
from .store import Index

MOST_REPAIRS = 8  # of one step: more is no accident
REDONE_AT_A_TIME = 128  # blocks, whose numbers are held in float32


def certified_decode(layer: CertifiedLayer, call: AttentionCall) -> Tensor:
    """Attention of a few queries over a quantised layer: certified, or dense on the originals.

    Returns: `[batch, query_heads, positions, value channels]`, in the query's dtype.
    Raises: CorruptedPageError: originals were needed and cannot be trusted; CertificateViolation: audit found a bug;
        FaultyMemoryError: quantised blocks are damaged again and again.
    """
    if stages.asked():
        whole, output = stages.timed(lambda: _repeat(layer, call))
        stages.add(stages.AROUND, whole)  # the other stages have been taken off it
        return output
    return _repeat(layer, call)


def _repeat(layer: CertifiedLayer, call: AttentionCall) -> Tensor:
    for _ in range(MOST_REPAIRS):
        try:
            with layer.cache.ranks.together():
                return _attempt(layer, call)
        except BlocksRepairedError:  # whatever was computed from damaged blocks is thrown away
            continue
    raise FaultyMemoryError(
        f"Layer {layer.layer_idx}: quantised blocks were found damaged {MOST_REPAIRS} times within one step. The device's "
        "memory is faulty; nothing was returned from it. Move the model to another device."
    )


def _attempt(layer: CertifiedLayer, call: AttentionCall) -> Tensor:
    config, step = layer.config, None
    exactly = config.exactly
    if not exactly and device_decode.supports(layer, call):
        layer.cache.ranks.close()  # head by head, and without waiting: nothing to agree on
        return device_decode.decode(layer, call)
    if call.mask is None and not exactly:
        # The CPU kernel does without torch's products, and so without the guard, unless there is more to do.
        step = DecodeStep(layer, call)
        step.fuse()
        if step.at_once:
            return step.finish()
    with full_precision(layer.device.type):
        step = step or DecodeStep(layer, call)
        if exactly:
            step.without_pass()
        else:
            step.first_pass()
            if not step.at_once:
                step.climb()
    return step.finish()


class DecodeStep(CertifiedPass):
    """The working state of one certified call: promotions, dense rungs, record."""

    def __init__(self, layer: CertifiedLayer, call: AttentionCall) -> None:
        super().__init__(layer, call)
        self.bytes_moved = 0
        self.whole_layer = True

    @cached_property
    def dense(self) -> Tensor:
        """Which KV heads are left to the dense rung: bool `[B, H]`."""
        return torch.zeros(self.shape[:2], dtype=torch.bool, device=self.layer.device)

    @cached_property
    def met_at_once(self) -> Tensor:
        """Which rows met their tolerance without promotions: bool `[B, H, R]`."""
        return torch.zeros(self.shape[:3], dtype=torch.bool, device=self.layer.device)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Which rows meet the promise, and the bound that each may have: `[B, H, R]` both."""
        config = self.config
        if config.scope == "head":
            budget = ladder.head_budget(config.rtol, config.atol, self.norm)
            return bounds.meets(self.bound, budget), budget
        # One budget for the heads of a batch row and position: heads along the last axis. What goes to the dense rung will
        # have the rounding bound only; `finish` looks again when the dense outputs are there.
        served = torch.where(self.dense.unsqueeze(-1), dense_bound(self, self.norm), self.bound)
        bound, norm = self.by_position(served), self.by_position(self.norm)
        every_bound, every_norm = self.layer.cache.ranks.heads(bound, norm)
        budget = ladder.head_budget(config.rtol, config.atol, every_norm.square().sum(dim=-1).sqrt())
        together = every_bound.square().sum(dim=-1).sqrt() * bounds.OUTWARD
        met = bounds.meets(together, budget)
        level = ladder.water_level(every_bound.flatten(0, 1), budget.flatten()).view_as(budget)
        admits = bounds.meets(bound, level.unsqueeze(-1)) & torch.isfinite(budget).unsqueeze(-1)
        within = met.unsqueeze(-1) | admits
        return self.by_row(within), self.by_row(level.unsqueeze(-1).expand_as(bound))

    def climb(self) -> None:
        """Promote until every row meets its budget; what does not is left to the dense rungs."""
        self.whole_layer = False
        if not self.config.certified:
            self.settled = True
            return
        if self.fused is not None and self.config.scope == "head" and self.config.policy != "paper" and self.fused.all_met():
            self.met_at_once.fill_(True)
            self.settled = True
            return
        if self.config.policy == "paper":
            self.details()
            paper_promotions(self)
        else:  # until a round finds otherwise
            self.met_at_once.fill_(True)
        ranks = self.layer.cache.ranks if self.config.scope == "layer" else ALONE  # who must go through rounds together
        for _ in range(self.config.max_rounds):
            met, target = self.targets()
            failing = ~met & ~self.dense.unsqueeze(-1)
            here = bool(failing.any())
            if not ranks.any(here):
                self.settled = bool(met.all()) and not bool(self.dense.any())
                return
            self.met_at_once &= ~failing
            if not ranks.any(here and self._promote(failing, target)):
                break
        met, _ = self.targets()
        self.dense |= (~met).any(dim=-1)

    def _promote(self, failing: Tensor, target: Tensor) -> bool:
        """One round of the greedy choice. Returns whether anything was promoted."""
        self.details()
        layer, certificate = self.layer, self.certificate
        assert certificate is not None
        room = target - certificate.fixed
        self.dense |= (failing & ~(room > 0)).any(dim=-1)
        failing = failing & ~self.dense.unsqueeze(-1)
        # Only KV heads with failing rows are looked at.
        at: tuple[Tensor, Tensor] = failing.any(dim=-1).nonzero(as_tuple=True)  # type: ignore[assignment]
        key_parts, value_parts = certificate.key_parts[at], certificate.value_parts[at]
        key_refined = key_parts * self.refined_share[at] if self.refined_share is not None else None
        value_refined = None
        if layer.value_codec.levels > 1:
            eta = self.value_numbers[at][..., [ETA, PER_LEVEL + ETA]].unsqueeze(1)
            value_refined = value_parts * (eta[..., 1] / eta[..., 0].clamp_min(bounds.MASS_FLOOR))
        raised = ladder.choose(
            key_parts,
            value_parts,
            key_refined,
            value_refined,
            self.key_level[at],
            self.value_level[at],
            room[at],
            failing[at],
            self._costs(),
        )
        before = self.key_level, self.value_level
        key_level, value_level = (old.index_put(at, new) for old, new in zip(before, raised, strict=True))
        # A head whose promotion would move more than a fair share of its originals is cheaper dense.
        moved = self._originals_bytes(key_level, value_level)
        self.dense |= moved > self.config.dense_head_share * self.unit_bytes()
        keep = self.dense.unsqueeze(-1)
        return self.raise_to(torch.where(keep, self.key_level, key_level), torch.where(keep, self.value_level, value_level))

    def _page_bytes(self) -> tuple[int, int]:
        item = self.layer.dtype.itemsize * self.layer.block
        return item * self.layer.widths[0], item * self.layer.widths[1]

    def unit_bytes(self) -> int:
        """Bytes of one KV head's originals on the host."""
        return self.blocks * sum(self._page_bytes())

    def _originals_bytes(self, key_level: Tensor, value_level: Tensor) -> Tensor:
        """Bytes of originals to be fetched to get to these levels: `[B, H]`."""
        key_page, value_page = self._page_bytes()
        keys = ((key_level == 2) & (self.hot_level < 2)).sum(dim=-1)
        values = ((value_level == 2) & (self.hot_level < 2)).sum(dim=-1)
        return keys * key_page + values * value_page

    def _costs(self) -> ladder.Costs:
        layer = self.layer
        key_page, value_page = self._page_bytes()
        planes = [layer.block * ((width + 1) // 2) for width in layer.widths]
        discount = ladder.DEVICE_DISCOUNT if self.config.refine == "device" else 1.0
        return ladder.Costs(
            planes[0] * discount if layer.key_codec.levels > 1 else None,
            planes[1] * discount if layer.value_codec.levels > 1 else None,
            key_page,
            value_page,
        )

    def raise_to(self, key_level: Tensor, value_level: Tensor) -> bool:
        """Bring blocks to new levels, redo them, and certify again. Returns whether any level rose."""
        changed = (key_level > self.key_level) | (value_level > self.value_level)
        if not bool(changed.any()):
            return False
        index: Index = tuple(torch.nonzero(changed, as_tuple=True))  # type: ignore[assignment]
        require_intact(self.layer, index)
        self.details()
        for first in range(0, len(index[0]), REDONE_AT_A_TIME):
            few: Index = tuple(part[first : first + REDONE_AT_A_TIME] for part in index)  # type: ignore[assignment]
            keys = self._load(KEYS, few, key_level, self.key_level)
            self.redo(few, keys, self._load(VALUES, few, value_level, self.value_level))
        self.key_level, self.value_level = key_level, value_level
        self.certify()
        return True

    def _load(self, kind: int, index: Index, level: Tensor, before: Tensor) -> Tensor:
        """Blocks at their new levels: float32 `[n, block, channels]`."""
        layer, wanted = self.layer, level[index]
        width = layer.widths[kind]
        out = torch.empty(len(wanted), layer.block, width, dtype=torch.float32, device=layer.device)
        if self.fused is not None:
            self.fused.read(kind, index, wanted, out)
        for at in range(3):
            chosen = (wanted == at).nonzero().flatten()
            if len(chosen) == 0:
                continue
            part = (index[0][chosen], index[1][chosen], index[2][chosen])
            if at == 1 and self.config.refine == "host":
                fresh = int((before[part] < 1).sum())
                self.bytes_moved += fresh * layer.block * ((width + 1) // 2)
            if at == 2:
                assert layer.shadow is not None
                out[chosen] = layer.shadow.read_pages(kind, *part).float()
                self.bytes_moved += len(chosen) * self._page_bytes()[kind]
            elif self.fused is None:
                out[chosen] = layer.store.decode("values" if kind else "keys", at, part, width)
        return out

    def finish(self) -> Tensor:
        """Dense rungs for what is not certified, audit, record; the output in the call's shape."""
        batch, ranks = self.shape[0], self.layer.cache.ranks
        dense_share = ranks.dense_share(self)
        if self.at_once and self.fused is not None:
            self._note(lambda: settled_record(self))
            return self.fused.result.reshape(batch, self.call.query.shape[1], -1, self.shape[3])
        if self.settled:
            output = self.output.reshape(batch, self.call.query.shape[1], -1, self.shape[3])
        elif self.whole_layer or dense_share > self.config.dense_layer_share:
            output = dense_layer(self)
        else:
            for row, head in self.dense.nonzero().tolist():
                dense_unit(self, row, head)
            self._close_bounds()
            output = self.output.reshape(batch, self.call.query.shape[1], -1, self.shape[3])
            # A budget that heads share is met only together with what the dense ones turned out to be.
            met = self.targets()[0] | self.dense.unsqueeze(-1) | (not self.config.certified)
            if ranks.any(not bool(met.all())):
                output = dense_layer(self)
        if self.whole_layer:
            self._close_bounds()
        error = audit_step(self) if self.config.audit else torch.full_like(self.bound, math.nan)
        self._keep_hot()
        self._note(lambda: step_record(self, error))
        return output

    def _note(self, record: Callable[[], StepRecord]) -> None:
        """Hand the step's record to the cache."""
        recorded, _ = stages.timed(lambda: self.layer.cache.recorder.add(record()))
        if stages.asked():
            stages.add(stages.RECORD, recorded)
            stages.add(stages.AROUND, -recorded)

    def _close_bounds(self) -> None:
        """Norms and bounds of what is returned; rows served densely have an expected error of 0."""
        here = self.dense.unsqueeze(-1)
        self.norm = torch.linalg.vector_norm(self.output.double(), dim=-1)
        self.bound = torch.where(here, dense_bound(self, self.norm), self.bound)
        self.expected = torch.where(here, torch.zeros_like(self.expected), self.expected)

    def _keep_hot(self) -> None:
        """Note which blocks were promoted: their originals are fetched into the hot slots before the next step."""
        layer = self.layer
        if layer.hot.slots == 0 or self.whole_layer:
            return
        self.details()
        full = (self.key_level == 2) | (self.value_level == 2)
        if layer.refills:
            mass = self.mass.amax(2).to(torch.float32)
            counts = full & ((self.hot_level < 2) | (mass > 1e-3))
            layer.promoted = torch.where(counts, mass.clamp_min(torch.finfo(mass.dtype).tiny), 0.0)
            return
        step = layer.cache.recorder.step
        hot_index: Index = tuple(torch.nonzero(full & (self.hot_level == 2) & (self.mass.amax(2) > 1e-3), as_tuple=True))  # type: ignore[assignment]
        layer.hot.touch(hot_index, step)
        layer.wanted = tuple(torch.nonzero(full & (self.hot_level < 2), as_tuple=True))  # type: ignore[assignment]
