"""The storage formats: tensors in, codes and what is measured of them out. Pure; no state, no attention.

Every format here is a nested grid. A number x of a group with stored step S and offset z (both 16 bits) is kept as a high
code h and, where a refinement plane is kept, a low code l of four bits:

    level 0:  z + S * (h + 7.5/16)     the middle of the cell
    level 1:  z + S * (h + l/16)

h has 8 bits for keys (one S and z per channel and block) and 4 bits for values (one S and z per token and channel group).
S and z are rounded *before* the codes are computed, so their rounding costs range and not accuracy. S has 11 significant
bits and the factor at most 13, so their product is exact in float32 and a dequantised number has one rounding.

What the certificate needs of a block is measured here, once, on the rounded codes (docs/certificate.md, section 2), and
rounded up. It never depends on how the format works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24  # of float32
SLACK = 1.0 + 2.0**-16  # covers the float32 roundings of a measured norm of up to 2^7 addends a channel many times over
LOW_BITS = 4
MIDDLE = 7.5 / 16  # where level 0 reads a cell: the low code is one of 0..15 with equal right
HALF_MAX = 65504.0
TINY = 2.0**-126

# Columns of the block numbers. Keys and values have three per level, then one for the block.
PER_LEVEL = 3
KAPPA, EPSILON, KEY_SPECTRAL = 0, 1, 2  # max |e/S|, max ||e_t/S||_2, spectral norm of the rows e_t/S
# With g_t = f_t over the token's step: max ||g_t||_2, spectral norm of the rows g_t, root mean square of ||g_t||_2.
ETA, VALUE_SPECTRAL, VALUE_RMS = 0, 1, 2
SQUARINGS = (2, 1)  # of the spectral bound by level: a refined block's error is small, whatever is said of it
LENGTHS = 65535  # codes of a value's squared norm, as shares of the block's squared radius


@dataclass(frozen=True)
class EncodedBlocks:
    """Codes of a batch of blocks, and what was measured of them.

    Attributes:
        codes: uint8 `[..., block, channels]`, or packed `[..., block, ceil(channels/2)]` for 4-bit codes.
        plane: uint8 `[..., block, ceil(channels/2)]`: the low codes, two to a byte; None where none is kept.
        scale: float16: `[..., channels]` for keys, `[..., block, groups]` for values.
        offset: float16, shaped as `scale`.
        numbers: float32 `[..., levels * 3 + 1]`: per level the three numbers named above, and last the radius
            `max_t` of the L2 norm over the originals and all levels.
        lengths: int16 `[..., block]` of values, None for keys: see `length_codes`.
    """

    codes: Tensor
    plane: Tensor | None
    scale: Tensor
    offset: Tensor
    numbers: Tensor
    lengths: Tensor | None = None


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte: low nibble = first half of the channels, high nibble = second half.

    Args: codes: uint8 `[..., channels]`, each below 16. Returns uint8 `[..., ceil(channels/2)]`.
    """
    half = (codes.shape[-1] + 1) // 2
    high = codes[..., half:]
    if high.shape[-1] < half:
        high = F.pad(high, (0, half - high.shape[-1]))
    return codes[..., :half] | (high << 4)


def unpack_nibbles(packed: Tensor, channels: int) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 `[..., channels]`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., :channels]


def round_half_down(x: Tensor) -> Tensor:
    """float16 at most x (toward minus infinity, by up to two units in the last place), clamped to the finite range.

    NaN stays NaN. Below -65504 the result is -65504: what that costs is measured like every other error.
    """
    nearest = x.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
    spacing = (nearest.abs().double() * 2.0**-10).clamp_min(2.0**-24)
    below = (nearest.double() - spacing).clamp_min(-HALF_MAX).to(torch.float16)
    return torch.where(nearest.to(x.dtype) > x, below, nearest)


def round_half_up(x: Tensor) -> Tensor:
    """float16 at least x (toward plus infinity), clamped to the finite range; NaN stays NaN."""
    return -round_half_down(-x)


