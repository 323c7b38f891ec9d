"""Planted bugs in the decode pass and in what it is handed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from plants_base import Apply, Detect, Patch, arguments, by_oracle, instead, kind, of_the_codec, results
from torch import Tensor

from hf_certkv import codecs, inputs
from hf_certkv import decode as decode_module
from hf_certkv import store as store_module
from hf_certkv.attention import AttentionCall
from hf_certkv.decode import DecodeStep
from hf_certkv.kernels import reference
from hf_certkv.kernels.reference import Combined, Segments
from hf_certkv.verify.cases import Case, judge, mask_of, run, tensors
from hf_certkv.verify.worst_cases import (
    capped_scores,
    equal_values,
    exact_everything,
    light_block,
    mixed_signs,
    negative_scale,
    one_value,
    padded,
    shifted_scores,
    two_readers,
    unlike_blocks,
    with_sink,
)


def normal(**changes: Any) -> Case:
    """Ordinary numbers, audited."""
    return Case(*tensors("normal", torch.float32, 90, 8, 8, 1, 1, 3), settings={"rtol": 0.5, "audit": True, **changes})


def masked(**changes: Any) -> Case:
    """The same behind a mask."""
    return replace(normal(**changes), mask=mask_of("bool", torch.float32, 1, 1, 90, 1))


def capped_and_raised() -> Case:
    """Scores far beyond their softcap, and a tolerance that needs promotions."""
    case = capped_scores()
    return replace(case, settings={"rtol": 0.02, "refine": "off"})


def under_autocast(build: Callable[..., Case], *args: Any) -> Detect:
    """A check: the exact oracle, of a run inside autocast to bfloat16."""

    def detect() -> list[str]:
        case = build(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, record, cache = run(case)
        return judge(case, output, record, cache.settings).breaches

    return detect


def residuals_rounded_down() -> Case:
    """The value error attained, by residuals that bfloat16 calls smaller."""
    values = torch.randn(1, 8, generator=torch.Generator().manual_seed(47)).expand(1, 2, 81, 8).clone()
    values[:, :, 80] = 0
    case = equal_values()
    return replace(case, values=values)


def heads_interleaved(patch: Patch) -> None:
    """Query head h on KV head h % kv_heads."""
    original = DecodeStep.__init__

    def init(self: DecodeStep, layer: Any, call: AttentionCall) -> None:
        order = torch.arange(call.query.shape[1]).view(-1, layer.heads).T.flatten()
        original(self, layer, replace(call, query=call.query[:, order]))
        assert self.query is not None  # computed now, of that order
        self.call = call

    patch.setattr(DecodeStep, "__init__", init)


def after_init(change: Callable[[DecodeStep], None]) -> Apply:
    """A step that starts from something else."""

    def apply(patch: Patch) -> None:
        original = DecodeStep.__init__

        def init(self: DecodeStep, layer: Any, call: AttentionCall) -> None:
            original(self, layer, call)
            change(self)

        patch.setattr(DecodeStep, "__init__", init)

    return apply


def size_of_the_scale(step: DecodeStep) -> None:
    """The scale's size multiplied in, not the scale."""
    step.scaled = step.query * abs(step.call.scaling)


def usual_scale(step: DecodeStep) -> None:
    """The scale that attention has where none is given."""
    step.scaled = step.query * step.query.shape[-1] ** -0.5


def of_the_next_row(made: Combined, *given: Any) -> Combined:
    """Masses of another row of the same KV head."""
    return replace(made, mass=made.mass.roll(1, dims=2), root_square_mass=made.root_square_mass.roll(1, dims=2))


def swapped_factors(segments: Segments, *rest: Any) -> tuple[Any, ...]:
    """Every segment with the maximum of the one before."""
    return (replace(segments, maximum=segments.maximum.roll(1, dims=-1)), *rest)


def float32_factors(made: Combined, segments: Segments, *given: Any) -> Combined:
    """Factors of segments in float32, where those below e^-104 are 0."""
    kept = (segments.maximum - segments.maximum.amax(dim=-1, keepdim=True)) > -104
    return replace(made, mass=made.mass * kept, root_square_mass=made.root_square_mass * kept)


