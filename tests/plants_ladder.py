"""Planted bugs in the ladder: what is promoted, what is returned, what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from plants_base import Apply, Detect, Patch, arguments, by_oracle, by_record, instead, kind, results
from plants_kernel import under_autocast
from torch import Tensor

from hf_certkv import audit, ladder
from hf_certkv import decode as decode_module
from hf_certkv import dense as dense_module
from hf_certkv.decode import DecodeStep
from hf_certkv.handle import KEYS
from hf_certkv.kernels import reference
from hf_certkv.layers import CertifiedLayer
from hf_certkv.verify.cases import Case, judge, run, tensors
from hf_certkv.verify.worst_cases import (
    above,
    equal_values,
    late_weight,
    two_readers,
    unlike_heads,
    vanishing,
)


def promoting(**changes: Any) -> Case:
    """Values have to be fetched."""
    return equal_values(**{"atol": 0.0, "rtol": 1e-3, "refine": "off", **changes})


def promoting_unlike() -> Case:
    """The same, with heads that have nothing in common."""
    return above(unlike_heads(), atol=0.0, rtol=1e-3, refine="off")


def dense_heads(dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    """A tolerance that nothing but the dense rung meets, head by head."""
    settings = {"rtol": 1e-7, "dense_layer_share": 1.0, **changes}
    return Case(*tensors("normal", dtype, 90, 8, 8, 1, 1, 3), settings=settings)


def dense_layer() -> Case:
    """No tolerance at all: the whole layer is dense."""
    return Case(*tensors("normal", torch.float32, 90, 8, 8, 1, 1, 3), settings={"rtol": 0.0})


def masked_dense() -> Case:
    """Heads with masks of their own, all dense."""
    return above(two_readers(), atol=0.0, rtol=1e-9)


def sharing(rtol: float = 0.02) -> Case:
    """Heads of unlike size that share a tolerance which they do not meet as they are."""
    return above(unlike_heads(), atol=0.0, rtol=rtol, scope="layer", refine="off")


def lending() -> Case:
    """One head's fast path is large and nothing but error, and it goes dense; its output is 0 then, and lends no room."""
    case = vanishing(rtol=0.05, scope="layer", dense_head_share=0.0, dense_layer_share=1.0)
    values = case.values.clone()
    values[:, 0] *= 1000
    values[:, 1] = equal_values().values[:, 1]
    return replace(case, values=values)


def a_hair_above() -> Detect:
    """A check: tolerances that are less than a bound by so little that float64 takes them for enough."""

    def detect() -> list[str]:
        found, most = [], 3
        _, record, _ = run(equal_values(refine="off"))
        bound, norm = float(record.bound[0, 0, 0]), float(record.norm[0, 0, 0])
        for place in range(40):
            rtol = 1e-3 * (1 + place / 40) * bound / norm
            atol = bound - rtol * norm
            if most and atol + rtol * norm >= bound and Fraction(atol) + Fraction(rtol) * Fraction(norm) < Fraction(bound):
                most -= 1
                case = equal_values(refine="off", rtol=rtol, atol=atol)
                output, record, cache = run(case)
                found += judge(case, output, record, cache.settings).breaches
        return found

    return detect


def originals_never_fetched(patch: Patch) -> None:
    """Blocks counted as promoted whose originals were never read."""
    original = DecodeStep._load
    patch.setattr(
        DecodeStep,
        "_load",
        lambda self, kind, index, level, before: original(self, kind, index, torch.zeros_like(level), before),
    )


def one_kind_fetched(patch: Patch) -> None:
    """Keys raised and read, values raised and not read."""
    original = DecodeStep._load
    patch.setattr(
        DecodeStep,
        "_load",
        lambda self, kind, index, level, before: original(
            self, kind, index, level if kind == KEYS else torch.zeros_like(level), before
        ),
    )


