"""An exact oracle: attention in ball arithmetic, and comparisons that have no tolerance.

Float16, bfloat16, float32 and float64 numbers are integers times powers of two, and enter exactly. Everything after that is
computed in balls, which contain the real result. A comparison is answered when the balls decide it, and repeated at twice the
precision when they do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import MissingDependencyError

try:
    import flint
except ImportError as error:
    raise MissingDependencyError(
        "The exact oracle needs python-flint (ball arithmetic). Install it with `pip install 'hf_certkv[verify]'`."
    ) from error

FIRST_BITS, MOST_BITS = 64, 16384
PRECISE = 2.0**-12  # of a bound: how well an error is known before it is reported

Ball = Any  # flint.arb


@dataclass(frozen=True)
class Problem:
    """Attention of a few queries over the same originals.

    Attributes: query: `[rows, channels]`; keys: `[tokens, channels]`; values: `[tokens, value channels]`; scaling; bias:
        `[rows, tokens]`, additive, -inf masks, or None; softcap: c of c * tanh(score / c), or None; sinks: a sink logit a
        row, or None. All finite, except the bias.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Sequence[float] | None = None


def first_bits(problem: Problem) -> int:
    """A precision to begin with: the bits before the point of the largest score come on top of `FIRST_BITS`."""
    size = abs(problem.scaling) * problem.query.shape[-1] * _largest(problem.query) * _largest(problem.keys)
    if problem.bias is not None:
        size += _largest(problem.bias.where(problem.bias > -math.inf, 0.0))
    return FIRST_BITS + max(0, math.frexp(size)[1])


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max())


def exact_outputs(problem: Problem) -> list[list[Ball] | None]:
    """One ball a value channel for every row, at the precision set in `flint.ctx`; None where a row attends nothing."""
    scores = (_matrix(problem.query) * _matrix(problem.keys.mT) * flint.arb(problem.scaling)).table()
    if problem.softcap is not None:
        cap = flint.arb(problem.softcap)
        scores = [[cap * (score / cap).tanh() for score in row] for row in scores]
    zero = flint.arb(0)
    # Scores are not shifted: exponents of balls have no range to leave.
    if problem.bias is None:
        weights = [[score.exp() for score in row] for row in scores]
    else:
        weights = [
            [zero if b == -math.inf else (s + b).exp() if b else s.exp() for s, b in zip(row, line, strict=True)]
            for row, line in zip(scores, problem.bias.double().tolist(), strict=True)
        ]
    # A last column of ones: the normaliser is one more channel.
    values = [[*row, 1.0] for row in problem.values.detach().double().tolist()]
    sums = (flint.arb_mat(weights) * flint.arb_mat(values)).table()
    outputs: list[list[Ball] | None] = []
    for place, row in enumerate(sums):
        normaliser = row.pop()
        if problem.sinks is not None:
            normaliser += flint.arb(problem.sinks[place]).exp()
        outputs.append(None if normaliser.is_zero() else [x / normaliser for x in row])
    return outputs


def _matrix(x: Tensor) -> Any:
    """A matrix of exact balls."""
    return flint.arb_mat(x.detach().double().tolist())


def norm(numbers: Sequence[Ball]) -> Ball:
    """The L2 norm."""
    # A square of a ball around 0 may reach below 0, which a sum of squares does not.
    return sum((x * x for x in numbers), flint.arb(0)).nonnegative_part().sqrt()


def exact_norm(output: Tensor) -> Ball:
    """The L2 norm of a tensor of finite floats."""
    return norm([flint.arb(x) for x in output.detach().double().flatten().tolist()])


def exact_errors(problem: Problem, outputs: Tensor) -> list[Ball | None]:
    """L2 distances of computed outputs `[rows, value channels]` from the exact ones; None where a row attends nothing."""
    given = outputs.detach().double().tolist()
    return [
        None if exact is None else norm([e - g for e, g in zip(exact, row, strict=True)])
        for exact, row in zip(exact_outputs(problem), given, strict=True)
    ]


def decided(question: Callable[[], Sequence[bool | None]], bits: int = FIRST_BITS) -> list[bool]:
    """Answers to a question whose balls may be too wide: asked again with twice the bits until none is None.

    Raises: ArithmeticError: `MOST_BITS` bits do not decide it.
    """
    before = flint.ctx.prec
    try:
        while bits <= MOST_BITS:
            flint.ctx.prec = bits
            answers = question()
            known = [answer for answer in answers if answer is not None]
            if len(known) == len(answers):
                return known
            bits *= 2
    finally:
        flint.ctx.prec = before
    raise ArithmeticError(f"a comparison is still open at {MOST_BITS} bits")


def at_most(left: Ball, right: Ball) -> bool | None:
    """Whether left <= right; None where the balls do not decide it."""
    return True if left <= right else False if left > right else None


def upper(ball: Ball) -> float:
    """A double not below anything in the ball."""
    return math.nextafter(float(ball.upper()), math.inf)


def precise(error: Ball, bound: Ball) -> bool:
    """Whether an error is known well enough, against its bound, to say what share of it is used."""
    return bool(error.rad() <= bound * PRECISE)
