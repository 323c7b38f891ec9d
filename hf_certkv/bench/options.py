"""What a run measures: validated once, written to its JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError

PARTS = ("attention", "decode", "prefill", "memory", "quality", "long")
LONG = 131072  # tokens
VARIANTS_UP_TO = 8192  # tokens: longest context at which other head sizes and batches than the first are measured
PREFILLS = (2048, 4096, 8192)
QUALITY_CONTEXT = 2048


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a run.

    Args:
        what: parts to run; contexts: tokens held; head_dims: channels of a head; batches: rows. The first head size and batch
            are measured at every context, all their combinations at contexts up to 8,192.
        prefills: prompt lengths of the prefill part, which is quadratic; long: tokens of the part `long`.
        quality_context: prompt tokens for the embedded models; audited_steps: decoded in their audit.
        rounds: samples of each system; threads: of torch, None leaves them as they are; device: "cpu" or "cuda".
        layers: of the model; seed: of weights, traces, tokens and the order of the rounds; quick: fewer systems.

    Raises: InputError: something is out of range.
    """

    what: tuple[str, ...] = PARTS
    contexts: tuple[int, ...] = (2048, 8192, 16384, 32768, LONG)
    head_dims: tuple[int, ...] = (128, 64)
    batches: tuple[int, ...] = (1, 4)
    prefills: tuple[int, ...] = PREFILLS
    long: int = LONG
    quality_context: int = QUALITY_CONTEXT
    audited_steps: int = 16
    rounds: int = 7
    threads: int | None = None
    device: str = "cpu"
    layers: int = 2
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        unknown = [part for part in self.what if part not in PARTS]
        if unknown or not self.what:
            raise InputError(f"--what {','.join(self.what)}: expected some of {', '.join(PARTS)}.")
        for name, least, most in (
            ("contexts", 256, 2**24), ("head_dims", 8, 1024), ("batches", 1, 1024), ("prefills", 256, 2**20)
        ):  # fmt: skip
            values = getattr(self, name)
            if not values or any(not least <= value <= most for value in values):
                given = ",".join(str(value) for value in values)
                option = {"head_dims": "head-dim", "batches": "batch"}.get(name, name)
                raise InputError(f"--{option} {given}: expected whole numbers from {least} to {most:,}, separated by commas.")
        if any(width % 2 for width in self.head_dims):
            raise InputError(f"--head-dim {self.head_dims}: expected even numbers, as rotary embeddings need them.")
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}: expected at least 1.")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads {self.threads}: expected at least 1.")
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device}: expected cpu or cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA device here.")

    @classmethod
    def brief(cls, **changes: Any) -> BenchOptions:
        """A run of under a minute on two cores: short contexts, one head size and batch, few rounds and systems, no `long`."""
        preset: dict[str, Any] = {
            "what": tuple(part for part in PARTS if part != "long"),
            "contexts": (512, 2048),
            "head_dims": (128,),
            "batches": (1,),
            "prefills": (512,),
            "long": 8192,
            "quality_context": 320,
            "audited_steps": 4,
            "rounds": 3,
            "quick": True,
        }
        return cls(**{**preset, **changes})

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(context, head size, batch) to measure, in order."""
        first = (self.head_dims[0], self.batches[0])
        pairs = [(width, rows) for width in self.head_dims for rows in self.batches]
        return tuple(
            (context, *pair) for context in self.contexts for pair in pairs if pair == first or context <= VARIANTS_UP_TO
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}
