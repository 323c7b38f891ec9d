"""Damage to what is stored: noticed by checksums, repaired from the originals.

A quantised block is compared with its checksum when it is promoted, in every audited step, and by `cache.scrub()`; a page of
originals whenever it is read. What a step had computed from a damaged block is thrown away and computed again.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import FaultyMemoryError
from .handle import KEYS, VALUES
from .store import Index

if TYPE_CHECKING:
    from .layers import CertifiedLayer

BLOCKS_AT_A_TIME = 256  # per batch row and KV head: bounds the scratch of a scrub


class BlocksRepairedError(Exception):
    """Blocks that the step under way has used were damaged. They are right now; the step has to begin again."""


@dataclass(frozen=True)
class ScrubReport:
    """What a scrub looked at. Blocks and pages are counted per batch row and KV head.

    Attributes: blocks: quantised blocks compared with their checksum; repaired: how many of them were damaged and are right
        again; pages: pages of originals, all intact (a damaged one raises); hot: blocks in hot slots; hot_damaged: how many of
        them were damaged; all slots are then emptied.
    """

    blocks: int
    repaired: int
    pages: int
    hot: int
    hot_damaged: int

    def __add__(self, other: ScrubReport) -> ScrubReport:
        return ScrubReport(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def require_intact(layer: CertifiedLayer, index: Index) -> None:
    """Compare single blocks with their checksums, for a step that has used them.

    Raises: BlocksRepairedError: some were damaged and have been repaired; CorruptedPageError, FaultyMemoryError: they could
        not be.
    """
    if repair(layer, index):
        raise BlocksRepairedError


def every_block(layer: CertifiedLayer, first: int = 0, last: int | None = None) -> Index:
    """Index of blocks first..last-1 of every batch row and KV head."""
    last = layer.store.blocks if last is None else last
    shape = torch.ones(layer.batch, layer.heads, last - first, dtype=torch.bool, device=layer.device)
    rows, heads, blocks = torch.nonzero(shape, as_tuple=True)
    return rows, heads, blocks + first


def repair(layer: CertifiedLayer, index: Index) -> int:
    """Repair the damaged ones among single blocks from their originals; returns how many there were.

    Raises: CorruptedPageError: the originals are damaged too; FaultyMemoryError: what was written did not stay.
    """
    wrong = layer.store.damaged(index)
    count = int(wrong.sum())
    if count == 0:
        return 0
    bad: Index = (index[0][wrong], index[1][wrong], index[2][wrong])
    assert layer.shadow is not None
    layer.forget()  # what was derived from them
    layer.store.rewrite(bad, layer.shadow.read_pages(KEYS, *bad), layer.shadow.read_pages(VALUES, *bad))
    still = int(layer.store.damaged(bad).sum())
    if still:
        raise FaultyMemoryError(
            f"Layer {layer.layer_idx}: {still} quantised blocks were damaged, and what was written to repair them did not stay "
            "as written. The device's memory is faulty; nothing was returned from it. Move the model to another device."
        )
    layer.cache.recorder.repaired += count
    warnings.warn(
        f"hf_certkv: {count} quantised block(s) of layer {layer.layer_idx} no longer matched their checksum and were repaired "
        "from the originals. Something else may be damaged as well: check the memory of this machine.",
        stacklevel=2,
    )
    return count


def scrub_layer(layer: CertifiedLayer) -> ScrubReport:
    """Compare everything that is quantised, hot or an original with its checksum; repair what can be repaired.

    Raises: CorruptedPageError: a page of originals is damaged; FaultyMemoryError.
    """
    if not layer.is_initialized or layer.store.blocks == 0:
        return ScrubReport(0, 0, 0, 0, 0)
    assert layer.shadow is not None
    layer.forget()  # numbers that were derived from blocks have no checksum: the next step computes them anew
    blocks, units = layer.store.blocks, layer.batch * layer.heads
    repaired = 0
    for first in range(0, blocks, BLOCKS_AT_A_TIME):
        last = min(first + BLOCKS_AT_A_TIME, blocks)
        for kind in (KEYS, VALUES):
            layer.shadow.read_range(kind, first, last, slice(None), slice(None))
        repaired += repair(layer, every_block(layer, first, last))
    hot, hot_damaged = _scrub_hot(layer)
    return ScrubReport(blocks * units, repaired, 2 * blocks * units, hot, hot_damaged)


def _scrub_hot(layer: CertifiedLayer) -> tuple[int, int]:
    """Compare hot blocks with their pages, bit by bit; empty the slots if one differs. Returns how many there are and were."""
    found = layer.hot.lookup(layer.store.blocks)
    if found is None:
        return 0, 0
    assert layer.shadow is not None
    index, keys, values = found
    pages = [layer.shadow.read_pages(kind, *index) for kind in (KEYS, VALUES)]
    wrong = torch.zeros(len(index[0]), dtype=torch.bool, device=index[0].device)
    for given, page in zip((keys, values), pages, strict=True):
        wrong |= (_bits(given) != _bits(page)).flatten(1).any(dim=1)
    count = int(wrong.sum())
    if count:
        # Which block a slot holds may be what was damaged: all are emptied, and fill again as blocks are promoted.
        layer.hot.clear()
    return len(index[0]), count


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)
