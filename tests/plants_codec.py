"""Planted bugs in the formats and in what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from plants_base import Apply, Detect, Patch, Plant, by_oracle, by_proof, instead, kind, of_the_codec, results
from torch import Tensor

from hf_certkv import codecs
from hf_certkv.codecs import EncodedBlocks, KeyCodec, ValueCodec
from hf_certkv.store import BlockStore
from hf_certkv.verify.worst_cases import (
    beyond_grid,
    clamped_keys,
    equal_values,
    offset_values,
    one_value,
    shifted_scores,
    to_the_plane,
    unlike_heads,
)


def encoded(which: type, change: Callable[[EncodedBlocks, Any, Tensor], EncodedBlocks]) -> Apply:
    """A codec that hands over other blocks than it made: `change(blocks, codec, originals)`."""
    return results(which, "encode", change)


def numbers(which: type, change: Callable[[Tensor, int], Tensor]) -> Apply:
    """A codec that hands over other numbers than it measured: `change(numbers, levels)`."""
    return encoded(which, lambda made, codec, x: replace(made, numbers=change(made.numbers.clone(), codec.levels)))


def relative(given: Tensor, levels: int) -> Tensor:
    """Value errors divided by the values' norm."""
    return torch.cat([given[..., :-1] / given[..., -1:], given[..., -1:]], dim=-1)


def mean(given: Tensor, levels: int) -> Tensor:
    """The mean residual where the largest is needed."""
    for level in range(levels):
        given[..., 3 * level] = given[..., 3 * level + 2]
    return given


def half_a_step(given: Tensor, levels: int) -> Tensor:
    """Half a step assumed, the L2 number left out, the spectral one what follows of it."""
    given[..., 0] = 0.5
    given[..., 1] = torch.inf
    given[..., 2] = 0.5 * (16 * 8) ** 0.5
    return given


def measured_before_rounding(patch: Patch) -> None:
    """Codes and numbers against the scales as they were before they were rounded to 16 bits."""
    patch.setattr(codecs, "round_half_down", lambda x: x)
    patch.setattr(codecs, "round_half_up", lambda x: x)
    for which in (KeyCodec, ValueCodec):
        encoded(which, lambda made, codec, x: replace(made, scale=made.scale.half(), offset=made.offset.half()))(patch)


def norms_of_what_is_read(made: EncodedBlocks, codec: ValueCodec, values: Tensor) -> EncodedBlocks:
    """The radius over the codes only."""
    read = codec.decode(made.codes, None, made.scale, made.offset, values.shape[-1])
    radius = read.double().norm(dim=-1).amax(dim=-1, keepdim=True)
    return replace(made, numbers=torch.cat([made.numbers[..., :-1], radius.float()], dim=-1))


def of_the_other_head(patch: Patch) -> None:
    original = BlockStore.encoded

    def flipped(self: BlockStore) -> tuple[EncodedBlocks, EncodedBlocks]:
        keys, values = original(self)
        return replace(keys, numbers=keys.numbers.flip(1)), replace(values, numbers=values.numbers.flip(1))

    patch.setattr(BlockStore, "encoded", flipped)


def planes_of_the_block_before(patch: Patch) -> None:
    original = BlockStore.decode

    def decode(self: BlockStore, kind: str, level: int, index: Any, channels: int) -> Tensor:
        if level != 1:
            return original(self, kind, level, index, channels)
        buffer = (self.keys if kind == "keys" else self.values)["plane"]
        kept = buffer.view.clone()
        buffer.view.copy_(kept.roll(1, dims=2))
        out = original(self, kind, level, index, channels)
        buffer.view.copy_(kept)
        return out

    patch.setattr(BlockStore, "decode", decode)


