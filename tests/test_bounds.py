"""Each inequality against brute force in float64: no perturbation within its premises is above it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from hf_certkv import bounds
from hf_certkv.bounds import Certificate
from hf_certkv.kernels.reference import score_weights

BLOCK = 4


class Problem:
    """One row over blocks of four tokens and one exact token: scores, values, residuals, and all that is known of them."""

    def __init__(self, seed: int, blocks: int = 2, spread: float = 1.0, shift: float = 0.5, channels: int = 3) -> None:
        g = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"generator": g, "dtype": torch.float64}
        self.tokens = blocks * BLOCK
        self.scores = spread * torch.randn(self.tokens + 1, **options)
        self.values = torch.randn(self.tokens + 1, channels, **options)
        if seed % 3 == 0:  # two opposite clusters
            self.values[: self.tokens // 2], self.values[self.tokens // 2 :] = self.values[0].clone(), -self.values[0]
        self.limit = shift * torch.rand(blocks, **options)
        self.p = torch.softmax(self.scores, dim=0)
        inside = self.p[:-1].view(blocks, BLOCK)
        self.mass, self.root = inside.sum(-1), inside.square().sum(-1).sqrt()
        self.residuals = 0.1 * torch.randn(self.tokens, channels, **options)
        self.centre = self.p @ self.values
        self.radius = self.values.norm(dim=-1)[:-1].view(blocks, BLOCK).amax(-1)

    def moved(self, delta: Tensor) -> float:
        """How far the output moves when true scores differ by `delta` from those of the weights."""
        true = torch.softmax(self.scores + torch.cat([delta, delta.new_zeros(1)]), dim=0)
        return float((true @ self.values - self.centre).norm())

    def by_bound(self, delta_l2: Tensor | None = None) -> float:
        """The key error as `total` puts it together, the L2 entry with a given Lambda."""
        shift_l2 = self.limit * BLOCK**0.5 if delta_l2 is None else delta_l2
        reach = self.radius + self.centre.norm()
        parts = bounds.key_error(self.mass * reach, self.root * reach, self.limit, shift_l2)
        held = bounds.least_mass(self.mass, self.p[-1], self.limit, torch.ones((), dtype=torch.float64))
        return float(parts.sum() / held)

    def cap(self) -> float:
        """The cap by total variation."""
        return float(bounds.key_error_cap(self.mass, self.limit, self.values.norm(dim=-1).amax()))

    def signs(self) -> list[Tensor]:
        """Every sign pattern for eight tokens; clusters and greedy ascents for more."""
        limits = self.limit.repeat_interleave(BLOCK)
        if self.tokens <= 8:
            return [limits * torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1.0, 1.0), repeat=self.tokens)]
        found = [limits, -limits]
        for start in (limits.clone(), -limits):
            improved = True
            while improved:
                improved = False
                for t in range(self.tokens):
                    other = start.clone()
                    other[t] = -other[t]
                    if self.moved(other) > self.moved(start):
                        start, improved = other, True
            found.append(start)
        return found


GRID = [(0.5, 0.3), (0.5, 3.0), (3.0, 0.05), (3.0, 1.0), (8.0, 8.0), (0.0, 1e-9), (30.0, 30.0)]


@pytest.mark.parametrize(("spread", "shift"), GRID)
@pytest.mark.parametrize("blocks", [2, 5])
def test_no_score_errors_move_the_output_further(spread: float, shift: float, blocks: int) -> None:
    for seed in range(6):
        problem = Problem(seed, blocks, spread, shift)
        for delta in problem.signs():
            moved = problem.moved(delta)
            own_l2 = delta.view(blocks, BLOCK).norm(dim=-1)
            float64 = 1e-13  # of this brute force's own softmax, not of the bound
            assert moved <= problem.by_bound() + float64
            assert moved <= problem.by_bound(own_l2) + float64
            assert moved <= problem.cap() + float64
            true = float((problem.p[:-1] * delta.exp()).sum() + problem.p[-1])
            one = torch.ones((), dtype=torch.float64)
            assert true >= float(bounds.least_mass(problem.mass, problem.p[-1], problem.limit, one)) - float64


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_no_residuals_move_the_output_further(spread: float) -> None:
    for seed in range(20):
        problem = Problem(seed, 4, spread)
        blocks = problem.residuals.view(4, BLOCK, -1)
        if seed % 2:
            blocks = blocks[:, :1].expand_as(blocks).clone()  # all residuals of a block line up
        eta = blocks.norm(dim=-1).amax(-1)
        steps = 10.0 ** (2 * torch.rand(4, BLOCK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        spectral = torch.linalg.matrix_norm(blocks, ord=2)
        stepped = problem.p[:-1].view(4, BLOCK) * steps
        parts = bounds.value_error(stepped.sum(-1), stepped.norm(dim=-1), eta, spectral)
        for n in range(4):
            assert float((stepped[n] @ blocks[n]).norm()) <= float(parts[n]) * (1 + 1e-14)
            assert float(parts[n]) <= float(stepped[n].sum() * eta[n]) * (1 + 1e-8)


def near(problem: Problem, read: Tensor, output: Tensor, apart: float, power: int) -> Tensor:
    """`mean_radius` of every block, from sums in float64: by weight or by squared weight. Residuals have steps of 1."""
    p = problem.p[:-1].view(-1, BLOCK) ** power
    moment = (p * (read - output).square().sum(-1).view(-1, BLOCK)).sum(-1) / p.sum(-1)
    eta = (read - problem.values[:-1]).norm(dim=-1).view(-1, BLOCK).amax(-1)
    reach = torch.maximum(problem.values[:-1].norm(dim=-1), read.norm(dim=-1)).view(-1, BLOCK).amax(-1)
    reach = reach + output.norm() + apart
    return bounds.mean_radius(moment, eta, torch.tensor([apart], dtype=torch.float64), reach, BLOCK)


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("size", [0.0, 0.1, 3.0])
def test_mean_radius_stands_for_every_distance_in_a_mean(spread: float, size: float) -> None:
    """Also where the centre is as far from the output as allowed, and residuals point away from it."""
    for seed in range(20):
        problem = Problem(seed, 4, spread)
        g = torch.Generator().manual_seed(seed)
        away = torch.randn(3, generator=g, dtype=torch.float64)
        output = problem.centre + size * away / away.norm()
        outward = problem.values[:-1] - problem.centre
        toward = outward / outward.norm(dim=-1, keepdim=True) if seed % 2 else torch.randn(16, 3, generator=g).double()
        read = problem.values[:-1] - size * toward
        distances = outward.norm(dim=-1).view(4, BLOCK)
        p = problem.p[:-1].view(4, BLOCK)
        linear, square = (near(problem, read, output, size, power) for power in (1, 2))
        float64 = 1 + 1e-14  # of this brute force's own sums
        assert bool(((p * distances).sum(-1) <= p.sum(-1) * linear * float64).all())
        assert bool(((p * distances).norm(dim=-1) <= p.norm(dim=-1) * square * float64).all())


def test_mean_radius_is_attained_and_falls_back() -> None:
    """Equal distances, a residual and a centre in line: nothing to spare but rounding. Overflow: the reach."""
    values = torch.tensor([0.0, 3.0], dtype=torch.float64)  # v, of residual 2, read as 2 further out; the output 1 beyond
    moment, reach = torch.tensor([4.0], dtype=torch.float64), torch.tensor([50.0], dtype=torch.float64)
    apart = torch.ones(1, dtype=torch.float64)
    made = float(bounds.mean_radius(moment, values[1:], apart, reach, 80))
    assert 2.0 + 3.0 + 1.0 <= made <= 6.01
    for what in (math.inf, math.nan):
        assert float(bounds.mean_radius(moment * what, values[1:], apart, reach, 80)) == 50.0


def test_mean_radius_covers_what_cancellation_loses() -> None:
    """Moments as a kernel makes them in float32, of values far from zero and close together."""
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        values = 100.0 + 0.01 * torch.rand(64, 32, generator=g)
        weights = torch.rand(64, generator=g) ** 4
        output = (weights @ values) / weights.sum()
        moment = (weights * values.square().sum(-1)).sum().double() - 2 * ((weights @ values) @ output).double()
        moment = moment / weights.sum().double() + output.double().square().sum()
        exact = (weights.double() * (values.double() - output.double()).norm(dim=-1)).sum() / weights.double().sum()
        reach = values.double().norm(dim=-1).amax() + output.double().norm()
        zero = torch.zeros((), dtype=torch.float64)
        assert float(exact) <= float(bounds.mean_radius(moment, zero, zero, reach, 96))


@pytest.mark.parametrize("seed", range(10))
def test_score_shift_bounds_every_score(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, step = torch.randn(8, generator=g, dtype=torch.float64), torch.rand(8, generator=g, dtype=torch.float64)
    relative = torch.rand(16, 8, generator=g, dtype=torch.float64) - 0.5
    if seed % 2:
        relative = 0.5 * q.sign().expand(16, 8).clone()
    kappa, epsilon = relative.abs().amax(), relative.norm(dim=-1).amax()
    l1, l2 = (q.abs() * step).sum(), (q * step).norm()
    off = 0.3 * (relative * step) @ q
    for scaling in (0.3, -0.3):
        shift = bounds.score_shift(scaling, kappa, l1, epsilon, l2)
        assert float(off.abs().amax()) <= float(shift)
        assert float(shift) == pytest.approx(0.3 * min(float(kappa * l1), float(epsilon * l2)))
        spectral = torch.linalg.matrix_norm(relative, ord=2)
        assert float(off.norm()) <= float(bounds.score_shift_l2(scaling, spectral, l2)) * (1 + 1e-15)


@pytest.mark.parametrize("n", [0, 1, 2, 100, 12345, 2**23])
def test_gamma(n: int) -> None:
    exact = mpmath.mpf(n) * mpmath.mpf(2) ** -24
    assert bounds.gamma(n) == pytest.approx(float(exact / (1 - exact)), rel=1e-12)
    assert bounds.gamma(n) >= n * 2.0**-24
    assert bounds.gamma(n + 1) > bounds.gamma(n)


@pytest.mark.parametrize("n", [2**24, 2**25])
def test_gamma_beyond_its_range_is_infinite(n: int) -> None:
    assert bounds.gamma(n) == math.inf


def test_growth_is_above_both_functions() -> None:
    shift = torch.cat([torch.zeros(1), torch.logspace(-320, 2.8, 4000, dtype=torch.float64)]).double()
    rise, slope = bounds.growth(shift)
    for x, up, steep in zip(shift.tolist(), rise.tolist(), slope.tolist(), strict=True):
        exact = mpmath.expm1(mpmath.mpf(x))
        assert mpmath.mpf(up) >= exact
        assert mpmath.mpf(steep) >= (exact / x if x else 1)
    assert bool((slope[1:-1] <= (slope[2:] * (1 + 1e-9))).all())


def test_the_backend_keeps_its_promises() -> None:
    """The assumed errors of float32 `exp` and `tanh`, over their whole range."""
    x = -torch.rand(200_000) * 87
    x = torch.cat([x, -torch.logspace(-10, 1.9, 50_000), torch.zeros(1)])
    exact = torch.exp(x.double())
    assert float(((torch.exp(x).double() - exact) / exact).abs().amax()) <= bounds.EXP_ERROR
    y = torch.cat([torch.randn(200_000) * 3, torch.logspace(-30, 2, 50_000)])
    assert float((torch.tanh(y).double() - torch.tanh(y.double())).abs().amax()) <= bounds.TANH_ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_output_rounding_covers_every_size(dtype: torch.dtype) -> None:
    for exponent in range(-45, 16):
        x = torch.randn(50, 7) * 2.0**exponent
        rounded = x.to(dtype).double()
        off, norm = (rounded - x.double()).norm(dim=-1), rounded.norm(dim=-1)
        assert bool((off <= bounds.output_rounding(norm, 7, dtype)).all())


def test_score_rounding_covers_float32_scores() -> None:
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        channels = int(torch.randint(1, 200, (), generator=g))
        q, k = torch.randn(channels, generator=g), torch.randn(64, channels, generator=g)
        scaling = channels**-0.5
        bias = 1000 * torch.rand(64, generator=g) if seed % 2 else torch.zeros(64)
        cap = 3.7 if seed % 3 == 0 else None
        scores, exact = (k @ (q * scaling)), (k.double() @ q.double()) * scaling
        if cap is not None:
            scores, exact = torch.tanh(scores / cap) * cap, torch.tanh(exact / cap) * cap
        off = ((scores + bias).double() - (exact + bias.double())).abs().amax()
        norms = q.double().norm(), k.double().norm(dim=-1).amax()
        assert float(off) <= float(bounds.score_rounding(scaling, *norms, channels, bias.double().amax(), cap))


def test_score_rounding_covers_scores_of_codes_multiplied_as_integers() -> None:
    for seed in range(100):
        g = torch.Generator().manual_seed(seed)
        channels, scaling = 128, 128**-0.5
        q, exact_keys, coded_keys = (torch.randn(*shape, generator=g) for shape in ((channels,), (8, channels), (64, channels)))
        exact_keys *= 1 if seed % 2 else 1e-3
        said = torch.tensor(10.0 ** -(1 + seed % 6), dtype=torch.float64)
        cap = 3.7 if seed % 3 == 0 else None
        of_codes = (coded_keys.double() @ q.double()) * scaling
        off_by = torch.rand(64, generator=g, dtype=torch.float64).mul(2).sub(1).sign() * said
        computed = torch.cat([(of_codes + off_by).float(), exact_keys @ (q * scaling)])
        exact = torch.cat([of_codes, (exact_keys.double() @ q.double()) * scaling])
        if cap is not None:
            computed, exact = torch.tanh(computed / cap) * cap, torch.tanh(exact / cap) * cap
        norms = exact_keys.double().norm(dim=-1).amax(), coded_keys.double().norm(dim=-1).amax()
        given = (scaling, q.double().norm(), max(norms), channels, 0.0, cap)
        bound = float(bounds.score_rounding(*given, coded=(said, norms[0])))
        assert float((computed.double() - exact).abs().amax()) <= bound
        if seed % 2 == 0 and cap is None and said < 1e-5:  # large keys that are codes cost no sum of float32 products
            assert bound < float(bounds.score_rounding(*given, coded=(said, max(norms))))
    # A factor of a code that is flushed is lost, however little else there is.
    zero = torch.zeros((), dtype=torch.float64)
    assert float(bounds.score_rounding(1.0, zero, zero, 128, 0.0, None, coded=(zero, zero))) >= 128 * 2.0**-100


def arguments(rows: int = 2, blocks: int = 3) -> dict[str, Any]:
    """Arguments of `total` for a certificate that is met."""
    g = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"generator": g, "dtype": torch.float64}
    mass = torch.rand(rows, blocks, **options) * 0.1
    return {
        "attended": torch.ones(rows, blocks, dtype=torch.bool),
        "mass": mass,
        "root_square_mass": mass * 0.5,
        "exact_mass": 1 - mass.sum(-1),
        "shift": torch.rand(rows, blocks, **options) * 0.1,
        "shift_l2": torch.rand(rows, blocks, **options) * 0.1,
        "approximate_keys": torch.ones(1, blocks, dtype=torch.bool),
        "eta": torch.rand(1, blocks, **options) * 0.1,
        "value_spectral": torch.rand(1, blocks, **options) * 0.1,
        "step": torch.rand(rows, blocks, **options),
        "root_square_step": torch.rand(rows, blocks, **options),
        "moment": torch.rand(rows, blocks, **options),
        "square_moment": torch.rand(rows, blocks, **options),
        "block_radius": torch.full((1, blocks), 2.0, dtype=torch.float64),
        "value_radius": torch.full((rows,), 2.0, dtype=torch.float64),
        "output_norm": torch.ones(rows, dtype=torch.float64),
        "slack": torch.full((rows,), 1e-5, dtype=torch.float64),
        "rounding": torch.full((rows,), 1e-5, dtype=torch.float64),
        "output_error": torch.full((rows,), 1e-5, dtype=torch.float64),
        "chain": 20,
        "terms": 40,
    }


NUMBERS = [name for name, value in arguments().items() if isinstance(value, Tensor) and value.dtype == torch.float64]


def at_head(given: Tensor, what: float) -> Tensor:
    """The tensor with one number of the first row and block replaced."""
    changed = given.clone()
    changed.view(-1)[0] = what
    return changed


def test_the_certificate_of_ordinary_numbers_is_met() -> None:
    made = bounds.total(**arguments())
    assert bool(bounds.meets(made.total, torch.full_like(made.total, 1.0)).all())


# What NaN or infinity may not stop: the L2 number of scores and the exact mass enter one of two valid key bounds only, and
# an infinite residual leaves the spectral entry (never the other way round in practice: both are measured together).
OTHER_WAY = {"shift_l2", "exact_mass", "block_radius"}
MEANS = ("moment", "square_moment")  # a radius that is worse, and as valid, stands in for them


@pytest.mark.parametrize("name", NUMBERS)
def test_nan_in_any_argument_is_never_met(name: str) -> None:
    given = arguments()
    given[name] = at_head(given[name], math.nan)
    if name == "output_norm":  # an output that is NaN: its own rounding says so too, in every dtype
        given["output_error"] = bounds.output_rounding(given["output_norm"], 8, torch.float32)
    made = bounds.total(**given)
    if name in MEANS:
        widest = bounds.total(**{**given, name: torch.full_like(given[name], 1e30)})
        assert float(made.total[0]) == float(widest.total[0]) or float(made.key_parts[0, 0]) == float(widest.key_parts[0, 0])
        return
    if name in OTHER_WAY:
        # Not certified, or certified by the cap alone, which does not use this number.
        cap = bounds.key_error_cap(given["mass"], given["shift"], given["value_radius"])
        assert not float(made.key_total[0]) < float(cap[0])
        return
    for budget in (1.0, 1e300, math.inf, math.nan):
        assert not bool(bounds.meets(made.total, torch.full_like(made.total, budget))[0])


@pytest.mark.parametrize("name", ["mass", "value_radius", "output_norm", "rounding", "output_error"])
def test_infinity_in_an_argument_is_never_met(name: str) -> None:
    given = arguments()
    given[name] = at_head(given[name], math.inf)
    if name == "output_norm":
        given["output_error"] = bounds.output_rounding(given["output_norm"], 8, torch.float32)
    if name == "mass":
        given["root_square_mass"] = at_head(given["root_square_mass"], math.inf)
    if name == "value_radius":
        given["block_radius"] = at_head(given["block_radius"], math.inf)
    made = bounds.total(**given)
    assert not bool(bounds.meets(made.total, torch.full_like(made.total, math.inf))[0])


def test_infinite_shift_is_certified_by_total_variation_only() -> None:
    given = arguments()
    given["shift"] = torch.full_like(given["shift"], math.inf)
    made = bounds.total(**given)
    assert bool((made.key_total >= 4.0).all())  # twice the radius


@pytest.mark.parametrize("pair", [("eta", "value_spectral"), ("shift", "shift_l2")])
def test_numbers_that_are_infinite_together(pair: tuple[str, str]) -> None:
    given = arguments()
    for name in pair:
        given[name] = torch.full_like(given[name], math.inf)
    made = bounds.total(**given)
    if pair[0] == "eta":
        assert not bool(bounds.meets(made.total, torch.full_like(made.total, math.inf)).any())
    else:
        assert bool((made.key_total >= 4.0).all())


@pytest.mark.parametrize("shift", [-1.0, -math.inf])
def test_a_negative_shift_is_never_certified(shift: float) -> None:
    """A shift is a magnitude. One that arrives negative is an error upstream, and no bound may be accepted for it."""
    given = arguments()
    least = bounds.total(**{**given, "shift": given["shift"] * 0, "shift_l2": given["shift_l2"] * 0}).total
    made = bounds.total(**{**given, "shift": torch.full_like(given["shift"], shift)}).total
    accepted = bounds.meets(made, torch.full_like(made, math.inf))
    assert not bool((accepted & (made < least)).any())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_score_weights_are_sums_of_magnitudes(sign: float) -> None:
    """Also for steps that no codec should store: zero, and negative."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        query = torch.randn(1, 2, 3, 8, generator=g) * 10.0 ** float(torch.randint(-38, 38, (), generator=g))
        step = (sign * torch.rand(1, 2, 4, 8, generator=g) * 10.0 ** float(torch.randint(-6, 4, (), generator=g))).half()
        step[..., 0] = 0
        l1, l2 = score_weights(query, step)
        parts = query.double().abs().unsqueeze(3) * step.double().abs().unsqueeze(2)
        assert bool((l1 >= parts.sum(-1)).all()) and bool((l2 >= parts.norm(dim=-1)).all())
        flushed = 8 * 2.0**-126 * float(step.double().abs().amax())  # what a query of subnormal channels may hide
        assert bool((l1 <= parts.sum(-1) * 1.001 + 1e-12 * parts.amax() + flushed * 1.001).all())


