"""The registry of planted bugs: each with the check that must notice it. No pytest in here: `certkv verify` uses it too."""

from __future__ import annotations

from plants_base import Plant
from plants_bound import BOUND
from plants_codec import CODEC
from plants_cpu import CPU
from plants_kernel import KERNEL
from plants_ladder import LADDER
from plants_state import STATE
from plants_triton import TRITON

PLANTS: dict[str, Plant] = {plant.name: plant for plant in (*BOUND, *CODEC, *LADDER, *KERNEL, *STATE, *CPU, *TRITON)}

__all__ = ["PLANTS", "Plant"]