def first_row_of_the_mask(mask: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """The mask of the first batch row for all."""
    return (mask if mask is None else mask[:1], *rest)


def first_head_of_the_mask(mask: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """The mask of the first query head for all."""
    return (mask if mask is None else mask[:, :1], *rest)


def next_block(split: tuple[Tensor | None, Tensor | None], *given: Any) -> tuple[Tensor | None, Tensor | None]:
    """Every block with the bias of the one before."""
    return split[0] if split[0] is None else split[0].roll(1, dims=-2), split[1]


def signs_kept(query: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of q_c S_c for that of |q_c| S_c."""
    step = scale.double()
    return (query.double() @ step.mT).abs(), ((query.double() ** 2) @ (step**2).mT).sqrt()


def unlike(place: int, other: Any) -> Callable[..., tuple[Any, ...]]:
    """The arguments with one of them replaced."""
    return lambda *given: (*given[:place], other, *given[place + 1 :])


def no_guard(device_type: str) -> Any:
    """Whatever the process has set."""
    return contextlib.nullcontext()


def crossed_moments(made: Combined, *given: Any) -> Combined:
    """Squared distances from the output, less its own square."""
    size = made.output.double().square().sum(-1, keepdim=True)
    return replace(made, moment=made.moment - size, square_moment=made.square_moment - size)


def mean_steps(scale: Tensor) -> Tensor:
    """One step for all tokens of a block."""
    return codecs.token_steps(scale).mean(-1, True).expand(scale.shape[:-1])


plant = kind("kernel")


KERNEL = [
    plant(
        "sink logit ignored",
        "the sink logit left out of the normaliser",
        instead(reference, "combine", lambda segments, sink_logit=None, combine=reference.combine: combine(segments)),
        by_oracle(with_sink),
    ),
    plant(
        "mask ignored",
        "masked tokens attended",
        instead(inputs, "split_bias", lambda bias, sink, blocks, block: (None, None)),
        by_oracle(masked),
    ),
    plant(
        "mask of the block before",
        "biases off by one block",
        results(inputs, "split_bias", next_block),
        by_oracle(masked),
    ),
    plant(
        "mask of another batch row",
        "one row's padding for all rows",
        arguments(inputs, "row_bias", first_row_of_the_mask),
        by_oracle(padded),
    ),
    plant(
        "mask of another head",
        "one head's biases for all heads",
        arguments(inputs, "row_bias", first_head_of_the_mask),
        by_oracle(two_readers),
    ),
    plant(
        "mask lost on promotion",
        "promoted blocks computed again without their bias",
        arguments(reference, "redo_blocks", unlike(6, None)),
        by_oracle(masked, rtol=0.02, refine="off"),
    ),
    plant(
        "softcap ignored",
        "scores as they are",
        arguments(reference, "attend", unlike(5, None)),
        by_oracle(capped_scores),
    ),
    plant(
        "softcap lost on promotion",
        "promoted blocks computed again without the softcap",
        arguments(reference, "redo_blocks", unlike(7, None)),
        by_oracle(capped_and_raised),
    ),
    plant(
        "size of the scale",
        "a negative scale taken for a positive one",
        after_init(size_of_the_scale),
        by_oracle(negative_scale),
    ),
    plant("usual scale", "1/sqrt(d) whatever the call says", after_init(usual_scale), by_oracle(shifted_scores, 0.1, 0.01)),
    plant("wrong KV head", "query head h on KV head h mod kv_heads", heads_interleaved, by_oracle(normal)),
    plant(
        "masses of another query head",
        "rows of a group mixed up in the masses",
        results(reference, "combine", of_the_next_row),
        by_oracle(two_readers),
    ),
    plant(
        "factors swapped",
        "segments weighed with each other's maximum",
        arguments(reference, "combine", swapped_factors),
        by_oracle(normal),
    ),
    plant(
        "factors in float32",
        "the mass of a block that is read as weighing next to nothing is 0",
        results(reference, "combine", float32_factors),
        by_oracle(light_block),
    ),
    plant(
        "query weights with signs",
        "the sum of q S for that of |q| S",
        instead(reference, "score_weights", signs_kept),
        by_oracle(mixed_signs),
    ),
    plant(
        "query weights with another block's steps",
        "steps off by one block",
        arguments(reference, "score_weights", lambda query, scale: (query, scale.roll(1, dims=2))),
        by_oracle(unlike_blocks),
    ),
    plant(
        "no guard around the pass",
        "products in bfloat16 where autocast asks for it",
        instead(decode_module, "full_precision", no_guard),
        under_autocast(exact_everything),
    ),
    plant(
        "no guard around the measurements",
        "spectral norms in bfloat16 where autocast asks for it",
        of_the_codec(instead(store_module, "full_precision", no_guard)),
        under_autocast(residuals_rounded_down),
    ),
    plant(
        "moments half of them",
        "squared distances from the output without what the output is from zero",
        results(reference, "combine", crossed_moments),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "mean instead of each token's step",
        "a block's mean step for every token",
        instead(reference, "token_steps", mean_steps),
        by_oracle(one_value),
    ),
]
