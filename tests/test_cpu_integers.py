"""Codes multiplied as integers: no score, and no sum of values, is farther from the exact one than is said of it. No slack."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from hf_certkv import bounds, codecs
from hf_certkv.kernels import compiling, micro_integers

if not micro_integers.supported():
    pytest.skip("this processor does not multiply bytes four at a time", allow_module_level=True)

from hf_certkv.kernels import cpu_integers, memory, micro_integer_values
from hf_certkv.kernels.cpu_pass import TASK

ROWS = micro_integers.ROWS
WORDS, FACTS = micro_integers.WORDS, micro_integers.FACTS
_task = memory.reader(TASK)


@compiling.kernel()
def _scores(query: int, grid: int, keys: int, rows: int, channels: int, tokens: int, room: int, facts: int, out: int) -> None:
    for r in range(rows):
        micro_integers.key_digits(query, r * channels, grid, 0, channels, room, r * WORDS, rows * WORDS, facts, r * FACTS)
    turned = room + rows * channels // 4 * WORDS
    for t in range(0, tokens, 16):
        if rows == 1:
            micro_integers.dots_integers_1(keys, t * channels, room, 0, facts, 0, channels, out, t, tokens, turned, 0)
        else:
            micro_integers.dots_integers(keys, t * channels, room, 0, facts, 0, channels, out, t, tokens, turned, 0)


@compiling.kernel()
def _units(task: int, scale: int, offset: int, steps: int, starts: int, units: int) -> float:
    return cpu_integers._value_units(_task(task), scale, offset, steps, starts, units)


@compiling.kernel()
def _values(weights: int, codes: int, rows: int, bits: int, groups: int, per: int, tokens: int, width: int, room: int,
            steps: int, starts: int, units: int, constants: int, out: int) -> None:  # fmt: skip
    if rows == 1:
        micro_integer_values.weight_digits_1(weights, 0, steps, starts, groups, tokens, room, constants)
        if bits == 8:
            micro_integer_values.gather_bytes_1(codes, 0, room, constants, units, per, tokens, out, 0, width)
        else:
            micro_integer_values.gather_nibbles_1(codes, 0, room, constants, units, per, tokens, out, 0, width)
    else:
        micro_integer_values.weight_digits(weights, 0, steps, starts, groups, tokens, room, constants)
        if bits == 8:
            micro_integer_values.gather_bytes(codes, 0, room, constants, units, per, tokens, out, 0, width)
        else:
            micro_integer_values.gather_nibbles(codes, 0, room, constants, units, per, tokens, out, 0, width)


def numbers(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """float32 numbers of a regime."""
    x = generator.standard_normal(shape)
    if kind == "outlier":
        x[..., 3] *= 1e4
    elif kind == "many sizes":
        x = x * 10.0 ** generator.uniform(-30, 4, shape)
    elif kind == "tiny":
        x = x * 1e-37
    elif kind == "huge":
        x = x * 1e30
    elif kind == "equal":
        x = np.ones(shape)
    elif kind == "zeros":
        x = np.zeros(shape)
    return x.astype(np.float32)


FORMS = [(4, 32, 128), (4, 16, 64), (4, 64, 64), (4, 48, 96), (8, 128, 128), (8, 16, 48)]  # bits of values, group, width
KINDS = ("normal", "outlier", "many sizes", "tiny", "huge", "equal", "zeros")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_scores(channels: int, rows: int, kind: str) -> None:
    tokens = 32
    for seed in range(6):
        generator = np.random.default_rng(seed)
        query = numbers(kind, (rows, channels), generator)
        scale = (
            np.abs(numbers(("normal", "outlier", "equal")[seed % 3], (channels,), generator)).clip(0, 6e4).astype(np.float16)
        )
        offset = (
            (100 * numbers(("normal", "outlier", "zeros")[seed % 3], (channels,), generator)).clip(-6e4, 6e4).astype(np.float16)
        )
        grid = np.concatenate([scale, offset]).astype(np.float32)
        codes = generator.integers(0, 256, (tokens, channels)).astype(np.uint8)
        if seed == 5:  # all products of the largest digits, the same way
            codes[:] = np.where(query[0] > 0, 255, 0)
        room = np.zeros(rows * channels // 4 * WORDS + 1024 + 64, np.uint8)
        facts, out = np.zeros(rows * FACTS, np.float32), np.zeros((rows, tokens), np.float32)
        places = [part.ctypes.data for part in (query, grid, codes)]
        _scores(*places, rows, channels, tokens, room.ctypes.data, facts.ctypes.data, out.ctypes.data)
        # In float80, or better: products of 24 and 24 bits, of which float64 loses no more than it is given back here.
        keys = offset.astype(np.longdouble) + scale.astype(np.longdouble) * (codes.astype(np.longdouble) + 7.5 / 16)
        exact = query.astype(np.longdouble) @ keys.T
        said = facts.reshape(rows, FACTS)[:, micro_integers.ERROR].astype(np.longdouble) + channels * 2.0**-100
        assert (np.abs(out - exact) <= said[:, None]).all()
        if kind in ("normal", "outlier", "equal"):  # and what is said is not much: no more than of two chains of float32 sums
            most = np.abs(query).astype(np.float64) @ (np.abs(grid[channels:]) + 256 * np.abs(grid[:channels])).astype(
                np.float64
            )
            assert (said <= bounds.gamma(2 * channels + 64) * most + channels * 2.0**-100).all()


def test_what_is_not_a_number_is_no_score() -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        query = np.ones((1, 64), np.float32)
        query[0, 5] = wrong
        grid, codes = np.ones(128, np.float32), np.ones((16, 64), np.uint8)
        room, facts, out = np.zeros(64 * WORDS + 1024, np.uint8), np.zeros(FACTS, np.float32), np.zeros((1, 16), np.float32)
        places = [part.ctypes.data for part in (query, grid, codes)]
        _scores(*places, 1, 64, 16, room.ctypes.data, facts.ctypes.data, out.ctypes.data)
        assert not np.isfinite(out).any()


@pytest.mark.parametrize("kind", ["normal", "outlier", "one-hot", "equal", "small"])
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize(
    ("bits", "group", "width"), [(4, 32, 128), (4, 16, 64), (4, 64, 64), (4, 48, 96), (8, 128, 128), (8, 16, 48)]
)
def test_values(bits: int, group: int, width: int, rows: int, kind: str) -> None:
    groups = -(-width // group)
    for seed, tokens in enumerate((16, 64, 128, 128)):
        generator = np.random.default_rng(seed)
        weights = generator.random((rows, tokens)).astype(np.float32)
        if kind == "one-hot":
            weights = (weights > 0.97).astype(np.float32)
        elif kind == "equal":
            weights[:] = 1
        elif kind == "small":
            weights = (weights * 10.0 ** -generator.uniform(0, 30, weights.shape)).astype(np.float32)
        scale = np.abs(numbers("normal", (tokens, groups), generator)).astype(np.float16)
        if kind == "outlier":
            scale[3] *= np.float16(1000)
        offset = numbers("normal", (tokens, groups), generator).astype(np.float16) * np.float16(8)
        codes = generator.integers(0, 2**bits, (tokens, width)).astype(np.uint8)
        if seed == 3:
            codes[:] = 2**bits - 1
        packed = codes if bits == 8 else codes[:, : width // 2] | (codes[:, width // 2 :] << 4)
        packed, wide = np.ascontiguousarray(packed), np.concatenate([scale.ravel(), offset.ravel()]).astype(np.float32)
        made = [np.zeros(groups * tokens, np.float32) for _ in range(2)] + [np.zeros(groups, np.float32)]
        task = np.zeros(1, TASK)
        for name, value in (("block", tokens), ("groups", groups), ("bits", bits), ("group", group)):
            task[name] = value
        at = wide.ctypes.data
        slip = float(_units(task.ctypes.data, at, at + 4 * tokens * groups, *(part.ctypes.data for part in made)))
        room, constants = np.zeros(ROWS * groups * tokens * WORDS // 4 + 64, np.uint8), np.zeros(ROWS * groups, np.float32)
        out = np.zeros((rows, width), np.float32)
        _values(
            weights.ctypes.data, packed.ctypes.data, rows, bits, groups, group // 16, tokens, width, room.ctypes.data,
            *(part.ctypes.data for part in made), constants.ctypes.data, out.ctypes.data,
        )  # fmt: skip
        position = codes.astype(np.longdouble) / 16 if bits == 8 else codes.astype(np.longdouble) + codecs.MIDDLE
        spread = (np.repeat(part.astype(np.longdouble), group, axis=1)[:, :width] for part in (scale, offset))
        step, start = spread
        values = start + step * position
        exact = weights.astype(np.longdouble) @ values
        distance = np.sqrt(((out - exact) ** 2).sum(axis=1))
        sigma = codecs.token_steps(torch.from_numpy(scale)).double().numpy()
        said = slip + bounds.step_slip(tokens, group) * (weights.astype(np.float64) @ sigma)
        # What the sums of any kernel may round, of the values themselves.
        chained = bounds.gamma(tokens + 1) * (weights.astype(np.float64) @ np.sqrt((values**2).sum(axis=1)).astype(np.float64))
        assert (distance <= said + chained + tokens * width * 2.0**-120).all()
        # What is said beside that is little of what the formats round anyway, where weights are alike.
        if kind == "equal":
            assert (said <= 2.0**-7 * (weights.astype(np.float64) @ sigma) * math.sqrt(width)).all()


def test_a_processor_that_numba_is_told_to_do_without() -> None:
    """Features that numba leaves out are not used: compiled for nothing, they would end the process."""
    code = (
        "import torch\n"
        "from hf_certkv.kernels import micro_integers, vectors\n"
        "from test_cpu_kernel import case_of, started\n"
        "assert not micro_integers.supported()\n"
        "step = started(case_of(0))\n"
        "assert step.fused is not None and not step.fused.integers\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *sys.path])
    for variable in ({"NUMBA_ENABLE_AVX": "0"}, {"NUMBA_CPU_FEATURES": ""}):
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **variable, "PYTHONPATH": path}, check=True)
