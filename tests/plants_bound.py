"""Planted bugs in the inequalities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from plants_base import Apply, Patch, arguments, by_oracle, by_proof, instead, kind, results
from torch import Tensor

from hf_certkv import bounds, inputs
from hf_certkv.decode import DecodeStep
from hf_certkv.kernels import reference
from hf_certkv.verify.cases import Case, tensors
from hf_certkv.verify.worst_cases import (
    below_normal,
    equal_values,
    exact_everything,
    far_centre,
    half_sunk,
    heavy_tail,
    hidden_by_rounding,
    long_dot,
    moment_overflows,
    negative_scale,
    one_value,
    read_at_the_output,
    shifted_scores,
    sums_overflow,
    two_blocks,
    unlike_blocks,
)


def beyond_float32() -> Case:
    """Random bits: sums overflow, bounds are not finite."""
    return Case(*tensors("raw", torch.float32, 81, 8, 8, 1, 1, 3), settings={"rtol": 0.5})


def scaled(name: str, factor: float) -> Apply:
    """One inequality that returns a share of what it should."""
    return results(bounds, name, lambda result, *given: result * factor)


def without_first_block(parts: Tensor, *given: Any) -> Tensor:
    """A sum over blocks that leaves one out."""
    fewer = parts.clone()
    fewer[..., 0] = 0
    return fewer


def in_total(place: int, change: Any) -> Apply:
    """One argument of the whole bound replaced."""
    return arguments(bounds, "total", lambda *given: (*given[:place], change(given), *given[place + 1 :]))


def slope_of_one(growth: tuple[Tensor, Tensor], shift: Tensor) -> tuple[Tensor, Tensor]:
    """The L2 form of the key error to first order."""
    return growth[0], torch.ones_like(shift)


def first_order(growth: tuple[Tensor, Tensor], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Delta where exp(Delta) - 1 is needed."""
    return shift, growth[1]


def small_centre(patch: Patch) -> None:
    """The value error left out of the radius around the output: what is subtracted from the radius is what it adds."""
    value_error, mean_radius = bounds.value_error, bounds.mean_radius
    last: list[Tensor] = []

    def remember(*given: Any) -> Tensor:
        last.append(value_error(*given))
        return last[-1]

    def nearer(moment: Tensor, residual: Tensor, apart: Tensor, reach: Tensor, terms: int) -> Tensor:
        value = last[-1].sum(dim=-1, keepdim=True)
        return mean_radius(moment, residual, apart - value, reach - value, terms)

    patch.setattr(bounds, "value_error", remember)
    patch.setattr(bounds, "mean_radius", nearer)


def blocks_only(stored: Tensor, exact: Tensor) -> Tensor:
    """The largest norm of the blocks: exact tokens forgotten."""
    return stored.amax(dim=-1)


def finer_numbers(patch: Patch) -> None:
    original = DecodeStep._shift
    patch.setattr(DecodeStep, "_shift", lambda self, level: original(self, 1))


def opposite(given: tuple[Any, ...]) -> Tensor:
    """Blocks taken for originals where they are codes, and the other way round."""
    return ~given[6]


plant = kind("bound")


