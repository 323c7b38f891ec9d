"""The choices of the ladder against brute force and naive loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_certkv import bounds, ladder
from hf_certkv.ladder import Costs


def bisected(bounds_: list[float], budget: float) -> float:
    """The level t with sum min(B, t)^2 = budget^2, by bisection; infinite where everything fits."""
    if math.fsum(b * b for b in bounds_) <= budget**2:
        return math.inf
    low, high = 0.0, max(b for b in bounds_ if math.isfinite(b)) if any(map(math.isfinite, bounds_)) else 0.0
    high = max(high, budget) + 1
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(min(b, middle) ** 2 for b in bounds_) > budget**2:
            high = middle
        else:
            low = middle
    return low


@pytest.mark.parametrize("seed", range(20))
def test_water_level_solves_its_equation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = torch.rand(8, 6, generator=generator, dtype=torch.float64) ** 3
    given[1, 2], given[2] = math.inf, math.inf
    given[3, :3] = 0.5  # ties
    given[4, 1] = math.nan
    budget = torch.rand(8, generator=generator, dtype=torch.float64) * 1.5
    budget[5] = 0
    level = ladder.water_level(given, budget)
    for row in range(8):
        numbers = [math.inf if math.isnan(b) else b for b in given[row].tolist()]
        wanted = bisected(numbers, float(budget[row]))
        if wanted == math.inf:
            assert float(level[row]) == math.inf
        else:
            assert float(level[row]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_water_level_where_all_fits() -> None:
    level = ladder.water_level(torch.tensor([[0.3, 0.4]], dtype=torch.float64), torch.tensor([0.51], dtype=torch.float64))
    assert float(level) == math.inf


@pytest.mark.parametrize("norm", [0.0, 1.0, 1e-300, 12345.678, math.inf, math.nan])
def test_head_budget_is_rounded_down(norm: float) -> None:
    budget = float(ladder.head_budget(0.1, 0.01, torch.tensor(norm, dtype=torch.float64)))
    if math.isfinite(norm):
        assert 0 < budget < 0.01 + 0.1 * norm and budget == pytest.approx(0.01 + 0.1 * norm)
    else:
        assert not math.isfinite(budget)


class Problem:
    """Contributions of one random step; levels 0 unless given."""

    def __init__(self, seed: int, refined: bool = True, rows: int = 3, blocks: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 2, rows, blocks)
        self.key = torch.rand(shape, generator=generator, dtype=torch.float64) ** 4
        self.value = torch.rand(shape, generator=generator, dtype=torch.float64) ** 4
        self.key_refined = self.key / 16 if refined else None
        self.value_refined = self.value / 16 if refined else None
        self.key_level = torch.zeros(2, 2, blocks, dtype=torch.int64)
        self.value_level = torch.zeros(2, 2, blocks, dtype=torch.int64)
        self.room = torch.full((2, 2, rows), 0.3, dtype=torch.float64)
        self.failing = (self.key + self.value).sum(-1) > self.room
        self.costs = Costs(100.0 if refined else None, 50.0 if refined else None, 400.0, 400.0)

    def choose(self) -> tuple[Tensor, Tensor]:
        """What `choose` decides."""
        return ladder.choose(
            self.key,
            self.value,
            self.key_refined,
            self.value_refined,
            self.key_level,
            self.value_level,
            self.room,
            self.failing,
            self.costs,
        )

    def left(self, key_level: Tensor, value_level: Tensor) -> Tensor:
        """What the contributions add up to at these levels, by a loop: `[batch, kv_heads, rows]`."""
        total = torch.zeros_like(self.room)
        for b, h, r in itertools.product(*(range(size) for size in self.room.shape)):
            for n in range(self.key.shape[-1]):
                for parts, refined, old, new in (
                    (self.key, self.key_refined, self.key_level, key_level),
                    (self.value, self.value_refined, self.value_level, value_level),
                ):
                    before, after = int(old[b, h, n]), int(new[b, h, n])
                    part = float(parts[b, h, r, n])
                    if after == 2 and before < 2:
                        part = 0.0
                    elif after == 1 and before == 0:
                        assert refined is not None
                        part = float(refined[b, h, r, n])
                    total[b, h, r] += part
        return total


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("refined", [True, False])
def test_a_choice_brings_contributions_below_the_room(seed: int, refined: bool) -> None:
    problem = Problem(seed, refined)
    key, value = problem.choose()
    assert bool((key >= problem.key_level).all()) and bool((value >= problem.value_level).all())
    left = problem.left(key, value)
    assert bool((left[problem.failing] <= problem.room[problem.failing]).all())
    if not refined:
        assert set(torch.cat([key, value]).unique().tolist()) <= {0, 2}


@pytest.mark.parametrize("seed", range(10))
def test_levels_are_never_lowered(seed: int) -> None:
    problem = Problem(seed)
    generator = torch.Generator().manual_seed(seed)
    problem.key_level = torch.randint(0, 3, problem.key_level.shape, generator=generator)
    problem.value_level = torch.randint(0, 3, problem.value_level.shape, generator=generator)
    problem.key[(problem.key_level == 2).unsqueeze(2).expand_as(problem.key)] = 0
    problem.value[(problem.value_level == 2).unsqueeze(2).expand_as(problem.value)] = 0
    key, value = problem.choose()
    assert bool((key >= problem.key_level).all()) and bool((value >= problem.value_level).all())
    assert bool((key <= 2).all()) and bool((value <= 2).all())
    left = problem.left(key, value)
    assert bool((left[problem.failing] <= problem.room[problem.failing]).all())


def test_rows_that_do_not_fail_choose_nothing() -> None:
    problem = Problem(0)
    problem.failing = torch.zeros_like(problem.failing)
    key, value = problem.choose()
    assert torch.equal(key, problem.key_level) and torch.equal(value, problem.value_level)
    problem.failing[0, 1, 2] = True
    key, value = problem.choose()
    changed = (key + value).sum(-1) > 0
    assert changed.tolist() == [[False, True], [False, False]]


def test_the_best_gain_a_byte_goes_first() -> None:
    problem = Problem(0, refined=False, rows=1, blocks=3)
    problem.key[:], problem.value[:] = 0, 0
    problem.costs = Costs(None, None, 100.0, 10.0)
    problem.key[0, 0, 0] = torch.tensor([0.9, 0.05, 0.0])  # 0.009 a byte
    problem.value[0, 0, 0] = torch.tensor([0.0, 0.2, 0.05])  # 0.02 and 0.005 a byte
    problem.failing = torch.zeros_like(problem.failing)
    problem.failing[0, 0, 0] = True
    for room, keys, values in (
        (1.1, [0, 0, 0], [0, 2, 0]),
        (0.5, [2, 0, 0], [0, 2, 0]),
        (0.06, [2, 0, 0], [0, 2, 2]),
        (1e-9, [2, 2, 0], [0, 2, 2]),
    ):
        problem.room[:] = room
        key, value = problem.choose()
        assert (key[0, 0].tolist(), value[0, 0].tolist()) == (keys, values)


def test_a_cheap_plane_is_preferred_to_originals() -> None:
    problem = Problem(0, rows=1, blocks=1)
    problem.key[:], problem.value[:], problem.failing[:] = 1.0, 0.0, True
    problem.key_refined, problem.value_refined = problem.key / 16, problem.value
    problem.room[:] = 0.2
    assert int(problem.choose()[0].max()) == 1
    problem.room[:] = 0.01
    assert int(problem.choose()[0].min()) == 2


@pytest.mark.parametrize("what", [math.inf, math.nan])
def test_contributions_that_are_not_finite_are_raised(what: float) -> None:
    problem = Problem(1)
    problem.key[0, 0, 1, 4] = what
    problem.failing[0, 0, 1] = True
    key, _ = problem.choose()
    assert int(key[0, 0, 4]) >= 1  # the plane may be finite
    problem.key_refined = problem.key.clone()
    key, _ = problem.choose()
    assert int(key[0, 0, 4]) == 2  # where the plane is of no use, the originals


def naive_coverage(mass: list[float], share: float, least: int, most: int) -> set[int]:
    """The heaviest blocks until their weight is the share."""
    order = sorted(range(len(mass)), key=lambda n: -mass[n])
    taken: set[int] = set()
    for n in order:
        enough = math.fsum(mass[i] for i in taken) >= share * math.fsum(mass)
        if len(taken) >= most or (enough and len(taken) >= least):
            break
        taken.add(n)
    return taken


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("share", "least", "most"), [(0.9, 0, 99), (0.5, 2, 4), (0.999, 1, 3), (0.0, 0, 5), (0.0, 3, 5)])
def test_coverage(seed: int, share: float, least: int, most: int) -> None:
    mass = torch.rand(2, 2, 3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    chosen = ladder.coverage(mass, share, least, most)
    for b, h in itertools.product(range(2), range(2)):
        wanted: set[int] = set()
        for row in mass[b, h].tolist():
            wanted |= naive_coverage(row, share, least, most)
        assert set(chosen[b, h].nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("depth", [0, 1, 3, 99])
def test_ranking_changed(seed: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.rand(2, 2, 3, 6, generator=generator, dtype=torch.float64)
    after = before + 0.2 * torch.rand(before.shape, generator=generator, dtype=torch.float64)
    changed = ladder.ranking_changed(before, after, depth)
    for place in itertools.product(range(2), range(2), range(3)):
        rows = before[place].tolist(), after[place].tolist()
        old, new = (set(torch.tensor(row).argsort(descending=True)[:depth].tolist()) for row in rows)
        assert bool(changed[place]) == (old != new)


@pytest.mark.parametrize("seed", range(10))
def test_boundary_open(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(2, 2, 3, 6, generator=generator, dtype=torch.float64)
    shift = torch.rand(mass.shape, generator=generator, dtype=torch.float64)
    raised = torch.rand(2, 2, 6, generator=generator) < 0.5
    opened = ladder.boundary_open(mass, shift, raised)
    for b, h, r in itertools.product(range(2), range(2), range(3)):
        inside = [float(mass[b, h, r, n]) for n in range(6) if raised[b, h, n]]
        outside = [float(mass[b, h, r, n]) * math.exp(float(shift[b, h, r, n])) for n in range(6) if not raised[b, h, n]]
        wanted = max(outside, default=0.0) > min(inside, default=math.inf)
        assert bool(opened[b, h, r]) == wanted


def test_what_is_chosen_never_decides_what_is_met() -> None:
    """An infinite budget meets finite bounds only."""
    bound = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64)
    assert bounds.meets(bound, torch.full_like(bound, math.inf)).tolist() == [True, False, False]