def planes_are_exact(number: Tensor, step: DecodeStep, column: int) -> Tensor:
    """Blocks at level 1 with the numbers of originals."""
    return torch.where(step.value_level.unsqueeze(2) == 1, torch.zeros_like(number), number)


def first_bound(step: DecodeStep, error: Tensor) -> tuple[Any, ...]:
    """The bound of the fast path recorded with what is returned after promotions."""
    step.bound = step.candidate
    return step, error


def certified_before_redone(patch: Patch) -> None:
    """The certificate of the new levels beside the output of the old ones."""
    original = DecodeStep.raise_to

    def raise_to(self: DecodeStep, key_level: Tensor, value_level: Tensor) -> bool:
        before = self.output
        raised = original(self, key_level, value_level)
        self.output = before
        return raised

    patch.setattr(DecodeStep, "raise_to", raise_to)


def last_round_not_looked_at(patch: Patch) -> None:
    """What was promoted is taken to have been enough."""
    original = DecodeStep._promote

    def promote(self: DecodeStep, failing: Tensor, target: Tensor) -> bool:
        raised = original(self, failing, target)
        self.targets = lambda: (torch.ones_like(failing), target)  # type: ignore[method-assign]
        return raised

    patch.setattr(DecodeStep, "_promote", promote)


def norm_of_the_candidate(patch: Patch) -> None:
    """The tolerance from the norm that the fast path had."""
    original = DecodeStep.targets

    def targets(self: DecodeStep) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "first_norm"):
            self.first_norm = self.norm  # type: ignore[attr-defined]
        self.norm = self.first_norm  # type: ignore[attr-defined]
        return original(self)

    patch.setattr(DecodeStep, "targets", targets)


def norm_before_dense(patch: Patch) -> None:
    """Heads that share a tolerance: looked at with the norms from before some went dense."""
    original = DecodeStep._close_bounds

    def close(self: DecodeStep) -> None:
        before = self.norm
        original(self)
        if not self.whole_layer:
            self.norm = before

    patch.setattr(DecodeStep, "_close_bounds", close)


def other_heads_originals(patch: Patch) -> None:
    original = CertifiedLayer.unit_originals
    patch.setattr(
        CertifiedLayer, "unit_originals", lambda self, kind, row, head: original(self, kind, row, self.heads - 1 - head)
    )


def dense_bound_of_float32(patch: Patch) -> None:
    original = decode_module.dense_bound

    def dense_bound(step: DecodeStep, norm: Tensor) -> Tensor:
        output, step.output = step.output, step.output.float()
        bound = original(step, norm)
        step.output = output
        return bound

    patch.setattr(decode_module, "dense_bound", dense_bound)


def first_heads_mask(patch: Patch) -> None:
    """Every dense head with the mask of the first one."""
    original = decode_module.dense_unit

    def dense_unit(step: DecodeStep, row: int, head: int) -> None:
        call = step.call
        step.call = replace(call, mask=call.mask[:, :1])  # type: ignore[index]
        original(step, row, head)
        step.call = call

    patch.setattr(decode_module, "dense_unit", dense_unit)


