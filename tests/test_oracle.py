"""The two oracles against each other: balls (`hf_certkv.verify.oracle`), and integers with mpmath (`oracle.py`, here)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import flint
import mpmath
import oracle as integers
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from hf_certkv.verify import oracle as balls
from hf_certkv.verify.cases import BITS, MASKS, Case, bits, compare, mask_of, problems, tensors
from hf_certkv.verify.oracle import Problem

DIGITS = 60
PRECISION = 512  # bits, of balls: far more than the digits compared


def as_number(ball: Any) -> mpf:
    """The middle of a ball, exactly."""
    mantissa, exponent = ball.mid().man_exp()
    return mpmath.ldexp(mpf(int(mantissa)), int(exponent))


def by_integers(problem: Problem, row: int) -> list[mpf]:
    """One row by the independent oracle."""
    bias = None if problem.bias is None else problem.bias[row]
    sink = None if problem.sinks is None else problem.sinks[row]
    return integers.exact_attention(
        problem.query[row], problem.keys, problem.values, problem.scaling, bias, problem.softcap, sink
    )


def assert_agree(problem: Problem) -> int:
    """Every channel of every row equal to `DIGITS` digits of the largest value; the number of rows compared."""
    rows = 0
    size = mpf(float(problem.values.double().abs().max()))
    with flint.ctx.workprec(PRECISION):
        outputs = balls.exact_outputs(problem)
        for row, output in enumerate(outputs):
            if output is None:
                with pytest.raises(ValueError, match="masked"):
                    by_integers(problem, row)
                continue
            for ball, number in zip(output, by_integers(problem, row), strict=True):
                assert abs(as_number(ball) - number) <= size * mpf(10) ** -DIGITS
                assert float(ball.rad()) <= float(size) * 10.0**-DIGITS
            rows += 1
    return rows


REGIMES = ("normal", "subnormal", "large", "equal", "one-hot", "outlier", "constant", "huge query", "wild values", "raw")


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_oracles_agree(regime: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(regime, dtype, 23, 6, 5, 1, 2, 4)
    rows = sum(assert_agree(problem) for _, problem in problems(Case(q, k, v)))
    assert rows == 8


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", ["", "softcap", "sinks", "both"])
def test_the_oracles_agree_on_masks_softcaps_and_sinks(mask: str, dtype: torch.dtype, extra: str) -> None:
    q, k, v = tensors("normal", dtype, 23, 6, 5, 2, 2, 5)
    softcap = 0.7 if extra in ("softcap", "both") else None
    sinks = torch.tensor([0.3, -40.0, 60.0, 2.0]) if extra in ("sinks", "both") else None
    case = Case(q, k, v, mask_of(mask, dtype, 2, 2, 23, 5), 1 / 3, softcap, sinks)
    rows = sum(assert_agree(problem) for _, problem in problems(case))
    assert rows == 16 or (mask == "one row" and sinks is None and rows == 8)


@pytest.mark.parametrize("seed", range(6))
def test_the_oracles_agree_on_raw_bits(seed: int) -> None:
    """Any finite bfloat16 numbers, whose products span the exponents of float64."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (bits(shape, torch.bfloat16, g) for shape in ((2, 4), (9, 4), (9, 3)))
    assert assert_agree(Problem(q, k, v, 0.5, softcap=[None, 3.0][seed % 2])) == 2


def test_two_tokens_by_hand() -> None:
    """Scores log 3 and 0, an exact sink at log 2, values 8 and -2: (3*8 - 2) / (3 + 1 + 2)."""
    one = torch.ones(1, 1)
    log2, log3 = math.log(2.0), math.log(3.0)
    problem = Problem(one, torch.tensor([[log3], [0.0]], dtype=torch.float64), torch.tensor([[8.0], [-2.0]]), 1.0, sinks=[log2])
    (output,) = balls.exact_outputs(problem)
    assert output is not None
    assert float(output[0].mid()) == pytest.approx(22 / 6, rel=1e-15)
    with pytest.raises(ValueError, match="masked"):
        by_integers(Problem(one, one, one, 1.0, torch.full((1, 1), -math.inf)), 0)


def test_balls_hold_the_truth_at_every_precision() -> None:
    """An output in few bits is a ball around what many bits give."""
    q, k, v = tensors("huge query", torch.float32, 23, 6, 5, 1, 1, 4)
    problem = Problem(q[0, 0], k[0, 0], v[0, 0], 0.3)
    exact = by_integers(problem, 0)
    widths = []
    for precision in (40, 64, 128, 256):
        with flint.ctx.workprec(precision):
            (output,) = balls.exact_outputs(problem)
            assert output is not None
            for ball, number in zip(output, exact, strict=True):
                assert abs(as_number(ball) - number) <= mpf(float(ball.rad())) * (1 + mpf(2) ** -40) + mpf(10) ** -100
            widths.append(max(float(ball.rad()) for ball in output))
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] * 2.0**-150


def two_equal(value: float, channels: int = 1) -> Problem:
    """Two tokens of equal weight, values 0 and `value`: the output is half of it, exactly."""
    values = torch.tensor([[0.0], [value]], dtype=torch.float64).expand(2, channels)
    return Problem(torch.zeros(1, 1), torch.zeros(2, 1), values.contiguous(), 1.0)


