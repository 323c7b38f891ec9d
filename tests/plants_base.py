"""What planted bugs are made of: how one is applied, and the checks that must notice it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from plants_proof import steps_of_the_proof
from torch import Tensor

from hf_certkv import CertificateViolation, store
from hf_certkv.certificate import StepRecord
from hf_certkv.verify.cases import Case, call_on, examine, fill, judge, new_cache, problems, run
from hf_certkv.verify.kernel import using
from hf_certkv.verify.oracle import exact_errors, exact_norm


class Patch(Protocol):
    """What applies a bug and can take it back, such as `pytest.MonkeyPatch`."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute until the patch is undone."""


Apply = Callable[[Patch], None]
Detect = Callable[[], list[str]]


@dataclass(frozen=True)
class Plant:
    """A bug, and the check that finds it.

    Attributes: name; where: `"bound"`, `"codec"`, `"ladder"`, `"kernel"`, `"state"`, `"cpu"` or `"triton"`; text: the bug in
        words; apply: plants it; detect: breaches in words, none where nothing is planted.
    """

    name: str
    where: str
    text: str
    apply: Apply
    detect: Detect


def kind(where: str) -> Callable[[str, str, Apply, Detect], Plant]:
    """What makes plants of one kind from a name, the bug in words, what plants it and what finds it."""
    return lambda name, text, apply, detect: Plant(name, where, text, apply, under_the_reference(detect))


def under_the_reference(detect: Detect) -> Detect:
    """The same check of the reference kernel and of bounds.py: what patches these goes unseen by compiled code."""

    def other() -> list[str]:
        with using("reference"):
            return detect()

    return other


def results(target: Any, name: str, change: Callable[..., Any]) -> Apply:
    """A function whose result is changed: `change(result, *arguments)`."""

    def apply(patch: Patch) -> None:
        original = getattr(target, name)
        patch.setattr(target, name, lambda *args, **kwargs: change(original(*args, **kwargs), *args))

    return apply


def arguments(target: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> Apply:
    """A function that gets other arguments than it was given: `change(*arguments)`."""

    def apply(patch: Patch) -> None:
        original = getattr(target, name)
        patch.setattr(target, name, lambda *args, **kwargs: original(*change(*args), **kwargs))

    return apply


def instead(target: Any, name: str, other: Any) -> Apply:
    """Another function or number in the place of one."""
    return lambda patch: patch.setattr(target, name, other)


def of_the_codec(apply: Apply) -> Apply:
    """A bug in the codecs, which then write all blocks: where there is a compiled writer, it would hide the bug."""

    def both(patch: Patch) -> None:
        patch.setattr(store, "COMPILED", False)
        apply(patch)

    return both


def by_oracle(build: Callable[..., Case], *args: Any, **kwargs: Any) -> Detect:
    """A check: the case's output and record against the exact oracle, and audit where the case asks for it."""

    def detect() -> list[str]:
        try:
            return examine(build(*args, **kwargs)).breaches
        except CertificateViolation as error:
            return [str(error)]

    return detect


def by_proof(build: Callable[..., Case], *args: Any, **kwargs: Any) -> Detect:
    """A check: each inequality of the proof by itself, computed again in float64."""
    return lambda: steps_of_the_proof(build(*args, **kwargs))


def by_record(build: Callable[..., Case], *args: Any, **kwargs: Any) -> Detect:
    """A check: what the record says of the output against the output, and its true error against the exact one."""

    def detect() -> list[str]:
        case = build(*args, **kwargs)
        try:
            output, record, _ = run(case)
        except CertificateViolation as error:
            return [str(error)]
        return against_record(case, output, record)

    return detect


def against_record(case: Case, output: Tensor, record: StepRecord) -> list[str]:
    """Norms and audited errors that are not those of the output: float64 may be off by 2^-40 of what it adds up."""
    found = []
    size = float(case.values.double().norm(dim=-1).amax())
    for places, problem in problems(case):
        rows = torch.stack([output[place] for place in places])
        for place, row, error in zip(places, rows, exact_errors(problem, rows), strict=True):
            norm, told = float(exact_norm(row).mid()), float(record.norm[place])
            if not abs(norm - told) <= 2.0**-40 * norm:
                found.append(f"{place}: the output's norm is {norm!r}, the record says {told!r}")
            audited = float(record.error[place])
            if case.settings.get("audit") and error is not None and not abs(float(error.mid()) - audited) <= 2.0**-40 * size:
                found.append(f"{place}: the output's error is {float(error.mid())!r}, audit says {audited!r}")
    return found


def in_state(change: Callable[[Any, Case], tuple[Case, Tensor | None]], build: Callable[[], Case]) -> Detect:
    """A check: fill a cache, call once, change its state, call again, and judge the second output.

    Args: change: `change(cache, case)` returns the case that the cache is to stand for now, whose last token is still to come.
    """

    def detect() -> list[str]:
        case = build()
        cache = new_cache(case)
        call_on(case, *fill(cache, case))
        try:
            after, output = change(cache, case)
            if output is None:
                output = step(cache, after)
        except CertificateViolation as error:
            return [str(error)]
        cache.recorder.commit()
        return judge(after, output, cache.recorder.records[-1], cache.settings).breaches

    return detect


def step(cache: Any, case: Case) -> Tensor:
    """The last token of a case whose others the cache holds, and its call."""
    return call_on(case, *cache.update(case.keys[:, :, -1:], case.values[:, :, -1:], 0))


def longer(case: Case, keys: Tensor | None = None, values: Tensor | None = None, query: Tensor | None = None) -> Case:
    """A case of other tensors and one more token, the last one again."""
    keys = case.keys if keys is None else keys
    values = case.values if values is None else values
    return replace(
        case,
        query=case.query if query is None else query,
        keys=torch.cat([keys, keys[:, :, -1:]], dim=2),
        values=torch.cat([values, values[:, :, -1:]], dim=2),
    )