def in_half(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Values in bfloat16."""
    return (query, keys, values.bfloat16(), *rest)


plant = kind("ladder")


def budget(change: Callable[..., Tensor]) -> Apply:
    """Another tolerance: `change(tolerance, rtol, atol, norm)`."""
    return results(ladder, "head_budget", change)


LADDER = [
    plant(
        "promoted but not fetched",
        "blocks counted as originals that are codes still",
        originals_never_fetched,
        by_oracle(promoting),
    ),
    plant(
        "promoted keys fetched, values not",
        "one kind of original read where both were raised",
        one_kind_fetched,
        by_oracle(promoting),
    ),
    plant(
        "promoted but not computed again",
        "the sums of a promoted block stay as they were",
        instead(reference, "redo_blocks", lambda *given: None),
        by_oracle(promoting),
    ),
    plant(
        "promoted under another head",
        "a promoted block's sums in the place of another KV head's",
        arguments(
            reference, "redo_blocks", lambda segments, index, *rest: (segments, (index[0], 1 - index[1], index[2]), *rest)
        ),
        by_oracle(promoting_unlike),
    ),
    plant(
        "the plane counted as exact",
        "blocks at level 1 with the numbers of originals",
        results(DecodeStep, "_value_number", planes_are_exact),
        by_oracle(equal_values, atol=0.05, rtol=0.0),
    ),
    plant(
        "certificate of the new levels, output of the old",
        "the output is not combined again after promotion",
        certified_before_redone,
        by_oracle(promoting),
    ),
    plant(
        "bound of the first pass",
        "what is recorded is the candidate's bound",
        arguments(decode_module, "step_record", first_bound),
        by_oracle(promoting),
    ),
    plant(
        "met before the certificate says so",
        "promotions taken to have been enough",
        last_round_not_looked_at,
        by_oracle(late_weight),
    ),
    plant(
        "tolerance from the candidate's norm",
        "rtol times the norm that the fast path had",
        norm_of_the_candidate,
        by_oracle(vanishing, refine="off"),
    ),
    plant(
        "tolerance not rounded down",
        "atol + rtol * norm as float64 gives it",
        budget(lambda given, rtol, atol, norm: atol + rtol * norm),
        a_hair_above(),
    ),
    plant(
        "tolerance by channels",
        "rtol times the output's L1 norm, or as much as that can be",
        budget(lambda given, rtol, atol, norm: atol + rtol * norm * 4),
        by_oracle(promoting, rtol=0.02),
    ),
    plant(
        "a shared tolerance for every head",
        "each head may use what the layer has",
        results(ladder, "water_level", lambda level, bound, budget: budget),
        by_oracle(sharing),
    ),
    plant(
        "water level too high",
        "the level of the last head for all",
        results(ladder, "water_level", lambda level, bound, budget: 2 * level),
        by_oracle(sharing),
    ),
    plant(
        "shared tolerance not looked at again",
        "norms from before some heads went dense",
        norm_before_dense,
        by_oracle(lending),
    ),
    plant(
        "norm of another head",
        "norms recorded in the wrong order",
        results(decode_module, "step_record", lambda record, *given: replace(record, norm=record.norm[:, ::-1])),
        by_record(unlike_heads),
    ),
    plant(
        "bound of another head",
        "bounds recorded in the wrong order",
        results(decode_module, "step_record", lambda record, *given: replace(record, bound=record.bound[:, ::-1])),
        by_oracle(unlike_heads),
    ),
    plant(
        "dense in the record only",
        "the dense rung is noted and the candidate returned",
        instead(decode_module, "dense_unit", lambda step, row, head: None),
        by_oracle(dense_heads),
    ),
    plant(
        "dense on another head's originals",
        "KV heads mixed up in the dense rung",
        other_heads_originals,
        by_oracle(dense_heads),
    ),
    plant(
        "dense with another head's mask",
        "one head's mask for every dense head",
        first_heads_mask,
        by_oracle(masked_dense),
    ),
    plant(
        "dense bound without the model's dtype",
        "16-bit outputs of the dense rung with the bound of float32 ones",
        dense_bound_of_float32,
        by_oracle(dense_heads, torch.bfloat16),
    ),
    plant(
        "dense bound under autocast",
        "a finite bound for a dense call that the process computes in bfloat16",
        instead(dense_module, "ambient_is_full", lambda device_type, dtype: True),
        under_autocast(dense_heads),
    ),
    plant(
        "audit finds nothing",
        "a true error of 0 recorded",
        results(decode_module, "audit_step", lambda error, *given: torch.zeros_like(error)),
        by_record(equal_values, audit=True),
    ),
    plant(
        "audit of rounded values",
        "the true error of values in bfloat16, not of the originals",
        arguments(audit, "exact_output", in_half),
        by_record(equal_values, audit=True),
    ),
]