def grid_codes(x: Tensor, low: Tensor, high: Tensor, high_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of `x` on the nested grid that spans [low, high].

    Args:
        x: float64 tensor; low, high: its group's extremes, broadcastable to `x`.
        high_bits: bits of the high code (8 for keys, 4 for values).
    Returns:
        `(high codes, low codes)` uint8 shaped as `x`, and `(scale, offset)` float16 shaped as `low`.
    """
    cells = 2.0**high_bits
    # Adding 0 makes -0 into 0: which zero is the least, or the largest, of several is left open.
    offset = round_half_down(low) + 0.0
    # Never negative: below the finite range the offset is clamped to above `high`, and what that costs is measured.
    scale = round_half_up(((high - offset.double()) / (cells - 0.5 / 2**LOW_BITS)).clamp_min(0.0)) + 0.0
    step = scale.double()
    # Times the reciprocal, as the compiled writer does it: which of two codes a tie gets is left open, but must be the same.
    position = (x - offset.double()) * torch.where(step > 0, 1 / step, torch.zeros_like(step))
    code = torch.round(position * 2**LOW_BITS).nan_to_num(0.0).clamp(0, cells * 2**LOW_BITS - 1).to(torch.int32)
    return (code >> LOW_BITS).to(torch.uint8), (code & (2**LOW_BITS - 1)).to(torch.uint8), scale, offset


def spectral_bound(rows: Tensor, row_norm: Tensor, squarings: int = 2) -> Tensor:
    """An upper bound of the spectral norm of each matrix: ||E||_2^2 <= a + ||C||_2 with C = E E^T - a I   [section 2].

    Args:
        rows: float32 `[..., n, channels]`; row_norm: `[...]`, an upper bound of the rows' L2 norms, to scale by;
        squarings: how often C is multiplied with itself before its Frobenius norm is taken: 1 or 2.
    Returns: float32 `[...]`, at most sqrt(n) * row_norm; NaN or Inf where `rows` has one.
    """
    count, channels = rows.shape[-2], rows.shape[-1]
    safe = torch.where(row_norm > 2.0**-100, row_norm, torch.ones_like(row_norm))
    scaled = rows / safe[..., None, None]
    gram = scaled @ scaled.mT if count <= channels else scaled.mT @ scaled
    trace = gram.diagonal(dim1=-2, dim2=-1).double().sum(dim=-1)
    rank = min(count, channels)
    centre = (trace / rank).float()  # any number would do: the mean eigenvalue makes C small
    shifted = gram - centre[..., None, None] * torch.eye(rank, dtype=gram.dtype, device=gram.device)
    norms, product = [_frobenius(shifted)], shifted
    for _ in range(squarings):
        product = product.mT @ product
        norms.append(_frobenius(product))
    square = centre.double() + centred_norm(norms, rank) + gram_rounding(trace, max(count, channels))
    bound = torch.sqrt(square) * safe.double()
    triangle = row_norm.double() * count**0.5
    # Rows too small to be scaled without losing bits to underflow keep the triangle inequality's bound.
    return round_up(torch.where(row_norm > 2.0**-100, torch.minimum(bound, triangle), triangle))


def _frobenius(x: Tensor) -> Tensor:
    """The Frobenius norm of float32 matrices, in float64."""
    return torch.linalg.matrix_norm(x.double())


def product_rounding(addends: int) -> float:
    """How far float32 dot products of so many addends may be off, relative to the norms' product, in any order."""
    return 1.01 * (addends + 8) * UNIT_ROUNDOFF


def gram_rounding(trace: Any, addends: int) -> Any:
    """How far E E^T - a I as computed may be off, in Frobenius norm, where a is the mean of the diagonal."""
    return (product_rounding(addends) + 2 * UNIT_ROUNDOFF) * trace


def centred_norm(norms: Sequence[Any], rank: int) -> Any:
    """||C||_2 from the Frobenius norms of C and of the one or two products that follow from it as computed   [section 2]."""
    square, rounding = norms[-1], product_rounding(rank)
    for norm in norms[-2::-1]:  # ||X||_2^2 = ||X^T X||_2, and the product is off by as much
        square = (square + rounding * norm * norm) ** 0.5
    return square


def round_up(x: Tensor) -> Tensor:
    """float32 at least as large as the real number that float64 `x >= 0` stands for; 0 stays 0, NaN stays NaN."""
    return torch.where(x == 0, x, x * SLACK + TINY).float()


def length_codes(squares: Tensor, radius: Tensor) -> Tensor:
    """||v_t||^2 of the values as level 0 reads them, in 65535ths of the block's squared radius, rounded up   [section 2].

    A kernel that reads integers never has the numbers themselves, and `mean_radius` needs their norms.

    Args: squares: float64 `[..., block]`; radius: float32 `[...]`, at least their roots.
    Returns: int16 `[..., block]`, to be read as unsigned; 65535 where something is not finite.
    """
    most = radius.double().square().unsqueeze(-1)
    share = torch.where(most > 0, squares / most, torch.zeros_like(squares))
    codes = torch.ceil(share * (LENGTHS * (1 + 2.0**-30))).nan_to_num(LENGTHS, LENGTHS).clamp(0, LENGTHS)
    return codes.to(torch.int32).to(torch.int16)


def read_lengths(lengths: Tensor, radius: Tensor) -> Tensor:
    """Upper bounds of the squared norms that `length_codes` stands for: float64 `[..., block]`."""
    return (lengths.to(torch.int32) & LENGTHS).double() * (radius.double().square() / LENGTHS).unsqueeze(-1)


def token_steps(scale: Tensor) -> Tensor:
    """sigma_t, one step for all of a token's value groups: the L2 norm of their steps, rounded up: float32 `[..., block]`.

    Args: scale: float16 `[..., block, groups]`.
    """
    return torch.linalg.vector_norm(scale.float(), dim=-1) * (1 + (scale.shape[-1] + 8) * 2.0**-23)


def _row_norms(x: Tensor) -> Tensor:
    """L2 norms over the last axis, computed in float64 and rounded up to float32: `[..., n]`."""
    return round_up(torch.linalg.vector_norm(x.double(), dim=-1))


def _measure(residual: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row norms' maximum, spectral bound, and row norms' root mean square of float64 `[..., n, channels]`."""
    norms = _row_norms(residual)
    largest, mean_square = norms.amax(dim=-1), norms.double().square().mean(dim=-1)
    return largest, spectral_bound(residual.float(), largest, SQUARINGS[level]), mean_square.sqrt().float()


@dataclass(frozen=True)
class KeyCodec:
    """INT8 keys, asymmetric, one step and offset per channel and block; optional plane: INT12."""

    refine: bool

    @property
    def levels(self) -> int:
        """How many levels have codes of their own: 1, or 2 with a refinement plane."""
        return 2 if self.refine else 1

    def encode(self, keys: Tensor) -> EncodedBlocks:
        """Encode whole blocks. Args: keys: float `[..., block, channels]`, originals."""
        x = keys.double()
        low, high = x.amin(dim=-2, keepdim=True), x.amax(dim=-2, keepdim=True)
        codes, low_codes, scale, offset = grid_codes(x, low, high, high_bits=8)
        numbers, radius = [], _row_norms(x).amax(dim=-1)
        for level in range(self.levels):
            decoded = _decode_exact(codes, low_codes if level else None, scale, offset)
            error, step = decoded - x, scale.double()
            # A channel whose stored step is 0 must be exact; otherwise no multiple of 0 covers its error.
            relative = torch.where(step > 0, error / step, torch.where(error == 0, error, error + float("inf")))
            largest, spectral, _ = _measure(relative, level)
            kappa = round_up(relative.abs().amax(dim=(-1, -2)))
            numbers += [kappa, largest, spectral]
            radius = torch.maximum(radius, _row_norms(decoded).amax(dim=-1))
        plane = pack_nibbles(low_codes) if self.refine else None
        return EncodedBlocks(codes, plane, scale.squeeze(-2), offset.squeeze(-2), torch.stack([*numbers, radius], dim=-1))

    def decode(self, codes: Tensor, plane: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
        """What the reference kernel multiplies with: float32 `[..., block, channels]`; level 1 where `plane` is given."""
        low = unpack_nibbles(plane, codes.shape[-1]) if plane is not None else None
        return _decode_float(codes, low, scale.unsqueeze(-2).float(), offset.unsqueeze(-2).float())


@dataclass(frozen=True)
class ValueCodec:
    """INT4 or INT8 values, one step and offset per token and channel group; INT4 may carry a plane that makes it INT8."""

    bits: int
    group: int
    refine: bool

    @property
    def levels(self) -> int:
        """How many levels have codes of their own. INT8 values already hold both nibbles, so they have one."""
        return 2 if self.refine and self.bits == 4 else 1

    def group_size(self, channels: int) -> int:
        """Channels that share a step: the setting, or the whole head where it is 0 or larger than the head."""
        return channels if self.group == 0 else min(self.group, channels)

    def encode(self, values: Tensor) -> EncodedBlocks:
        """Encode whole blocks. Args: values: float `[..., block, channels]`, originals."""
        x, channels = values.double(), values.shape[-1]
        size = self.group_size(channels)
        groups = -(-channels // size)
        # The last group may be short: it is filled up with its own last channel, which moves neither extreme.
        filled = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], groups * size - channels)], dim=-1)
        grouped = filled.unflatten(-1, (groups, size))
        low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
        high_codes, low_codes, scale, offset = grid_codes(grouped, low, high, high_bits=4)
        numbers, radius, squares = [], _row_norms(x).amax(dim=-1), torch.empty(0)
        for level in range(self.levels):
            use_low = self.bits == 8 or level == 1
            decoded = _decode_exact(high_codes, low_codes if use_low else None, scale, offset)
            decoded = decoded.flatten(-2)[..., :channels]
            squares = decoded.square().sum(dim=-1) if level == 0 else squares
            error, step = decoded - x, torch.linalg.vector_norm(scale.squeeze(-1).double(), dim=-1, keepdim=True)
            # As for keys: a token whose every step is 0 must be exact.
            relative = torch.where(step > 0, error / step, torch.where(error == 0, error, error + float("inf")))
            numbers += list(_measure(relative, level))
            radius = torch.maximum(radius, _row_norms(decoded).amax(dim=-1))
        high_codes, low_codes = (c.flatten(-2)[..., :channels] for c in (high_codes, low_codes))
        if self.bits == 8:
            codes, plane = (high_codes << LOW_BITS) | low_codes, None
        else:
            codes, plane = pack_nibbles(high_codes), pack_nibbles(low_codes) if self.refine else None
        stacked = torch.stack([*numbers, radius], dim=-1)
        return EncodedBlocks(codes, plane, scale.squeeze(-1), offset.squeeze(-1), stacked, length_codes(squares, radius))

    def decode(self, codes: Tensor, plane: Tensor | None, scale: Tensor, offset: Tensor, channels: int) -> Tensor:
        """What the reference kernel multiplies with: float32 `[..., block, channels]`; level 1 where `plane` is given."""
        if self.bits == 8:
            high, low = codes >> LOW_BITS, codes & (2**LOW_BITS - 1)
        else:
            high = unpack_nibbles(codes, channels)
            low = unpack_nibbles(plane, channels) if plane is not None else None
        size = self.group_size(channels)
        step, start = scale.float(), offset.float()
        if step.shape[-1] > 1:
            step = step.repeat_interleave(size, dim=-1)[..., :channels]
            start = start.repeat_interleave(size, dim=-1)[..., :channels]
        return _decode_float(high, low, step, start)


def _decode_exact(codes: Tensor, low: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
    """The grid's numbers in float64, where they are exact up to 2^-53."""
    position = codes.double() + (low.double() / 2**LOW_BITS if low is not None else MIDDLE)
    return offset.double() + scale.double() * position


def _decode_float(codes: Tensor, low: Tensor | None, scale: Tensor, offset: Tensor) -> Tensor:
    """The grid's numbers in float32: one rounding, in the last addition."""
    position = codes.float()
    position = position.add_(low.float(), alpha=1 / 2**LOW_BITS) if low is not None else position.add_(MIDDLE)
    return position.mul_(scale).add_(offset)
