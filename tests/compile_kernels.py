"""Compiles the Triton kernels of a step for GPUs that need not be there. Run as a script: prints what ptxas says as JSON.

Arguments: a compute capability, and kernels by name. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_certkv.kernels import triton_climb, triton_kernels, triton_pass, triton_step

TYPES = {
    "*bf16": ("query", "exact_keys", "exact_values", "hot_keys", "hot_values", "result", "like"),
    "*u8": ("key_codes", "value_codes", "key_plane", "value_plane"),
    "*fp16": ("key_scale", "key_offset", "value_scale", "value_offset"),
    "*i16": ("lengths",),
    "*i32": ("levels", "key_level", "value_level", "hot_level", "dense", "trouble", "chosen"),
    "*i64": ("slabs", "page_sums", "key_multipliers", "value_multipliers", "hot_blocks"),
    "*fp64": (
        "exact_norms", "tops", "mixed", "facts", "figures", "partials", "unit_norms", "settings", "prices", "bias_size",
        "wanted", "counts",
    ),
    "*fp32": (
        "key_numbers", "value_numbers", "block_bias", "exact_bias", "sink", "maximum", "sums", "output", "l1", "l2", "errors",
        "slips", "squares", "middle",
    ),
    "fp32": ("scaling", "softcap"),
}  # fmt: skip
HEAD = {"USED": 4, "CHANNELS": 128, "WIDTH": 128, "WIDE_VALUES": 128}
CALL = {"SOFTCAP": False, "BIAS": False}
FOUR = {"FOUR": True, "GROUPS": 4, "GROUP": 32, "COLUMNS": 32, "CHUNKS": 2, "DIGIT": 11, "COUNT": 7}
EIGHT = {"FOUR": False, "GROUPS": 1, "GROUP": 128, "COLUMNS": 128, "CHUNKS": 1, "DIGIT": 11, "COUNT": 4}
TILES = {"TILE": triton_step.TILE, "FEW": triton_step.FEW}
PASS = {**CALL, "USED": 4, "FEW": 4, "CHANNELS": 128, "WIDE": 128, "WIDTH": 128, "TOKENS": 64}
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "coded_pass": (triton_pass.coded_pass, {**PASS, **FOUR}, triton_step.WARPS),
    "coded_pass, 8-bit values": (triton_pass.coded_pass, {**PASS, **EIGHT}, triton_step.WARPS),
    "coded_pass, masks": (triton_pass.coded_pass, {**PASS, **FOUR, "SOFTCAP": True, "BIAS": True}, triton_step.WARPS),
    "float_pass": (
        triton_pass.float_pass,
        {**CALL, **HEAD, "HOT": True, "ROWS": 16, "FEW": 4, "WIDE": 128, "TOKENS": 64, "GROUPS": 4},
        4,
    ),
    "mix": (triton_kernels.mix_kernel, {"USED": 4, "WIDTH": 128, "WIDE_VALUES": 128, "CHUNK": triton_step.CHUNK}, 4),
    "merge": (
        triton_kernels.merge_kernel,
        {**HEAD, **TILES, "WIDE": 128, "SOFTCAP": False, "SUNK": True, "KEY_COUNT": 7, "COUNT": 7},
        4,
    ),
    "bound": (
        triton_kernels.bound_kernel,
        {**HEAD, "TOKENS": 64, "KEY_COUNT": 7, "COUNT": 7, "CHUNK": triton_step.CHUNK},
        8,
    ),
    "climb": (
        triton_climb.climb,
        {
            **HEAD, **CALL, **TILES, "WIDE": 128, "CERTIFIED": True, "SUNK": False, "ROWS": 16, "FEW_ROWS": 4, "TOKENS": 64,
            "FOUR": True, "GROUPS": 4, "GROUP": 32, "KEY_COUNT": 7, "COUNT": 7, "KEY_PLANE": True, "VALUE_PLANE": True,
            "ITEM": 2,
            "CHUNK": triton_step.CHUNK,
        },
        4,
    ),
}  # fmt: skip


def type_of(name: str, constants: dict[str, Any]) -> str:
    """The type of an argument, by its name; whole numbers unless it is listed."""
    if name in constants:
        return "constexpr"
    return next((kind for kind, names in TYPES.items() if name in names), "i32")


def compiled(name: str, capability: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared bytes of a kernel, and which tensor core instructions it has."""
    kernel, constants, warps = KERNELS[name]
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: type_of(name, constants) for name in names}
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": triton_step.STAGES}
    )
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(made.asm["ptx"])
        command = [str(assembler), "-v", f"-arch={target.group(1)}", str(path), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spilled is not None and registers is not None, said
    products = sorted(set(re.findall(r"mma\.sync\.aligned\.\w+\.row\.col\.\S+", made.asm["ptx"])))
    return {
        "registers": int(registers.group(1)),
        "spilled": int(spilled.group(1)),
        "shared": made.metadata.shared,
        "products": products,
    }


if __name__ == "__main__":
    chosen = sys.argv[2:] or list(KERNELS)
    print(json.dumps({name: compiled(name, int(sys.argv[1])) for name in chosen}))