def plane_left_out(codes: Tensor, low: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
    """Level 1 read without its low codes."""
    return offset + scale * (codes.float() + 7.5 / 16)


def bottom_of_the_cell(codes: Tensor, low: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
    """Level 0 read at the bottom of a cell where it was measured in the middle."""
    return offset + scale * (codes.float() + (0 if low is None else low.float() / 16))


def swapped(packed: Tensor, channels: int) -> Tensor:
    """High nibbles taken for the first half of the channels."""
    return torch.cat([packed >> 4, packed & 15], dim=-1)[..., :channels]


def largest_row(bound: Tensor, rows: Tensor, row_norm: Tensor, squarings: int) -> Tensor:
    """The spectral norm taken for the largest row's: sqrt(rows) dropped."""
    return torch.minimum(bound, row_norm)


def plant(name: str, text: str, apply: Apply, detect: Detect) -> Plant:
    """A planted bug of this kind."""
    return kind("codec")(name, text, of_the_codec(apply), detect)


CODEC = [
    plant(
        "relative eta",
        "residuals of values divided by their norm",
        numbers(ValueCodec, relative),
        by_oracle(equal_values, size=20.0),
    ),
    plant("mean for max", "a block's mean residual for its largest", numbers(ValueCodec, mean), by_oracle(one_value)),
    plant(
        "measured before the scales are rounded",
        "residuals on the grid as it was before its step and offset became 16-bit numbers",
        measured_before_rounding,
        by_oracle(offset_values),
    ),
    plant("half a step assumed", "kappa taken for 1/2, not measured", numbers(KeyCodec, half_a_step), by_oracle(clamped_keys)),
    plant(
        "numbers of the other KV head",
        "what was measured of one head used for another",
        of_the_other_head,
        by_oracle(unlike_heads),
    ),
    plant(
        "spectral norm of values halved",
        "a root short of a factor",
        results(codecs, "spectral_bound", lambda bound, *given: bound / 2),
        by_oracle(equal_values),
    ),
    plant(
        "spectral norm of keys halved",
        "a root short of a factor",
        results(codecs, "spectral_bound", lambda bound, *given: bound / 2),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "spectral norm of one row",
        "the largest row for the matrix: a factor sqrt(n) dropped",
        results(codecs, "spectral_bound", largest_row),
        by_oracle(equal_values),
    ),
    plant(
        "numbers rounded to nearest",
        "what was measured in float64 stored in float32 as it comes",
        instead(codecs, "round_up", lambda x: x.float()),
        by_proof(to_the_plane),
    ),
    plant(
        "norms of what is read",
        "radii over the codes only, although originals beyond the grid are larger",
        encoded(ValueCodec, norms_of_what_is_read),
        by_oracle(beyond_grid),
    ),
    plant(
        "codes clipped one short",
        "the highest code stored as the one below, after it was measured",
        encoded(KeyCodec, lambda made, codec, x: replace(made, codes=made.codes.clamp(max=254))),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "offset rounded again",
        "the stored offset rounded to bfloat16 after it was used",
        encoded(ValueCodec, lambda made, codec, x: replace(made, offset=made.offset.bfloat16().half())),
        by_oracle(equal_values, value_bits=8),
    ),
    plant(
        "step cut short",
        "the stored step cut to the bits of a bfloat16 after it was used",
        encoded(KeyCodec, lambda made, codec, x: replace(made, scale=(made.scale.view(torch.int16) & -8).view(torch.float16))),
        by_oracle(shifted_scores, 0.1, 0.01),
    ),
    plant(
        "nibbles swapped",
        "the two halves of a byte read the wrong way round",
        instead(codecs, "unpack_nibbles", swapped),
        by_oracle(to_the_plane),
    ),
    plant(
        "bottom of the cell",
        "level 0 read at h and measured at h + 7.5/16",
        instead(codecs, "_decode_float", bottom_of_the_cell),
        by_oracle(equal_values),
    ),
    plant(
        "plane left out",
        "level 1 read without its low codes, with the numbers of level 1",
        instead(codecs, "_decode_float", plane_left_out),
        by_oracle(equal_values, atol=0.05, rtol=0.0),
    ),
    plant(
        "plane of another block",
        "level 1 read with the low codes of the block before",
        planes_of_the_block_before,
        by_proof(to_the_plane),
    ),
]
