"""Planted bugs: the laboratory must notice every one. They live in the repository's tests, not in the package."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import kernel
from .parts import Clock, Part

TESTS = Path(__file__).parents[2] / "tests"


class Patches:
    """Attributes set for a while: what `pytest.MonkeyPatch` is to a test."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute until `undo`."""
        self._before.append((target, name, target.__dict__.get(name, self)))
        setattr(target, name, value)

    def undo(self) -> None:
        """Put everything back."""
        for target, name, value in reversed(self._before):
            if value is self:  # it was inherited
                delattr(target, name)
            else:
                setattr(target, name, value)
        self._before.clear()


def load() -> ModuleType | None:
    """The registry of plants, or None where the package does not lie in a checkout of the repository."""
    if not (TESTS / "plants.py").is_file():
        return None
    sys.path.insert(0, str(TESTS))
    try:
        return importlib.import_module("plants")
    finally:
        sys.path.remove(str(TESTS))


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """Plant every bug in turn (at least one of each kind when the clock is over) and see that its check notices it.

    Runs on the CPU, whatever the device. With the Triton kernels: bugs in these, which begin elsewhere with another seed.
    """
    part = Part("planted bugs", "every planted bug is caught, and without it the same check finds nothing", "bugs")
    registry = load()
    if registry is None:
        part.skipped = "they are in the repository's tests: run this from a clone"
        return part
    plants = list(registry.PLANTS.values())
    if kernel.chosen() == "triton":
        plants = [plant for plant in plants if plant.where == "triton"]
        if not plants:
            part.skipped = "bugs in the Triton kernels are planted in the interpreter: TRITON_INTERPRET=1, on the CPU"
            return part
        plants = plants[7 * seed % len(plants) :] + plants[: 7 * seed % len(plants)]
    slowest: tuple[float, str] = (0.0, "")
    kinds: dict[str, int] = {}
    for place, plant in enumerate(plants):
        if clock.over() and kinds.get(plant.where):
            continue
        clock.tell(plant.name, place / len(plants))
        start = time.monotonic()
        patches = Patches()
        if plant.detect():
            part.fail(f"{plant.name}: its check complains without the bug")
        try:
            plant.apply(patches)
            caught = bool(plant.detect())
        finally:
            patches.undo()
        if not caught:
            part.fail(f"{plant.name}: {plant.text} was not noticed")
        part.checked += 1
        kinds[plant.where] = kinds.get(plant.where, 0) + 1
        slowest = max(slowest, (time.monotonic() - start, plant.name))
    caught_in_all = part.checked - part.failed
    part.figures = {"planted": len(plants), "caught": caught_in_all, "by kind": kinds, "slowest": slowest[1]}
    return part
