"""The adversarial search for the closest approach of an error to its bound. Every figure that counts is judged exactly.

Three moves: planted worst cases (planted.py); gradient ascent of log(error / bound) over queries, keys, values and biases, in a
float64 model of the call that reads codes through the package's own codecs and inequalities; and a climb in bit space, where
inputs of the model's dtype move by units in the last place, so that roundings come to point the same way. The model only says
where to look: what it proposes is snapped to the dtype, run through the public path and judged by the exact oracle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ladder import Rung
from . import kernel
from .cases import BITS, DENSE, Case, Verdict, judge
from .cases import run as run_case
from .parts import MOST_FAILURES, Clock, Part
from .planted import FAST, PLANTED
from .surrogate import Layout, leaves_of, modelled, snapped
from .witness import save_witness

FAMILIES = ("key sum", "key cap", "value triangle", "value spectral", "rounding", "output rounding", "promoted", "dense")
AT_LEAST = 6  # planted cases, where a call takes a second
CANDIDATES = 16  # of one step of the climb, as batch rows of one call
TRIED = 3  # of them alone, best first, until one is closer and of the same family
STEPS = 40  # of one ascent
# Budgets around a bound: the ladder's choices at the edge, one unit in the last place to either side, and well below it.
EDGES = (1.0, math.nextafter(1.0, 2.0), math.nextafter(1.0, 0.0), 0.999, 0.5, 0.1, 0.01)


def ascend(case: Case, layout: Layout, generator: torch.Generator, steps: int = STEPS) -> Case:
    """Adam on the model's log(error / bound), in units of each leaf's own size; the best point met, snapped to the dtype."""
    base = {name: leaf.detach() for name, leaf in leaves_of(case).items()}
    unit = {name: leaf.where(leaf.isfinite(), 0.0).abs().mean().clamp_min(1e-30) for name, leaf in base.items()}
    moves = {name: torch.zeros_like(leaf, requires_grad=True) for name, leaf in base.items()}
    rate = 10 ** (-2 + 1.5 * float(torch.rand((), generator=generator)))
    adam = torch.optim.Adam(list(moves.values()), lr=rate)
    best, found = -math.inf, case
    for _ in range(steps):
        leaves = {name: base[name] + unit[name] * move for name, move in moves.items()}
        height = modelled(case, layout, leaves).log_share()
        if height.item() > best:
            best, found = height.item(), snapped(case, {name: leaf.detach() for name, leaf in leaves.items()})
        adam.zero_grad()
        (-height).backward()
        for move in moves.values():
            assert move.grad is not None
            if not bool(move.grad.isfinite().all()):  # a kink, or nothing to differentiate: any direction will do
                move.grad = torch.randn(move.shape, generator=generator, dtype=move.dtype).to(move.device)
        adam.step()
    return found


def drawn(generator: torch.Generator) -> Case:
    """A random start: any dtype, format and shape that is small, sizes over many decades, sometimes mask, softcap and sinks."""

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype, block = pick(*BITS), pick(16, 16, 16, 32)
    heads, groups = pick((1, 1), (1, 1), (1, 2), (2, 1), (2, 2))
    channels, width = pick(1, 1, 2, 3, 8, 16), pick(1, 1, 2, 5, 8, 16)
    tokens = block * pick(1, 1, 2, 3) + pick(1, 1, 2, 9)
    query = normal(1, heads * groups, 1, channels) * pick(0.0, 0.1, 1.0, 10.0)
    keys = normal(1, heads, tokens, channels) * pick(0.1, 1.0, 10.0) + pick(0.0, 0.0, 30.0, 3000.0)
    values = normal(1, heads, tokens, width) * pick(1e-3, 1.0, 30.0) + pick(0.0, 0.0, 100.0)
    if pick(True, False, False, False):  # far outside what the codes can hold
        far = pick(1e6, 1e10) if dtype != torch.float16 else 6e4
        keys, query = keys * far, query / far
        values = values * pick(1.0, far)
    if pick(True, False):  # opposite clusters
        side = torch.where(normal(1, heads, tokens, 1) > 0, 1.0, -1.0)
        values, keys = side * values.abs(), side * keys.abs()
    mask = (3 * normal(1, 1, 1, tokens)).to(pick(dtype, torch.float32)) if pick(True, True, False) else None
    settings = {
        **FAST,
        "block_size": block,
        "value_bits": pick(4, 8),
        "value_group": pick(None, 0, 3, 4),
        "refine": pick("off", "host", "device"),
        "scope": pick("head", "layer"),
        "hot_blocks": pick(0, 2),
    }
    sinks = normal(heads * groups).to(dtype) * 2 if pick(True, False, False, False) else None
    softcap = pick(None, None, None, 1.0, 30.0)
    case = Case(query, keys, values, mask, pick(None, 1.0, 0.3), softcap, sinks, settings)
    most = torch.finfo(dtype).max
    return replace(case, **{name: getattr(case, name).clamp(-most, most).to(dtype) for name in ("query", "keys", "values")})


def nudged(part: Tensor, generator: torch.Generator, reach: int) -> Tensor:
    """Some entries moved by up to 2^j units in the last place, j below `reach`: one entry, one row, one channel or all.

    What is infinite stays, and nothing becomes infinite.
    """

    def below(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    where = torch.zeros(part.shape, dtype=torch.bool)
    kind, row, channel = below(5), below(part.shape[-2]), below(part.shape[-1])
    if kind == 0:
        where[..., row, :] = True
    elif kind == 1:
        where[..., channel] = True
    elif kind == 2:
        where[:] = True
    elif kind == 3:
        where = torch.rand(part.shape, generator=generator) < 0.3
    else:
        where[..., row, channel] = True
    mantissa = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23}[part.dtype]
    size = 2 ** below(min(reach, mantissa + 1))
    sign = 1 if below(2) else -1
    steps = torch.full(part.shape, sign * size)
    if below(2):  # each its own way
        steps = torch.randint(-size, size + 1, part.shape, generator=generator)
    integer = BITS[part.dtype]
    info = torch.iinfo(integer)
    moved = (part.view(integer).long() + steps).clamp(info.min, info.max).to(integer).view(part.dtype)
    return torch.where(where & moved.isfinite() & part.isfinite(), moved, part)


@dataclass(frozen=True)
class Found:
    """A case that was run and judged.

    Attributes: name: where it came from; share: error / bound of its closest row; bound: recorded for that row; family: the
        part of the bound that is the largest there.
    """

    name: str
    case: Case
    verdict: Verdict
    share: float
    bound: float
    layout: Layout
    family: str


class Search:
    """The state of one search. All cases have one position.

    Attributes: part: what is reported; best: the closest approach of each family; lanes: how far each planted case has come;
        evaluations: calls that were run; restarts: ascents; undecided: calls that the oracle could not judge.
    """

    def __init__(self, device: torch.device, seed: int, save_to: Path | None) -> None:
        self.device, self.save_to = device, save_to
        self.generator = torch.Generator().manual_seed(seed)
        self.part = Part("search", "an adversary does not get an error above its bound", "head-steps")
        self.best: dict[str, Found] = {}
        self.lanes: dict[str, Found] = {}
        self.evaluations = self.restarts = self.undecided = 0

    def judged(self, case: Case, name: str) -> Found:
        """Run and judge a case, count it, and keep it if it is a breach, or closer than its family has come."""
        output, record, cache = run_case(case.to(self.device))
        self.evaluations += 1
        try:
            verdict = judge(case, output.cpu(), record, cache.settings)
        except ArithmeticError:  # scores so large that no number of bits decides: left out, and counted
            self.undecided += 1
            verdict = Verdict([], 0.0, None, 0, np.zeros(record.bound.shape))
        # A share is rounded up, and only so far known; whether it is above 1 is decided apart.
        share = verdict.share if verdict.breaches else min(verdict.share, 1.0)
        self.part.checked += verdict.head_steps
        if missed := kernel.missed(record, cache.settings):
            self.part.fail(f"{name}: {missed}")
        for breach in verdict.breaches:
            self.part.fail(f"{name}: {breach}")
        if verdict.breaches and self.save_to is not None and self.part.failed <= MOST_FAILURES:
            save_witness(self.save_to / f"breach-{self.part.failed}.safetensors", case, verdict, name)
        layout, bound, family = Layout.of(cache), 0.0, "none"
        if verdict.where is not None and len(case.query) == 1:
            bound = float(record.bound[verdict.where])
            family = self.family(case, layout, Rung(int(record.rung[verdict.where])), verdict.where)
        found = Found(name, case, verdict, share, bound, layout, family)
        if family in FAMILIES and (family not in self.best or share > self.best[family].share):
            self.best[family] = found
        return found

    def family(self, case: Case, layout: Layout, rung: Rung, where: tuple[int, int, int]) -> str:
        """Which part of the bound is the largest, where everything is at its base level; else the rung."""
        if rung != Rung.FAST:
            return "dense" if rung in DENSE else "promoted"
        with torch.no_grad():
            parts = modelled(case, layout, leaves_of(case)).parts
        row = where[1]
        return max(parts, key=lambda name: float(parts[name].flatten()[row].nan_to_num()))

    def climb(self, found: Found, steps: int, clock: Clock) -> Found:
        """Bit-space climb: the best of some nudged copies, confirmed alone, until the steps or the time are used up.

        It stays in the family, which would else be left for another whose bound is easier to come near.
        """
        for _ in range(steps):
            if clock.over():
                break
            reach = (2, 7, 24)[self._below(3)]
            copies = [self._nudge(found.case, reach) for _ in range(4 if kernel.slow() else CANDIDATES)]
            stacked: dict[str, Any] = {part: torch.cat([copy[part] for copy in copies]) for part in copies[0]}
            batch = replace(found.case, scale=self._nudge_scale(found.case), **stacked)
            shares = self.judged(batch, found.name).verdict.shares.reshape(len(copies), -1).max(axis=1, initial=0.0)
            for row in np.argsort(-shares)[:TRIED].tolist():
                if shares[row] <= found.share:
                    break
                winner = replace(batch, **{part: stacked[part][row : row + 1].clone() for part in stacked})
                alone = self.judged(winner, found.name)
                if alone.share > found.share and alone.family == found.family:
                    found = alone
                    break
        return found

    def _below(self, most: int) -> int:
        return int(torch.randint(most, (), generator=self.generator))

    def _nudge(self, case: Case, reach: int) -> dict[str, Tensor]:
        """The tensors of a case, one or two of them nudged."""
        parts = {name: getattr(case, name) for name in leaves_of(case)}
        for _ in range(1 + self._below(2)):
            name = list(parts)[self._below(len(parts))]
            parts[name] = nudged(parts[name], self.generator, reach)
        return parts

    def _nudge_scale(self, case: Case) -> float | None:
        if case.scale is None or self._below(3):
            return case.scale
        step = 2.0 ** -(8 + self._below(45))
        return case.scale * (1 + step * (1 if self._below(2) else -1))

    def edges(self, found: Found, clock: Clock | None = None) -> None:
        """The same call with its budget at its bound, a unit in the last place to either side, and below: promotions, ties."""
        for edge in EDGES:
            if clock is not None and kernel.slow() and clock.over():
                break
            atol = found.bound / (1 - 2.0**-30) * edge  # `head_budget` rounds down by this factor   [section 1]
            if 0 < atol <= FAST["atol"]:
                settings = {**found.case.settings, "atol": atol, "rtol": 0.0}
                self.judged(replace(found.case, settings=settings), f"{found.name}, budget {edge}")

    def plant(self, clock: Clock | None = None) -> None:
        """Judge every planted worst case. Where a call takes a second: some of them, other ones with another seed."""
        names = list(PLANTED)
        if kernel.slow():
            names = [names[i] for i in torch.randperm(len(names), generator=self.generator).tolist()]
        for number, name in enumerate(names):
            if clock is not None and kernel.slow() and number >= AT_LEAST and clock.over():
                break
            build = PLANTED[name]
            found = self.judged(kernel.shaped(build()), name)
            if not found.verdict.breaches:
                self.lanes[name] = found
            if kernel.chosen() == "auto":
                wide = self.judged(kernel.widened(build()), f"{name}, wide")
                if not wide.verdict.breaches:
                    self.lanes[wide.name] = wide

    def restart(self, clock: Clock) -> None:
        """A random start, an ascent, a few steps in bit space, and the edges of its budget."""
        self.restarts += 1
        case = drawn(self.generator)
        if kernel.chosen() == "auto" and self.restarts % 2:
            case = kernel.widened(case)
        start = self.judged(kernel.shaped(case), f"start {self.restarts}")
        found = self.judged(ascend(start.case, start.layout, self.generator), f"ascent {self.restarts}")
        if not found.verdict.breaches:
            self.edges(self.climb(found, 2, clock), clock)

    def pursue(self, clock: Clock) -> None:
        """Climb on from a planted case, or from the closest approach of a family; now and then to the edges of its budget."""
        open_families = [found for found in self.best.values() if not found.verdict.breaches]
        lane = self._below(2) or not open_families
        choices = list(self.lanes.values()) if lane else open_families
        if not choices:  # every planted case is a breach
            return
        found = self.climb(choices[self._below(len(choices))], 6, clock)
        if lane:
            self.lanes[found.name] = found
        if not self._below(5):
            self.edges(self.judged(replace(found.case, settings={**found.case.settings, **FAST}), found.name), clock)

    def report(self) -> Part:
        """Figures, and witnesses where they are wanted: the closest approach, and that of each family."""
        figures: dict[str, Any] = {name: getattr(self, name) for name in ("evaluations", "restarts", "undecided")}
        families = {name: self.best[name] for name in FAMILIES if name in self.best}
        figures["by_family"] = {name: {"share": found.share, "case": found.name} for name, found in families.items()}
        closest = max(families.values(), key=lambda found: found.share, default=None)
        if closest is not None:
            figures["largest_error_over_bound"] = closest.share
            figures["closest"] = {"share": closest.share, "case": closest.name, "family": closest.family}
            if self.save_to is not None:
                for name, found in {**families, "closest": closest}.items():
                    path = self.save_to / f"{name.replace(' ', '-')}.safetensors"
                    save_witness(path, found.case, replace(found.verdict, share=found.share), found.name)
                figures["witness"] = "closest.safetensors"
        self.part.figures = figures
        return self.part


def run(clock: Clock, device: torch.device, seed: int, save_to: Path | None = None) -> Part:
    """Search until the clock is over; at least every planted case and one ascent. The same seed and work find the same.

    Args: save_to: a folder for witnesses: `closest.safetensors`, one a family, and `breach-*.safetensors`.
    """
    search = Search(device, seed, save_to)
    search.plant(clock)
    search.restart(clock)
    while not clock.over():
        for _ in range(3):
            search.pursue(clock)
        if not clock.over():
            search.restart(clock)
        closest = max((found.share for found in search.best.values()), default=0.0)
        clock.tell(f"closest approach {closest:.7f}, {search.evaluations} calls")
    part = search.report()
    part.seconds = clock.spent
    return part
