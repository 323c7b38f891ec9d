"""The inequalities of the certificate, one a function; each cites its section of docs/certificate.md.

Pure: tensors in, float64 tensors out. Axes: `[..., rows, blocks]` for what depends on the query row and the block,
`[..., rows]` for what depends on the row, `[..., 1, blocks]` for what is stored per block. Every result is an upper bound
(`least_mass`: a lower one) and is widened by `OUTWARD` against the roundings of its own float64 evaluation. A NaN or an
infinity in any input that matters comes out as NaN or infinity, which `meets` never accepts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
OUTWARD = 1.0 + 2.0**-30  # float64 evaluation: sums of up to 2^20 terms lose far less than 2^-30
EXP_ERROR = 2.0**-22  # relative error of the backend's float32 exp: two units in the last place
TANH_ERROR = 2.0**-21  # absolute error of the backend's float32 tanh, whose result is at most 1
SCORE_SPAN = 104.0  # below exp(-104) float32 weights are zero
TINY = 2.0**-126  # smallest normal float32: a product or weight may be flushed below it
OVERFLOW = 2.0**126  # no partial sum of products below this overflows float32
MASS_FLOOR = 1e-300  # no block that may be attended weighs exactly nothing
STEP_FLOOR = 2.0**-56  # what weights and products that underflow may hide of a block's mean step

OUTPUT_ROUNDOFF = {torch.float32: (0.0, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, TINY)}


def gamma(n: float) -> float:
    """gamma_n = n*u / (1 - n*u): relative error of a chain of n float32 roundings   [section 5]."""
    product = n * UNIT_ROUNDOFF
    return product / (1 - product) if product < 1 else math.inf


def score_shift(scaling: float, kappa: Tensor, query_l1: Tensor, epsilon: Tensor, query_l2: Tensor) -> Tensor:
    """How far any single score of a block is from exact: Delta_b   [section 3].

    Args:
        scaling: the softmax scale; kappa, epsilon: `[..., 1, blocks]`, what is stored per block.
        query_l1: `[..., rows, blocks]`, sum over channels of |q_c| * S_c; query_l2: the L2 norm of q*S.
    """
    return abs(scaling) * torch.minimum(kappa * query_l1, epsilon * query_l2) * OUTWARD


def score_shift_l2(scaling: float, spectral: Tensor, query_l2: Tensor) -> Tensor:
    """L2 norm of a block's score errors: Lambda_b   [section 3]. Shapes as in `score_shift`."""
    return abs(scaling) * spectral * query_l2 * OUTWARD


def growth(shift: Tensor) -> tuple[Tensor, Tensor]:
    """`exp(Delta) - 1` and `(exp(Delta) - 1) / Delta` (1 at Delta = 0), both rounded up   [section 3]."""
    rise = torch.expm1(shift) * OUTWARD
    slope = torch.where(shift > 0, rise / shift.clamp_min(1e-300), torch.ones_like(shift)) * OUTWARD
    return rise, torch.maximum(slope, 1 + shift / 2)


def least_mass(mass: Tensor, exact_mass: Tensor, shift: Tensor, slack: Tensor) -> Tensor:
    """A lower bound of D = sum_t p_t * w_t: what the weights add up to after the worst score errors   [section 3].

    Args:
        mass: rho_b `[..., rows, blocks]` of the blocks with approximate keys (0 elsewhere), as computed.
        exact_mass: `[..., rows]`, what all other tokens weigh, as computed; shift: Delta_b.
        slack: `[..., rows]`, the factor by which a computed weight may differ from the real one, at least 1.
    """
    return (exact_mass + (mass * torch.exp(-shift)).sum(dim=-1)) / (slack * OUTWARD)


def value_error(mass_step: Tensor, root_square_step: Tensor, eta: Tensor, spectral: Tensor) -> Tensor:
    """E_val per block: min(eta_b * sum p sigma, S_V,b * (sum p^2 sigma^2)^(1/2))   [section 4]. Both sums already inflated."""
    return torch.minimum(mass_step * eta, root_square_step * spectral) * OUTWARD


def moment_rounding(reach: Tensor, terms: int) -> Tensor:
    """What the computed mean of squared distances may be off by, if that is by the same weights as its sums   [section 5]."""
    # The three sums of the moment cancel; each is off by no more than gamma of (||v_hat|| + ||o||)^2.
    return 1.01 * gamma(terms + 8) * reach.square() + 8 * TINY * terms * terms * (1 + reach)


