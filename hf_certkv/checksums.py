"""Checksums of quantised blocks, and of pages of originals for kernels, computed where these lie: no copy to the host.

The checksum of a block is sum_i m_i * w_i mod 2^64 over its 32-bit words w_i, with fixed odd 64-bit multipliers m_i. A flipped
bit k changes word i by 2^k, and the sum by m_i * 2^k, which is not 0 mod 2^64 because m_i is odd and k < 64: every single
flipped bit is noticed, always. Several flipped bits go unnoticed only if their changes add up to 0 by chance, about once in
2^33 or less. It is no protection against somebody who wants to deceive.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def multipliers(part: int, count: int, device: torch.device) -> Tensor:
    """`count` odd int64 numbers that look random, other ones for every part."""
    with torch.inference_mode(False):
        x = torch.arange(1, count + 1, dtype=torch.int64, device=device) + (part << 40)
        for factor in (-7046029254386353131, -4658895280553007687):  # odd; products wrap around at 2^64
            x = x * factor
            x = x ^ ((x >> 29) & (2**35 - 1))
        return x | 1


def block_checksum(parts: list[Tensor | None], leading: int, device: torch.device) -> Tensor:
    """Checksums of blocks that consist of several tensors.

    Args:
        parts: `[*blocks, ...]` each, of any dtype, on any device; None where a format has no such part. Their order matters.
        leading: how many axes `*blocks` are.
    Returns: int64 `[*blocks]` on `device`.
    """
    total = None
    for place, part in enumerate(parts):
        if part is None:
            continue
        raw = part.contiguous().flatten(leading).view(torch.uint8)
        words = raw.view(torch.int32) if raw.shape[-1] % 4 == 0 else raw
        sums = (words.to(torch.int64) * multipliers(place, words.shape[-1], words.device)).sum(dim=-1).to(device)
        total = sums if total is None else total + sums
    assert total is not None, "a block has codes"
    return total


SCRATCH = 2**22  # numbers of pages that are added up at a time: bounds the int64 scratch of a prefill


def page_sums(pages: Tensor, part: int) -> Tensor:
    """Checksums of pages of originals, for kernels that read them: sum_i m_i * w_i mod 2^64 over a page's numbers.

    w_i is the number's bits as an unsigned integer of its size (16 or 32 bits), i counts in row-major [block, channels] order,
    m = `multipliers(part, block * channels, device)`: odd, so that every single flipped bit is noticed.

    Args: pages: `[batch, kv_heads, blocks, block, channels]`; part: 0 for keys, 1 for values.
    Returns: int64 `[batch, kv_heads, blocks]`, on the pages' device.
    """
    size = pages.element_size()
    whole, mask = (torch.int16, 0xFFFF) if size == 2 else (torch.int32, 0xFFFFFFFF)
    batch, heads, blocks, block, channels = pages.shape
    factors = multipliers(part, block * channels, pages.device)
    sums = torch.empty(batch, heads, blocks, dtype=torch.int64, device=pages.device)
    step = max(1, SCRATCH // (batch * heads * block * channels))
    for first in range(0, blocks, step):
        words = pages[:, :, first : first + step].view(whole).flatten(3).to(torch.int64)
        sums[:, :, first : first + step] = words.bitwise_and_(mask).mul_(factors).sum(dim=-1)
    return sums
