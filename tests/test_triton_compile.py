"""The Triton kernels of a step, compiled for GPUs without one: what the interpreter accepts and the compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
LARGEST_SHARED = 227 * 1024, 163 * 1024  # bytes that a program may have, by compute capability 9.0 and 8.0


def compiled(capability: int, *names: str) -> dict[str, Any]:
    """What `compile_kernels.py` says, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
    command = [sys.executable, str(SCRIPT), str(capability), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        (90, ("coded_pass", "coded_pass, 8-bit values", "float_pass", "mix", "merge", "bound")),
        (80, ("coded_pass", "coded_pass, masks")),
        (90, ("climb",)),
    ],
)
def test_kernels_compile(capability: int, names: tuple[str, ...]) -> None:
    """Each compiles and fits; the pass holds everything in registers, and its products are exact ones on tensor cores."""
    for name, found in compiled(capability, *names).items():
        assert found["shared"] <= LARGEST_SHARED[capability == 80], (name, found)
        if name.startswith("coded_pass"):
            assert found["spilled"] <= 64, (name, found)
            kinds = {product.split(".", 6)[-1] for product in found["products"]}
            assert any(kind.endswith("s32.s8.s8.s32") for kind in kinds), (name, kinds)
            assert any(kind.endswith("f32.f16.f16.f32") for kind in kinds), (name, kinds)
        # Sums in float16, and products of float32 numbers that were cut short, have no place in any kernel.
        assert not any(product.endswith("f16.f16.f16.f16") or ".tf32" in product for product in found["products"]), (
            name,
            found,
        )