@pytest.mark.parametrize("value", [1.0, 0.7, 3e-20, 1e30, 2.0**-1000])
def test_a_bound_that_equals_the_error_holds(value: float) -> None:
    """Both sides exact: an error of value/2 against bounds an ulp around it."""
    output = torch.zeros(1, 1, dtype=torch.float64)
    error = value / 2
    for bound, holds in ((error, True), (math.nextafter(error, math.inf), True), (math.nextafter(error, 0.0), False)):
        held, _ = compare(two_equal(value), output, [bound])
        assert held == [holds], (bound, error)


def neighbours(number: mpf) -> tuple[float, float]:
    """The doubles below and above a number that is none itself."""
    near = float(number)
    below = near if mpf(near) < number else math.nextafter(near, -math.inf)
    return below, math.nextafter(below, math.inf)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_an_ulp_around_the_true_error(seed: int) -> None:
    """The true error, irrational, lies between two neighbouring doubles: one does not hold, the other one does."""
    q, k, v = tensors("normal", torch.float32, 19, 6, 5, 1, 1, seed)
    problem = Problem(q[0, 0], k[0, 0], v[0, 0], 0.4, softcap=[None, 2.0][seed % 2])
    approximate = torch.softmax((q[0, 0] @ k[0, 0].mT) * 0.4, dim=-1) @ v[0, 0]
    error = integers.exact_error(approximate[0], problem.query[0], problem.keys, problem.values, 0.4, None, problem.softcap)
    below, above = neighbours(error)
    assert mpf(below) < error < mpf(above)
    assert compare(problem, approximate.double(), [below])[0] == [False]
    held, shares = compare(problem, approximate.double(), [above])
    assert held == [True] and 1 - 2.0**-11 < shares[0] <= 1 + 2.0**-11 and mpf(shares[0]) >= error / mpf(above)


def test_a_difference_far_below_double_precision_is_seen() -> None:
    """Output and bound differ from the truth by e^-300: more bits are taken until the balls decide."""
    values = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for sign, holds in ((1.0, True), (-1.0, False)):
        # The first token weighs 1 / (1 + e^-300), so the output is 1 - e^-300 and more; an error of just under 1 or over 1.
        problem = Problem(torch.ones(1, 1), torch.tensor([[300.0], [0.0]]), values, 1.0)
        output = torch.tensor([[0.0 if sign > 0 else 2.0]], dtype=torch.float64)
        held, _ = compare(problem, output, [1.0])
        assert held == [holds]


def test_decided_asks_until_every_answer_is_known() -> None:
    asked: list[int] = []

    def question() -> list[bool | None]:
        asked.append(flint.ctx.prec)
        third = flint.arb(1) / 3
        return [True, balls.at_most(third * 3, 1 + flint.arb(2) ** -200)]

    before = flint.ctx.prec
    assert balls.decided(question) == [True, True]
    assert flint.ctx.prec == before
    assert asked[0] == balls.FIRST_BITS and all(b == 2 * a for a, b in itertools.pairwise(asked))
    assert 128 < asked[-1] <= 512


def test_what_no_precision_decides_is_said_so() -> None:
    before = flint.ctx.prec
    with pytest.raises(ArithmeticError, match="still open"):
        balls.decided(lambda: [balls.at_most((flint.arb(1) / 3) * 3, flint.arb(1))])
    assert flint.ctx.prec == before


@pytest.mark.parametrize(
    ("left", "right", "answer"),
    [
        ((1.0, 0.0), (1.0, 0.0), True),
        ((1.0, 0.0), (2.0, 0.0), True),
        ((2.0, 0.0), (1.0, 0.0), False),
        ((1.0, 0.5), (1.75, 0.0), True),
        ((1.0, 0.5), (1.25, 0.0), None),
        ((2.0, 0.5), (1.0, 0.25), False),
    ],
)
def test_at_most(left: tuple[float, float], right: tuple[float, float], answer: bool | None) -> None:
    assert balls.at_most(flint.arb(*left), flint.arb(*right)) is answer


def test_at_most_of_nothing_known_is_open() -> None:
    assert balls.at_most(flint.arb("nan"), flint.arb(1)) is None
    assert balls.at_most(flint.arb(0, math.inf), flint.arb(1)) is None


@pytest.mark.parametrize("seed", range(4))
def test_norms_are_the_roots_of_exact_sums(seed: int) -> None:
    """The square of an output's norm, by fractions."""
    g = torch.Generator().manual_seed(seed)
    numbers: Tensor = bits((7,), torch.bfloat16, g)
    square = sum(Fraction(x) ** 2 for x in numbers.double().tolist())
    with flint.ctx.workprec(PRECISION):
        exact = flint.arb(flint.fmpq(square.numerator, square.denominator))
        difference = balls.exact_norm(numbers) ** 2 - exact
        assert difference.contains(0) and float(difference.rad()) <= float(exact.mid()) * 10.0**-DIGITS
        assert balls.exact_norm(numbers).overlaps(balls.norm([flint.arb(x) for x in numbers.double().tolist()]))


def test_upper_is_not_below_the_ball() -> None:
    with flint.ctx.workprec(PRECISION):
        for ball in (flint.arb(1) / 3, flint.arb(1), flint.arb(2).sqrt(), flint.arb(1, 0.25)):
            assert flint.arb(balls.upper(ball)) >= ball
            assert balls.upper(ball) <= float(ball.mid()) + float(ball.rad()) + 1e-15