BOUND = [
    plant(
        "a block forgotten in the value error",
        "the sum of value errors starts at the second block",
        results(bounds, "value_error", without_first_block),
        by_oracle(equal_values),
    ),
    plant(
        "a block forgotten in the key error",
        "the sum of key errors starts at the second block",
        results(bounds, "key_error", without_first_block),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "numbers of the block before",
        "a block's score errors by the numbers of its neighbour",
        results(DecodeStep, "_shift", lambda shifts, *given: tuple(part.roll(1, dims=-1) for part in shifts)),
        by_oracle(unlike_blocks),
    ),
    plant("no rounding term", "E_fp is 0", scaled("rounding_error", 0.0), by_oracle(exact_everything)),
    plant("no output rounding", "E_out is 0", scaled("output_rounding", 0.0), by_oracle(exact_everything, torch.bfloat16)),
    plant(
        "one channel in the output's rounding",
        "sqrt(d) dropped from what subnormal outputs lose",
        arguments(bounds, "output_rounding", lambda norm, channels, dtype: (norm, 1, dtype)),
        by_oracle(hidden_by_rounding),
    ),
    plant("gamma dropped", "chains of additions cost nothing", instead(bounds, "gamma", lambda n: 0.0), by_oracle(long_dot)),
    plant("underflow forgotten", "nothing is lost below 2^-126", instead(bounds, "TINY", 0.0), by_oracle(below_normal)),
    plant(
        "scores taken for exact",
        "the rounding of scores is left out of the slack of weights",
        scaled("score_rounding", 0.0),
        by_oracle(long_dot),
    ),
    plant(
        "weights taken for exact",
        "2V tanh(lambda/2) dropped from E_fp",
        arguments(bounds, "rounding_error", lambda slack, *rest: (torch.zeros_like(slack), *rest)),
        by_oracle(long_dot),
    ),
    plant(
        "masses not inflated",
        "computed masses taken for real ones, in the sums and in D_min",
        results(bounds, "mass_slack", lambda slack, *given: torch.ones_like(slack)),
        by_proof(long_dot, 2.0**18, 1.0),
    ),
    plant(
        "D_min without slack",
        "the least normaliser of masses as computed",
        arguments(bounds, "least_mass", lambda mass, exact, shift, slack: (mass, exact, shift, torch.ones_like(slack))),
        by_proof(long_dot, 2.0**18, 1.0),
    ),
    plant(
        "D_min is 1",
        "the division by the normaliser left out",
        results(bounds, "least_mass", lambda held, *given: torch.ones_like(held)),
        by_oracle(two_blocks, 2.5, (1.0, 0.0), -3.5),
    ),
    plant(
        "D_min from scores read too low",
        "exp(+Delta) where exp(-Delta) is needed",
        arguments(bounds, "least_mass", lambda mass, exact, shift, slack: (mass, exact, -shift, slack)),
        by_oracle(two_blocks, 2.5, (1.0, 0.0), -3.5),
    ),
    plant(
        "the sink counted twice",
        "the sink logit's mass added to D_min twice",
        results(reference, "combine", lambda made, *given: replace(made, sink_mass=2 * made.sink_mass)),
        by_oracle(half_sunk),
    ),
    plant(
        "score errors to first order",
        "Delta for exp(Delta) - 1, in both forms",
        results(bounds, "growth", lambda made, shift: (shift, torch.ones_like(shift))),
        by_oracle(shifted_scores, 1.0, 0.01),
    ),
    plant(
        "exp(Delta) - 1 to first order",
        "Delta for exp(Delta) - 1 in the Hoelder form",
        results(bounds, "growth", first_order),
        by_oracle(shifted_scores, 1.0, 0.01),
    ),
    plant(
        "no growth in the L2 form",
        "the factor (exp(Delta) - 1)/Delta taken for 1",
        results(bounds, "growth", slope_of_one),
        by_oracle(shifted_scores, 1.0, 0.01),
    ),
    plant(
        "score shift halved", "Delta is half of what it is", scaled("score_shift", 0.5), by_oracle(shifted_scores, 0.1, 0.01)
    ),
    plant(
        "sign of the scale",
        "Delta multiplied by the scale and not by its size",
        results(bounds, "score_shift", lambda shift, scaling, *given: shift if scaling > 0 else -shift),
        by_oracle(negative_scale),
    ),
    plant("numbers of a finer level", "kappa of level 1 at level 0", finer_numbers, by_oracle(shifted_scores, 0.1, 0.01)),
    plant(
        "levels mistaken",
        "blocks counted as originals where they are codes",
        in_total(6, opposite),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "radius without the centre",
        "the norm of the output left out of the radius around it",
        in_total(15, lambda given: torch.zeros_like(given[15])),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "radius without the value error",
        "the centre taken for the output, although values as read move it",
        small_centre,
        by_proof(far_centre),
    ),
    plant(
        "radius halved",
        "half the mean distance from the output",
        scaled("mean_radius", 0.5),
        by_oracle(shifted_scores, 0.1, 0.01, centre=4.0),
    ),
    plant(
        "radius without the residual",
        "values as read taken for the originals in the radius",
        arguments(bounds, "mean_radius", lambda moment, residual, *rest: (moment, residual * 0, *rest)),
        by_oracle(read_at_the_output, 1.0, 0.05),
    ),
    plant(
        "overflow of a moment",
        "a moment of minus infinity taken for 0",
        arguments(bounds, "mean_radius", lambda moment, *rest: (moment.clamp_min(0.0), *rest)),
        by_oracle(moment_overflows),
    ),
    plant(
        "cap with half the radius",
        "V for 2V in the cap by total variation",
        arguments(bounds, "key_error_cap", lambda mass, shift, radius: (mass, shift, radius / 2)),
        by_oracle(two_blocks, 40.0, (1.0, -1.0), 20.0),
    ),
    plant(
        "cap by tanh(Delta/4)",
        "half the score error in the cap",
        arguments(bounds, "key_error_cap", lambda mass, shift, radius: (mass, shift / 2, radius)),
        by_oracle(two_blocks, 2.5, (1.0, -1.0), 1.25),
    ),
    plant(
        "norms of exact tokens forgotten",
        "V and K taken over the blocks only",
        instead(inputs, "_largest", blocks_only),
        by_oracle(heavy_tail),
    ),
    plant(
        "root of squared masses of equal weights",
        "pi = rho / sqrt(n) assumed",
        in_total(2, lambda given: given[1] / 4),
        by_oracle(one_value),
    ),
    plant(
        "NaN passes",
        "`not (B > budget)` for `B <= budget`",
        instead(bounds, "meets", lambda bound, budget: ~(bound > budget)),
        by_oracle(beyond_float32),
    ),
    plant(
        "infinity passes",
        "`B <= budget` alone: an infinite bound fits into an infinite budget",
        instead(bounds, "meets", lambda bound, budget: bound <= budget),
        by_oracle(sums_overflow),
    ),
]
