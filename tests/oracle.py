"""An exact oracle for small attention problems: what the certificate speaks about, with no floating point in it.

Float16, bfloat16, float32 and float64 numbers are integers times powers of two, so scores are computed in Python integers,
without any rounding. Only `exp`, `tanh`, one division and one square root an output are rounded, at `DIGITS` decimal digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mpmath
import numpy as np
from mpmath import mpf
from torch import Tensor

DIGITS = 120
FIXED = 1200  # weights are integers times 2^-FIXED, relative to the heaviest
NEGLIGIBLE = 900  # below exp(-900) < 2^-FIXED a weight rounds to 0 in that form

mpmath.mp.dps = DIGITS


def dyadic(values: Tensor | Sequence[float]) -> tuple[list[int], int]:
    """Integers and one exponent: entry i of the flattened input is exactly `integers[i] * 2**exponent`.

    Raises: ValueError: an entry is NaN or infinite.
    """
    flat = values.detach().double().flatten().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    if not np.isfinite(flat).all():
        raise ValueError("only finite numbers are integers times powers of two")
    fractions, exponents = np.frexp(flat)
    integers = [int(part) for part in np.ldexp(fractions, 53).astype(np.int64)]
    powers = [int(part) - 53 for part in exponents]
    used = [power for integer, power in zip(integers, powers, strict=True) if integer]
    least = min(used, default=0)
    return [i << (p - least) if i else 0 for i, p in zip(integers, powers, strict=True)], least


def exact_number(x: float) -> mpf:
    """A double as an mpf, exactly."""
    return mpf(float(x))


def exact_scores(
    q: Tensor, keys: Tensor, scaling: float, bias: Tensor | None = None, softcap: float | None = None, sink: float | None = None
) -> tuple[list[mpf | None], mpf | None]:
    """Scores of one query, relative to the largest one that is attended; None for a masked token.

    Args: q: `[channels]`; keys: `[tokens, channels]`; bias: `[tokens]`, additive, -inf masks; sink: a sink logit.
    Returns: the tokens' scores and the sink's.
    Raises: ValueError: nothing is attended, or an input is NaN or infinite.
    """
    tokens, channels = keys.shape
    q_int, q_exp = dyadic(q)
    k_int, k_exp = dyadic(keys)
    (tau,), tau_exp = dyadic([scaling])
    dots = [tau * sum(map(int.__mul__, q_int, k_int[t * channels : (t + 1) * channels])) for t in range(tokens)]
    exponent = q_exp + k_exp + tau_exp
    kept = [True] * tokens
    added: list[float] = [0.0] * tokens
    if bias is not None:
        given = bias.detach().double().flatten().tolist()
        kept = [b != -math.inf for b in given]
        added = [b if keep else 0.0 for b, keep in zip(given, kept, strict=True)]
    extra = [*added, sink if sink is not None else 0.0]
    extra_int, extra_exp = dyadic(extra)
    if softcap is None:
        least = min(exponent, extra_exp)
        scores = [(d << (exponent - least)) + (b << (extra_exp - least)) for d, b in zip(dots, extra_int, strict=False)]
        sink_score = extra_int[-1] << (extra_exp - least)
        present = [s for s, keep in zip(scores, kept, strict=True) if keep] + ([sink_score] if sink is not None else [])
        if not present:
            raise ValueError("every token is masked")
        top = max(present)
        below = [mpmath.ldexp(mpf(s - top), least) if keep else None for s, keep in zip(scores, kept, strict=True)]
        return below, mpmath.ldexp(mpf(sink_score - top), least) if sink is not None else None
    cap = exact_number(softcap)
    capped = [
        cap * mpmath.tanh(mpmath.ldexp(mpf(d), exponent) / cap) + exact_number(b) for d, b in zip(dots, added, strict=True)
    ]
    present = [s for s, keep in zip(capped, kept, strict=True) if keep] + ([exact_number(sink)] if sink is not None else [])
    if not present:
        raise ValueError("every token is masked")
    top = max(present)
    below = [s - top if keep else None for s, keep in zip(capped, kept, strict=True)]
    return below, exact_number(sink) - top if sink is not None else None


def _fixed_weight(score: mpf | None) -> int:
    if score is None or score < -NEGLIGIBLE:
        return 0
    return int(mpmath.ldexp(mpmath.exp(score), FIXED))


def exact_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink: float | None = None,
) -> list[mpf]:
    """The attention output of one query in (practically) real arithmetic: one mpf a value channel.

    Args: q: `[channels]`; keys, values: `[tokens, channels]`; bias: `[tokens]` or None; sink: a sink logit or None.
    """
    scores, sink_score = exact_scores(q, keys, scaling, bias, softcap, sink)
    weights = [_fixed_weight(score) for score in scores]
    normaliser = mpf(sum(weights) + (_fixed_weight(sink_score) if sink_score is not None else 0))
    v_int, v_exp = dyadic(values)
    width = values.shape[1]
    columns = [sum(map(int.__mul__, weights, v_int[c::width])) for c in range(width)]
    return [mpmath.ldexp(mpf(column) / normaliser, v_exp) for column in columns]


def norm_of(numbers: Sequence[mpf]) -> mpf:
    """The L2 norm."""
    return mpmath.sqrt(mpmath.fsum(x * x for x in numbers))


def exact_norm(output: Tensor) -> mpf:
    """The L2 norm of a tensor of finite floats."""
    return norm_of([exact_number(x) for x in output.detach().double().flatten().tolist()])


def exact_error(
    output: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink: float | None = None,
) -> mpf:
    """L2 distance of one computed output `[value channels]` from `exact_attention`: to be compared without tolerance."""
    exact = exact_attention(q, keys, values, scaling, bias, softcap, sink)
    given = [exact_number(x) for x in output.detach().double().flatten().tolist()]
    return norm_of([a - b for a, b in zip(given, exact, strict=True)])
