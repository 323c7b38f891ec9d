"""The long runs of the soundness laboratory behind docs/soundness.md: `python -m benchmarks.soundness NAME`, one at a time.

`random` takes a quarter of an hour on one core, the others some minutes each; `benchmarks.rounding` is the exhaustive check
of this machine's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import save
from hf_certkv.verify import faults_steps
from hf_certkv.verify.faults_operations import operations
from hf_certkv.verify.parts import Clock
from hf_certkv.verify.scorecard import verify

WITNESSES = Path(__file__).parent / "witnesses"
HEAD_STEPS = 1_000_000
EVERY = (1,)  # stride


def attacks() -> dict[str, Any]:
    """Each part with minutes of its own; planted bugs until all are done."""
    parts: dict[str, Any] = {}
    for name, minutes in (("search", 4.0), ("relations", 0.5), ("bit flips", 1.5), ("failures", 2.0), ("planted bugs", 15.0)):
        card = verify(minutes, only=(name,), save_to=WITNESSES if name == "search" else None)
        parts |= card.to_dict()["parts"]
    return {"parts": parts, "passed": all(part["passed"] for part in parts.values())}


def every_point() -> dict[str, Any]:
    """A decode step of a model of two layers: every allocation refused in turn, and Ctrl-C at every line."""
    device = torch.device("cpu")
    chosen = [one for one in operations(device, 0) if one.name == "a decode step"]
    clock = Clock(float("inf"))
    parts = [
        run(clock, device, 0, strides=EVERY, every=chosen)
        for run in (faults_steps.run_allocations, faults_steps.run_interrupts)
    ]
    return {"parts": {part.name: asdict(part) for part in parts}, "passed": all(part.passed for part in parts)}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "random": lambda: verify(60.0, only=("fuzz",), head_steps=HEAD_STEPS).to_dict(),
    "attacks": attacks,
    "every_point": every_point,
}


def main(name: Annotated[str, typer.Argument(help=f"one of {', '.join(RUNS)}")]) -> None:
    """Make one of the runs and save it."""
    if name not in RUNS:
        raise typer.BadParameter(f"{name!r}: expected one of {', '.join(RUNS)}")
    torch.set_num_threads(1)
    result = RUNS[name]()
    result.pop("machine", None)
    print(save(f"soundness_{name}", result), "passed" if result["passed"] else "FAILED")
    raise typer.Exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    typer.run(main)
