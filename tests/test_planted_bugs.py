"""Planted bugs in bound, codec, ladder, kernel and state: each must be noticed, and only where it is planted."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from plants import PLANTS
from plants_bound import BOUND
from plants_codec import CODEC
from plants_cpu import CPU
from plants_kernel import KERNEL
from plants_ladder import LADDER
from plants_state import STATE
from plants_triton import TRITON

LISTS = {"bound": BOUND, "codec": CODEC, "kernel": KERNEL, "ladder": LADDER, "state": STATE, "cpu": CPU}
if TRITON:  # where there is no triton, or it is not interpreted, there are none
    LISTS["triton"] = TRITON


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = PLANTS[name]
    assert plant.detect() == [], "the check must find nothing without the bug"
    plant.apply(monkeypatch)
    assert plant.detect(), f"not noticed: {plant.text}"


def test_there_are_enough_and_no_two_of_a_name() -> None:
    assert len(PLANTS) == sum(map(len, LISTS.values())) >= 100
    for where, plants in LISTS.items():
        assert len(plants) >= 10 and all(plant.where == where for plant in plants)
    assert max(Counter(plant.text for plant in PLANTS.values()).values()) <= 2


def test_plants_do_without_pytest() -> None:
    """A command applies them too, where no test runs."""
    for path in Path(__file__).parent.glob("plants*.py"):
        imported = {
            name.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in node.names
        }
        assert not imported & {"pytest", "_pytest", "conftest"}, path.name