def square_moment_bound(
    moment: Tensor,
    powers: tuple[Tensor, Tensor, Tensor, Tensor],
    square_norms: Tensor,
    inner: Tensor,
    size: Tensor,
    lengths: Tensor,
    reach: Tensor,
    terms: int,
) -> Tensor:
    """What `mean_radius` may take for the mean by squared weights where sum w^2 v is not known: at least M'_b   [section 3].

    The twin of what kernels/cpu_certify.py computes; nothing else calls it.

    Args:
        moment: `[..., rows, blocks]`, the mean by weights, as computed; powers: sums of w, w^2, w^3, w^4, of weights up to 1.
        square_norms: sum of w^2 ||v_hat||^2; inner: o . sum of w v_hat; size: `[..., rows, 1]`, ||o||^2.
        lengths: `[..., 1, blocks]`, sum of ||v_hat||^2 over the block; reach, terms: as in `mean_radius`.
    """
    total, square, cube, fourth = powers
    off = moment_rounding(reach, terms)
    over = square.clamp_min(TINY)
    spread = total / over * (1 + 4 * gamma(terms + 8))
    # No weight is above 1.
    by_weight = (moment.clamp_min(0.0) + off) * spread
    # w^2 = a w + (w^2 - a w): the first by what the block adds to the output, the rest by Cauchy-Schwarz.
    a = cube / over
    rest = (fourth - cube * a).clamp_min(0.0) + 4.04 * gamma(terms + 16) * fourth + 1e-30
    read = lengths * (1 + 4 * gamma(2 * terms)) + terms * terms * TINY
    fitted = (square_norms - 2 * a * inner + size * square + 2 * torch.sqrt(rest * size * read) * OUTWARD) / over
    fitted = fitted.clamp_min(0.0) + off * (1 + a * spread)
    # `fitted` may be NaN, where fourth powers are not known; a moment that overflowed says nothing of either.
    best = torch.where(torch.isfinite(fitted) & (fitted < by_weight), fitted, by_weight) - off
    return torch.where(torch.isfinite(moment), best, torch.full_like(best, math.inf))


def mean_radius(moment: Tensor, residual: Tensor, apart: Tensor, reach: Tensor, terms: int) -> Tensor:
    """What stands for every ||v_t - O_bar|| of a block in a mean over its tokens: R_b or R'_b   [section 3].

    Args:
        moment: `[..., rows, blocks]`, the mean of ||v_hat_t - o||^2 as computed, by weight or by squared weight.
        residual: eta_b times the mean step by the same weights; apart: `[..., rows, 1]`, at least ||o - O_bar||.
        reach: at least every ||v_t - O_bar||, and ||v_hat_t|| + ||o||; terms: tokens of a block and channels together.
    """
    off = moment_rounding(reach, terms)
    read = 2 * UNIT_ROUNDOFF * reach + TINY * terms  # the kernel's values are rounded to float32
    mean = (torch.sqrt(moment.clamp_min(0.0) + off) + read + residual + apart) * OUTWARD
    # Where a sum of the moment overflowed, whichever way, it says nothing.
    return torch.where(torch.isfinite(moment) & (mean < reach), mean, reach)


def key_error(mass: Tensor, root_square_mass: Tensor, shift: Tensor, shift_l2: Tensor) -> Tensor:
    """E_key per block, before the division by D_min: min(R_b rho_b (e^D - 1), R'_b pi_b Lambda_b (e^D - 1)/D)   [section 3].

    Args: mass, root_square_mass: inflated rho_b and pi_b, times the radius of each: what `mean_radius` gives.
    """
    rise, slope = growth(shift)
    return torch.minimum(mass * rise, root_square_mass * shift_l2 * slope) * OUTWARD


def key_error_cap(mass: Tensor, shift: Tensor, value_radius: Tensor) -> Tensor:
    """E_key by total variation, the better one when scores are far off: `[..., rows]`   [section 3].

    Args: mass: inflated rho_b of the blocks with approximate keys; shift: their Delta_b (0 elsewhere);
        value_radius: `[..., rows]`, max ||v_t||_2 over every token that may be attended.
    """
    worst = shift.amax(dim=-1)
    share = mass.sum(dim=-1).clamp(max=1.0)
    held = 1 - share * -torch.expm1(-worst)
    moved = torch.where(held > 0, share * torch.expm1(worst) / held.clamp_min(1e-300), torch.full_like(held, math.inf))
    variation = torch.minimum(torch.tanh(worst / 2) * OUTWARD, moved * OUTWARD).clamp(max=1.0)
    return 2 * value_radius * variation * OUTWARD


