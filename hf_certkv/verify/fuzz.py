"""Random decodes against the exact oracle, without slack: the largest part of the laboratory.

Every call of every decode (generate.py) is judged as docs/certificate.md, section 1, has it: the error is at most the bound,
and the bound at most the tolerance, unless the head is dense; and a dense head's bound (section 5) holds too.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..codecs import ValueCodec
from ..kernels import cpu
from ..ladder import Rung
from . import kernel
from .cases import DENSE, Verdict, judge
from .generate import Served, Story, random_story, seeded, walk
from .parts import Clock, Part

CHUNK = 8  # stories that are told before anyone looks at the clock; one, where a call takes seconds
TIGHT = 1e-3  # a share of the bound from which on a certificate was worth the attack
ATTEMPTS = 6  # words kept of one story's breaches


def reproduce(seed: int, index: int) -> Story:
    """The story of an index, whatever was drawn before it."""
    return random_story(seeded(seed, index))


@dataclass
class Tally:
    """What was found, mergeable.

    Attributes: counts: head-steps by (kind, name); largest: the largest error / bound by (kind, name), and the place that
        reproduces it; breaches: in words.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    largest: dict[tuple[str, str], tuple[float, dict[str, Any]]] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)

    def merge(self, other: Tally) -> None:
        """Add what was found elsewhere; of equal shares the earlier one stays."""
        self.counts.update(other.counts)
        self.breaches += other.breaches
        for name, found in other.largest.items():
            self.see(name, *found)

    def see(self, name: tuple[str, str], share: float, place: dict[str, Any]) -> None:
        """Note an error / bound."""
        if name not in self.largest or share > self.largest[name][0]:
            self.largest[name] = (share, place)

    @property
    def head_steps(self) -> int:
        """All of them."""
        return self.counts["all", "all"]

    def by(self, kind: str) -> dict[str, int]:
        """Head-steps of one kind, by name."""
        return {name: count for (of, name), count in sorted(self.counts.items()) if of == kind}

    def largest_by(self, kind: str) -> dict[str, dict[str, Any]]:
        """The largest error / bound of one kind, by name, with what reproduces it."""
        found = {name: {"share": share, **place} for (of, name), (share, place) in self.largest.items() if of == kind}
        return dict(sorted(found.items()))