INCREASING = [name for name in NUMBERS if name != "exact_mass"]


@pytest.mark.parametrize("name", INCREASING)
def test_more_of_anything_never_lowers_the_bound(name: str) -> None:
    given = arguments()
    before = bounds.total(**given).total
    for factor in (1.0 + 1e-6, 1.5, 3.0):
        changed = {**given, name: given[name] * factor}
        if name == "mass":  # what the blocks gain the exact tokens lose
            changed["exact_mass"] = (1 - changed["mass"].sum(-1)).clamp_min(0)
        assert bool((bounds.total(**changed).total >= before).all()), factor


def test_masked_blocks_and_original_keys_count_nothing() -> None:
    given = arguments()
    given["attended"][:, 0] = False
    given["mass"][:, 0], given["root_square_mass"][:, 0] = 0, 0
    made = bounds.total(**given)
    assert bool((made.key_parts[:, 0] == 0).all()) and bool((made.value_parts[:, 0] == 0).all())
    given["approximate_keys"] = torch.zeros(1, 3, dtype=torch.bool)
    made = bounds.total(**given)
    assert bool((made.key_total == 0).all())


def test_a_weight_that_underflowed_still_counts() -> None:
    given = arguments()
    given["mass"][:, 0], given["root_square_mass"][:, 0] = 0.0, 0.0
    given["shift"][:, 0], given["shift_l2"][:, 0] = 800.0, 800.0
    made = bounds.total(**given)
    assert bool((made.key_total > 1.0).all())


