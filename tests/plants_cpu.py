"""Planted bugs in the fused CPU kernel: what it is handed, what it leaves behind, what is made of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cpu_twin import discrepancies, started
from plants_base import Apply, Detect, Patch, Plant, by_oracle
from torch import Tensor

from hf_certkv.kernels import cpu, cpu_step
from hf_certkv.kernels.cpu import FusedStep
from hf_certkv.precision import full_precision
from hf_certkv.verify.cases import Case, mask_of, tensors
from hf_certkv.verify.kernel import using, widened
from hf_certkv.verify.planted import output_tie
from hf_certkv.verify.worst_cases import (
    capped_scores,
    equal_values,
    negative_scale,
    padded,
    shifted_scores,
    two_readers,
    unlike_blocks,
    with_sink,
)

Change = Callable[..., dict[str, Any]]


def ordinary(**changes: Any) -> Case:
    """Ordinary numbers of two batch rows, two KV heads and two query heads each, in sizes that the kernel takes."""
    q, k, v = tensors("normal", torch.float32, 90, 32, 64, 2, 1, 3)
    return Case(q, k, v, settings={"rtol": 0.5, "kernel": "cpu", **changes})


def newest() -> Case:
    """The same, with nearly all weight on the newest token."""
    case = ordinary()
    keys = case.keys.clone()
    keys[:, :, -1] = 3 * (case.query[:, ::2, 0] + case.query[:, 1::2, 0])
    return replace(case, keys=keys)


def added(**changes: Any) -> Case:
    """The same with biases that differ by head, some of them -inf."""
    mask = mask_of("heads", torch.float32, 2, 1, 90, 1)
    assert mask is not None
    return replace(ordinary(**changes), mask=3 * mask)


def masked() -> Case:
    """The same with a mask by batch row."""
    return replace(ordinary(), mask=mask_of("bool", torch.float32, 2, 1, 90, 1))


def wide(build: Callable[..., Case], *args: Any, **kwargs: Any) -> Callable[[], Case]:
    """A case in sizes that the kernel takes."""
    return lambda: widened(build(*args, **kwargs))


def with_the_kernel(detect: Detect) -> Detect:
    """A check of what the CPU kernel computes; nothing is found where it computes nothing."""

    def by_it() -> list[str]:
        used: list[FusedStep] = []
        run = FusedStep.run

        def noted(fused: FusedStep) -> None:
            used.append(fused)
            run(fused)

        FusedStep.run = noted  # type: ignore[method-assign, assignment]
        try:
            with using("cpu"):
                found = detect()
        finally:
            FusedStep.run = run  # type: ignore[method-assign]
        return found if used else ["the CPU kernel was not asked"]

    return by_it


def oracle(build: Callable[..., Case], *args: Any, **kwargs: Any) -> Detect:
    """A check by the exact oracle."""
    return with_the_kernel(by_oracle(build, *args, **kwargs))


def twin(build: Callable[..., Case], *args: Any, raised: bool = False) -> Detect:
    """A check against float64 and bounds.py. Args: raised: after a few blocks were raised."""

    def detect() -> list[str]:
        step = started(build(*args))
        if raised:
            levels = [level.clone() for level in (step.key_level, step.value_level)]
            levels[0][..., 1], levels[1][..., 0] = 2, 1
            with full_precision("cpu"):
                step.raise_to(*levels)
        return discrepancies(step)

    return with_the_kernel(detect)


def handed(part: str, change: Change) -> Apply:
    """Fields of the kernel's `task` or `claim` that are not what they should be: `change(the record, FusedStep)`."""

    def apply(patch: Patch) -> None:
        original = FusedStep.__init__

        def init(self: FusedStep, step: Any) -> None:
            original(self, step)
            record = self.numbers.view(cpu_step.STEP)[part]
            for name, value in change(record.view(np.recarray)[0], self).items():
                record[name] = value

        patch.setattr(FusedStep, "__init__", init)

    return apply


def left(change: Callable[[FusedStep], None]) -> Apply:
    """Arrays that are not what the pass has left, before the certificate is made."""

    def apply(patch: Patch) -> None:
        original = FusedStep.run

        def run(self: FusedStep) -> None:
            original(self)
            change(self)
            levels = torch.zeros(*self.shape[:2], self.blocks, dtype=torch.int64)
            self.certify(levels, levels)

        patch.setattr(FusedStep, "run", run)

    return apply


def scaled(name: str, factor: float) -> Apply:
    """An array of scratch that is too small by a factor."""

    def change(fused: FusedStep) -> None:
        array, _ = fused.scratch._held[name]
        array *= factor

    return left(change)


def column(place: int, factor: float) -> Apply:
    """One of the eight sums too small by a factor."""

    def change(fused: FusedStep) -> None:
        fused.scratch._held["sums"][0][place::8] *= factor

    return left(change)


def swapped(patch: Patch) -> None:
    """Levels of keys for values and the other way round."""
    original = FusedStep.certify

    def certify(self: FusedStep, key_level: Tensor, value_level: Tensor) -> None:
        original(self, value_level, key_level)

    patch.setattr(FusedStep, "certify", certify)