def labels(story: Story, served: Served) -> dict[str, str]:
    """What a call is counted under, by kind."""
    settings, query = served.config, served.case.query
    values = f"int{settings.value_bits}" + ("" if settings.refine == "off" else f" + plane on the {settings.refine}")
    return {
        "all": "all",
        "format": f"{values}, block {settings.block_size}",
        "value_group": "default" if settings.value_group is None else str(settings.value_group or "head"),
        "dtype": str(query.dtype).removeprefix("torch."),
        "kernel": kernel_of(served),
        "policy": settings.policy,
        "scope": settings.scope,
        "regime": story.regime,
        "mask": story.mask,
        "query_heads_per_kv_head": str(query.shape[1] // served.case.keys.shape[1]),
        "positions": "packed" if story.packed else str(query.shape[2]),
        "call": "first" if served.number == 0 else "later",
    }


def kernel_of(served: Served) -> str:
    """What computed a call: the Triton kernels if the record says so, the CPU kernel where it is wanted and takes the sizes."""
    if served.record.kernel == "triton":
        return "triton"
    settings, softcap = served.config, served.case.softcap
    codec = ValueCodec(settings.value_bits, settings.value_scale_channels, False)
    fits = cpu.fits(codec, (served.case.keys.shape[-1], served.case.values.shape[-1])) and softcap != 0
    wanted = kernel.chosen() != "reference" and settings.kernel != "reference" and cpu.installed()
    return "cpu" if fits and wanted else "reference"


def told(seed: int, index: int, device: torch.device) -> Tally:
    """One story, judged call by call. Whatever it raises is a breach: nothing that is drawn is unfit."""
    tally = Tally()
    try:
        story = reproduce(seed, index)
        for served in walk(story, device):
            verdict = judge(served.case, served.output, served.record, served.config)
            _count(tally, {"seed": seed, "index": index, "call": served.number}, labels(story, served), served, verdict)
            if missed := kernel.missed(served.record, served.config):
                tally.breaches.append(f"seed {seed}, index {index}, call {served.number}: {missed}")
    except Exception as error:
        tally.breaches.append(f"seed {seed}, index {index}: {type(error).__name__}: {error}")
    return tally


def _count(tally: Tally, place: dict[str, Any], names: dict[str, str], served: Served, verdict: Verdict) -> None:
    rungs = served.record.rung
    for kind, name in names.items():
        tally.counts[kind, name] += verdict.head_steps
    for rung in Rung:
        tally.counts["rung", rung.name.lower()] += int((rungs == rung).sum())
    dense = np.isin(rungs, DENSE)
    tight = (verdict.shares > TIGHT) & ~dense & (rungs != Rung.UNCERTIFIED)
    tally.counts["kind", "certified and tight"] += int(tight.sum())
    for kind, part in (("served", ~dense), ("dense", dense)):
        if part.any():
            shares = np.where(part, verdict.shares, -1.0)
            at = tuple(int(i) for i in np.unravel_index(int(shares.argmax()), shares.shape))
            of = [("all", kind)] + [
                (f"{kind} {name}", names[name]) for name in ("format", "regime", "policy", "dtype", "kernel")
            ]
            for key in of:
                tally.see(key, float(shares[at]), {**place, "batch_row": at[0], "query_head": at[1], "position": at[2]})
    words = [f"seed {place['seed']}, index {place['index']}, call {place['call']}: {breach}" for breach in verdict.breaches]
    tally.breaches += words[:ATTEMPTS]


def chunk() -> int:
    """Stories at a time."""
    return 1 if kernel.slow() else CHUNK


def run(clock: Clock, device: torch.device, seed: int, head_steps: int | None = None, workers: int = 1) -> Part:
    """Stories 0, 1, 2, ... of a seed until the clock is over, or so many head-steps are judged.

    Results are taken in the order of the indices, so what is found depends on how far it gets and not on `workers`.
    """
    part = Part("fuzz", "no output is further from the exact one than its bound, no bound above its tolerance", "head-steps")
    tally = Tally()
    stories = 0
    for found in _chunks(seed, device, workers):
        tally.merge(found)
        stories += chunk()
        share = None if head_steps is None else max(clock.spent / max(clock.seconds, 1e-9), tally.head_steps / head_steps)
        clock.tell(f"{tally.head_steps:,} head-steps, {len(tally.breaches)} breaches", share)
        if clock.over() or (head_steps is not None and tally.head_steps >= head_steps):
            break
    part.checked = tally.head_steps
    for breach in tally.breaches:
        part.fail(breach)
    part.figures = figures(tally, seed, stories)
    part.seconds = clock.spent
    return part


def figures(tally: Tally, seed: int, stories: int) -> dict[str, Any]:
    """What is reported, in plain JSON types."""
    rungs = tally.by("rung")
    total = max(1, tally.head_steps)
    certified = sum(rungs.get(rung.name.lower(), 0) for rung in (Rung.FAST, Rung.KEYS, Rung.VALUES))
    dense = sum(rungs.get(rung.name.lower(), 0) for rung in DENSE)
    largest = tally.largest_by("all")
    kinds = (
        "format",
        "value_group",
        "dtype",
        "policy",
        "scope",
        "kernel",
        "regime",
        "mask",
        "query_heads_per_kv_head",
        "positions",
        "call",
    )
    return {
        "seed": seed,
        "stories": stories,
        "breaches": len(tally.breaches),
        "certified_share": certified / total,
        "certified_and_tight_share": tally.counts["kind", "certified and tight"] / total,
        "dense_share": dense / total,
        "largest_error_over_bound": largest.get("served", {"share": 0.0})["share"],
        "head_steps_by": {"rung": rungs, **{kind: tally.by(kind) for kind in kinds}},
        "largest_share_of_bound": largest,
        "largest_share_by_format": tally.largest_by("served format"),
        "largest_share_by_regime": tally.largest_by("served regime"),
        "largest_share_by_policy": tally.largest_by("served policy"),
        "largest_share_by_dtype": tally.largest_by("served dtype"),
        "largest_share_by_kernel": tally.largest_by("served kernel"),
        "largest_share_of_dense_by_dtype": tally.largest_by("dense dtype"),
    }


def _begin(wanted: str) -> None:
    """In a worker: one thread, and the kernel that is looked at."""
    torch.set_num_threads(1)
    kernel.start(wanted)


def _told(seed: int, number: int, device: str) -> Tally:
    tally = Tally()
    for index in range(number * chunk(), (number + 1) * chunk()):
        tally.merge(told(seed, index, torch.device(device)))
    return tally


def _chunks(seed: int, device: torch.device, workers: int) -> Iterator[Tally]:
    """Chunks in order, without end; from other processes where there are several workers."""
    number = 0
    if workers <= 1:
        while True:
            yield _told(seed, number, str(device))
            number += 1
    context = multiprocessing.get_context("spawn")
    # One thread each: they share the cores already, and sums are in the same order on any machine.
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(kernel.chosen(),)) as pool:
        waiting: deque[Future[Tally]] = deque()
        try:
            while True:
                while len(waiting) < 2 * workers:
                    waiting.append(pool.submit(_told, seed, number, str(device)))
                    number += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