def combined(made: Certificate) -> Tensor:
    """The parts, added up without rounding up."""
    return made.key_total + made.value_total + made.fixed


def test_the_total_is_above_its_parts() -> None:
    made = bounds.total(**arguments())
    assert bool((made.total >= combined(made)).all())
    assert bool((made.value_total >= made.value_parts.sum(-1)).all())


MEETS: list[tuple[float, float, bool]] = [
    (1.0, 1.0, True),
    (1.0, 0.999, False),
    (math.nan, 1.0, False),
    (1.0, math.nan, False),
    (math.inf, math.inf, False),
    (math.inf, 1.0, False),
    (math.nan, math.nan, False),
    (math.nan, math.inf, False),
    (0.0, 0.0, True),
]


@pytest.mark.parametrize(("bound", "budget", "wanted"), MEETS)
def test_meets(bound: float, budget: float, wanted: bool) -> None:
    made = bounds.meets(torch.tensor([bound]), torch.tensor([budget]))
    assert made.tolist() == [wanted]


SLACKS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("weight_slack", lambda x: bounds.weight_slack(x, 1)),
    ("mass_slack", lambda x: bounds.mass_slack(x, 10)),
    ("rounding_error", lambda x: bounds.rounding_error(x, torch.ones_like(x), 10, 1, 100, 8)),
]


