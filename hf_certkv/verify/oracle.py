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
except ImportError as error:  # pragma: no cover - the tests are run with the extra installed
    raise MissingDependencyError(
        "The exact oracle needs python-flint (ball arithmetic). Install it with `pip install 'hf_certkv[verify]'`."
    ) from error

FIRST_BITS, MOST_BITS = 128, 16384

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


def exact_outputs(problem: Problem) -> list[list[Ball] | None]:
    """One ball a value channel for every row, at the precision set in `flint.ctx`; None where a row attends nothing."""
    scores = (_matrix(problem.query) * _matrix(problem.keys.mT)).table()
    tau = flint.arb(problem.scaling)
    cap = None if problem.softcap is None else flint.arb(problem.softcap)
    bias = problem.bias.double().tolist() if problem.bias is not None else None
    weights: list[list[Ball]] = []
    normalisers: list[Ball | None] = []
    for place, row in enumerate(scores):
        scaled = [tau * score for score in row]
        if cap is not None:
            scaled = [cap * (score / cap).tanh() for score in scaled]
        if bias is None:
            kept: list[Ball | None] = list(scaled)
        else:
            kept = [None if b == -math.inf else s + b for s, b in zip(scaled, bias[place], strict=True)]
        sink = None if problem.sinks is None else flint.arb(problem.sinks[place])
        present = [score for score in (*kept, sink) if score is not None]
        if not present:
            weights.append([flint.arb(0)] * len(row))
            normalisers.append(None)
            continue
        top = max((score.mid() for score in present), key=_Midpoint)  # any shift cancels; this one keeps weights near 1
        line = [flint.arb(0) if score is None else (score - top).exp() for score in kept]
        total = sum(line, flint.arb(0))
        weights.append(line)
        normalisers.append(total if sink is None else total + (sink - top).exp())
    sums = (flint.arb_mat(weights) * _matrix(problem.values)).table()
    return [None if n is None else [x / n for x in row] for row, n in zip(sums, normalisers, strict=True)]


class _Midpoint:
    """Order of exact balls."""

    def __init__(self, ball: Ball) -> None:
        self.ball = ball

    def __lt__(self, other: _Midpoint) -> bool:
        return bool(self.ball < other.ball)


def _matrix(x: Tensor) -> Any:
    """A matrix of exact balls."""
    return flint.arb_mat([[flint.arb(number) for number in row] for row in x.detach().double().tolist()])


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


def decided(question: Callable[[], Sequence[bool | None]]) -> list[bool]:
    """Answers to a question whose balls may be too wide: asked again with more bits until none is None.

    Raises: ArithmeticError: `MOST_BITS` bits do not decide it.
    """
    before, bits = flint.ctx.prec, FIRST_BITS
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