def score_rounding(
    scaling: float,
    query_norm: Tensor,
    key_norm: Tensor,
    channels: int,
    bias: Tensor | float,
    softcap: float | None,
    coded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """How far a computed score is from the real one of the same keys: epsilon_s   [section 5].

    Args:
        query_norm, key_norm: `[..., rows]`, L2 norms, the keys' a maximum; sum_c |q_c||k_c| is at most their product.
        bias: the largest finite magnitude added to a score (an additive mask); softcap: its c, or None.
        coded: where a kernel multiplies codes as integers: what it says of those scores `[..., rows]`, and the largest norm of
            the keys that it multiplies in float32.
    """
    size = abs(scaling) * query_norm * key_norm
    # Four roundings beyond the products and sums: scaling the query, dequantising, and two to spare.
    error = gamma(channels + 4) * size
    if coded is not None:
        said, exact_norm = coded
        error = torch.maximum(gamma(channels + 4) * (abs(scaling) * query_norm * exact_norm), said)
        error = error + channels * 2.0**-100 * (1 + abs(scaling))  # a factor that is flushed, times a code or an offset
    # Underflow may lose up to 2^-126 of each product; of the scale itself, times query and key; of a channel of the query
    # before and after it is scaled, times the key; of a channel of the key, times the scaled query. Twice: where subnormal
    # numbers are flushed, what was measured of the originals lacks as much.
    scale = query_norm * key_norm if abs(scaling) < TINY else 0.0
    lost = channels + scale + channels**0.5 * ((1 + abs(scaling)) * key_norm + abs(scaling) * query_norm)
    error = error + 2 * TINY * lost
    # Neither the scale nor a channel of the scaled query may overflow.
    fits = (abs(scaling) * query_norm < OVERFLOW) & (abs(scaling) < OVERFLOW)
    error = torch.where(fits, error, torch.full_like(error, math.inf))
    if softcap is not None:
        error = error + abs(softcap) * TANH_ERROR + gamma(4) * size
    return (error + 2 * UNIT_ROUNDOFF * (size + bias) * 1.01) * OUTWARD


def weight_slack(score_error: Tensor, rescalings: int) -> Tensor:
    """lambda: the logarithm of the factor by which a computed weight may be off, before normalisation   [section 5]."""
    return score_error + UNIT_ROUNDOFF * SCORE_SPAN + (rescalings + 1) * EXP_ERROR * 1.01 + 2 * rescalings * UNIT_ROUNDOFF


def mass_slack(slack: Tensor, chain: int) -> Tensor:
    """Factor >= 1 between a computed and a real normalised weight: e^(2 lambda) (1 + gamma)   [section 5]."""
    # Capped, so that a weight of exactly 0 times it is 0 and not NaN; nothing near the cap is ever certified.
    return (torch.exp(2 * slack) * (1 + gamma(2 * chain + 8)) * OUTWARD).clamp(max=1e300)


def rounding_error(
    slack: Tensor,
    value_radius: Tensor,
    chain: int,
    rescalings: int,
    tokens: int,
    channels: int,
    weight_cast: float = 0.0,
) -> Tensor:
    """E_fp: what float32 evaluation adds to the output: `[..., rows]`   [section 5].

    Args:
        slack: lambda; value_radius: max over tokens of ||v_t|| and of ||v_hat_t||; chain: the longest chain of additions;
        tokens: attended tokens; weight_cast: unit roundoff of the type that weights are cast to before P*V, or 0.
    """
    flushed = 4 * tokens * TINY * (value_radius + channels**0.5)  # weights, products, sums, originals below 2^-126, if flushed
    moved = 2 * value_radius * torch.tanh(slack / 2) + gamma(2 * (chain + rescalings + 1) + 1) * value_radius
    return (moved + weight_cast * 1.01 * value_radius + flushed) * OUTWARD


def step_slip(block: int, group: int, lanes: int = 16) -> float:
    """What codes multiplied as integers add to a block's sum of values, over its sum of weights times steps   [section 5].

    Args: block: tokens; group: channels of a value scale; lanes: chains that a sum over tokens is made of.
    """
    return math.sqrt(group) * UNIT_ROUNDOFF * (16 * (block / lanes + 8) + 64) * (1 + 2.0**-10)


def output_rounding(output_norm: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """E_out: what rounding the output to the model's type adds: `[..., rows]`   [section 5]."""
    relative, absolute = OUTPUT_ROUNDOFF[dtype]
    return (relative * output_norm + channels**0.5 * absolute) * OUTWARD


def meets(bound: Tensor, budget: Tensor) -> Tensor:
    """True only where the bound is a finite number, not negative, within the budget: NaN and infinity never are [section 1]."""
    return torch.isfinite(bound) & (bound >= 0) & (bound <= budget)


@dataclass(frozen=True)
class Certificate:
    """One evaluation of the bound. All float64; `[..., rows]`, the two contributions `[..., rows, blocks]`."""

    total: Tensor
    fixed: Tensor
    key_total: Tensor
    value_total: Tensor
    key_parts: Tensor
    value_parts: Tensor


def total(
    attended: Tensor,
    mass: Tensor,
    root_square_mass: Tensor,
    exact_mass: Tensor,
    shift: Tensor,
    shift_l2: Tensor,
    approximate_keys: Tensor,
    eta: Tensor,
    value_spectral: Tensor,
    step: Tensor,
    root_square_step: Tensor,
    moment: Tensor,
    square_moment: Tensor,
    block_radius: Tensor,
    value_radius: Tensor,
    output_norm: Tensor,
    slack: Tensor,
    rounding: Tensor,
    output_error: Tensor,
    chain: int,
    terms: int,
) -> Certificate:
    """B = E_key + E_val + E_fp + E_out   [sections 3 to 5].

    Args:
        attended: bool `[..., rows, blocks]`, False where the mask hides the whole block from the row.
        mass, root_square_mass: rho_b and pi_b as computed `[..., rows, blocks]`.
        exact_mass: `[..., rows]`, the weight of every token outside the blocks.
        shift, shift_l2: Delta_b and Lambda_b at each block's level; approximate_keys: bool, False where keys are originals.
        eta, value_spectral: `[..., 1, blocks]` at each block's level, 0 where values are originals.
        step, root_square_step, moment, square_moment: `[..., rows, blocks]`, a block's means as the kernel gives them.
        block_radius: nu_b `[..., 1, blocks]`; value_radius: max nu over everything attended `[..., rows]`.
        output_norm: ||O||_2 of the returned output; slack: lambda; rounding: E_fp; output_error: E_out.
        chain: the longest chain of additions, for the weights' own rounding; terms: as in `mean_radius`.
    """
    inflate = mass_slack(slack, chain)
    up = inflate.unsqueeze(-1)
    # A weight that underflowed to 0 may stand for one that a large score error lifts again: it never counts as 0.
    floor = torch.full_like(mass, MASS_FLOOR)
    mass_up = torch.maximum(mass * up, floor)
    root_up = torch.maximum(root_square_mass * up, floor)
    step, root_square_step = step + STEP_FLOOR, root_square_step + STEP_FLOOR
    parts = value_error(mass_up * step, root_up * root_square_step, eta, value_spectral)
    values = torch.where(attended, parts, torch.zeros_like(mass))
    value_total = values.sum(dim=-1) * OUTWARD

    # ||O_bar|| is within E_val + E_fp + E_out of ||O||: all three, not only the first, enter the radius.
    fixed = rounding + output_error
    centre = (output_norm + value_total + fixed).unsqueeze(-1)
    active = approximate_keys & attended
    zeros = torch.zeros_like(mass)
    shift = torch.where(active, shift.clamp_min(0.0), zeros)
    reach, apart = block_radius + centre, (value_total + rounding).unsqueeze(-1)
    near = mean_radius(moment, eta * step, apart, reach, terms)
    square_near = mean_radius(square_moment, eta * root_square_step, apart, reach, terms)
    parts = torch.where(active, key_error(mass_up * near, root_up * square_near, shift, shift_l2), zeros)
    exact = exact_mass + torch.where(active, zeros, mass).sum(dim=-1)
    held = least_mass(torch.where(active, mass, zeros), exact, shift, inflate)
    keys = parts / held.unsqueeze(-1) * OUTWARD
    cap = key_error_cap(torch.where(active, mass_up, zeros), shift, value_radius)
    summed = keys.sum(dim=-1) * OUTWARD
    key_total = torch.where(summed <= cap, summed, cap)  # a NaN sum falls back on the cap, which is NaN if it must be
    bound = (key_total + value_total + fixed) * OUTWARD
    bound = torch.where(torch.isfinite(output_norm), bound, torch.full_like(bound, math.inf))
    return Certificate(bound, fixed, key_total, value_total, keys, values)