@pytest.mark.parametrize(("name", "function"), SLACKS, ids=[name for name, _ in SLACKS])
def test_rounding_terms_grow(name: str, function: Callable[[Tensor], Tensor]) -> None:
    made = function(torch.linspace(0, 3, 100, dtype=torch.float64))
    assert bool((made[1:] >= made[:-1]).all()) and bool((made > 0).all())
    assert not bool(torch.isfinite(function(torch.tensor([math.nan], dtype=torch.float64))).any())


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_the_second_mean_is_never_less_than_it_is(spread: float) -> None:
    """From sums of powers of weights up to 1, of any shape, with and without those of higher powers."""
    generator = torch.Generator().manual_seed(int(10 * spread))
    scores = spread * torch.randn(200, 3, 16, generator=generator, dtype=torch.float64)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    values = torch.randn(200, 1, 16, 8, generator=generator, dtype=torch.float64) + torch.linspace(0, 4, 200).view(-1, 1, 1, 1)
    output = torch.einsum("nrt,nrtc->nrc", weights, values.expand(-1, 3, -1, -1)) / weights.sum(-1, keepdim=True)
    output = output * torch.linspace(0, 2, 200, dtype=torch.float64).view(-1, 1, 1)
    distances = (values - output.unsqueeze(2)).square().sum(-1)
    total, square, cube, fourth = (weights.pow(power).sum(-1) for power in (1, 2, 3, 4))
    norms = values.square().sum(-1)
    moment = (weights * distances).sum(-1) / total
    inner = (weights * (values * output.unsqueeze(2)).sum(-1)).sum(-1)
    size, reach = output.square().sum(-1), norms.sqrt().amax(-1) + output.norm(dim=-1)
    given = ((weights.square() * norms).sum(-1), inner, size, norms.sum(-1), reach, 24)
    true = (weights.square() * distances).sum(-1) / square
    found = bounds.square_moment_bound(moment, (total, square, cube, fourth), *given)
    assert bool((found >= true).all())
    by_weight = bounds.square_moment_bound(moment, (total, square, cube, torch.full_like(fourth, torch.nan)), *given)
    assert bool((by_weight >= found).all())
    assert spread == 0.0 or bool((by_weight > found).any())
    if spread == 0.0:  # equal weights: both means are one
        assert bool((found <= true * (1 + 1e-4) + 1e-4 * reach.square()).all())
    overflown = bounds.square_moment_bound(torch.full_like(moment, torch.inf), (total, square, cube, fourth), *given)
    assert bool((overflown == torch.inf).all())