def plant(name: str, text: str, apply: Apply, detect: Detect) -> Plant:
    """One of these."""
    return Plant(f"CPU kernel: {name}", "cpu", text, apply, detect)


def one_room(task: Any, fused: FusedStep) -> dict[str, Any]:
    """As many blocks a unit as there are, instead of those that there is room for, less one."""
    return {"room": task.room - 1}


CPU = [
    plant("sink logit ignored", "no sink logit handed on", handed("claim", lambda c, f: {"sink": 0}), oracle(wide(with_sink))),
    plant("no block bias", "blocks without their mask", handed("task", lambda t, f: {"block_bias": 0}), oracle(masked)),
    plant("no exact bias", "exact tokens without their mask", handed("task", lambda t, f: {"exact_bias": 0}), oracle(masked)),
    plant(
        "bias of the first row",
        "the first query head's biases for all of a KV head",
        handed("task", lambda t, f: {"block_strides": (*t.block_strides[:2], 0)}),
        oracle(wide(two_readers)),
    ),
    plant(
        "bias of another batch row",
        "a batch row's padding for all",
        handed("task", lambda t, f: {"block_strides": (0, *t.block_strides[1:]), "exact_strides": (0, *t.exact_strides[1:])}),
        oracle(wide(padded)),
    ),
    plant("softcap dropped", "scores as they are", handed("task", lambda t, f: {"softcap": 0.0}), oracle(wide(capped_scores))),
    plant(
        "size of the scale",
        "a negative softmax scale taken for a positive one",
        handed("claim", lambda c, f: {"scaling": abs(c.scaling)}),
        oracle(wide(negative_scale)),
    ),
    plant(
        "another unit's blocks",
        "every KV head reads the first one's blocks",
        handed("task", lambda t, f: {"room": 0}),
        oracle(ordinary),
    ),
    plant("room off by one", "units read from the wrong block", handed("task", one_room), oracle(ordinary)),
    plant(
        "exact tokens of another unit",
        "the first KV head's exact tokens for all",
        handed("task", lambda t, f: {"exact_room": 0}),
        oracle(ordinary),
    ),
    plant(
        "the newest token unseen",
        "one exact token too few",
        handed("task", lambda t, f: {"exact": t.exact - 1}),
        oracle(newest),
    ),
    plant(
        "two groups for one",
        "channels of a group with the grid of the one before",
        handed("task", lambda t, f: {"per_group": 2 * t.per_group}),
        oracle(ordinary, value_group=16),
    ),
    plant("no steps", "sigma is 0", handed("task", lambda t, f: {"step_up": 0.0}), oracle(wide(equal_values))),
    plant(
        "bound before rounding",
        "the output's rounding to bfloat16 left out",
        handed("claim", lambda c, f: {"relative": 0.0, "absolute": 0.0}),
        oracle(wide(output_tie, torch.bfloat16)),
    ),
    plant("short chain", "a chain of one addition", handed("claim", lambda c, f: {"chain": 1}), twin(ordinary)),
    plant("bias of no size", "the mask's rounding left out", handed("claim", lambda c, f: {"bias_size": 0.0}), twin(added)),
    plant(
        "twice the tolerance",
        "a budget of twice what was asked for",
        handed("claim", lambda c, f: {"rtol": 2 * c.rtol, "atol": 2 * c.atol}),
        oracle(ordinary, rtol=0.2),
    ),
    plant(
        "key numbers off by one",
        "epsilon for kappa, and so on",
        handed("claim", lambda c, f: {"key_numbers": c.key_numbers + 4}),
        twin(ordinary),
    ),
    plant(
        "numbers of the first block",
        "every block with the key numbers of the first unit's first one",
        handed("claim", lambda c, f: {"key_count": 0}),
        twin(wide(unlike_blocks)),
    ),
    plant("levels swapped", "levels of keys taken for those of values", swapped, twin(ordinary, raised=True)),
    plant("largest key norm halved", "K is half of it", scaled("key_norm", 0.5), twin(ordinary)),
    plant("largest value norm halved", "V is half of it", scaled("value_norm", 0.5), twin(ordinary)),
    plant("query weights too small", "half of sum |q| S", scaled("l1", 0.5), oracle(wide(shifted_scores, 0.1, 0.01))),
    plant("values taken for shorter", "the sum of squared norms is a hundredth", scaled("squares", 0.01), twin(ordinary)),
    plant("cubes too small", "half of the sum of w^3", column(6, 0.5), twin(ordinary)),
    plant("fourth powers too small", "half of the sum of w^4", column(7, 0.5), twin(ordinary)),
    plant("squares too small", "half of the sum of w^2", column(5, 0.5), twin(ordinary)),
    plant("norms by weights too small", "half of the sum of w ||v||^2", column(2, 0.5), twin(ordinary)),
    plant(
        "raised blocks not redone",
        "raised blocks keep the sums of before",
        lambda patch: patch.setattr(FusedStep, "redo", lambda self, index, keys, values: None),
        twin(ordinary, raised=True),
    ),
]
if not cpu.installed():
    CPU = []
