"""What follows from the finished blocks of a layer alone, kept from one decode step to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .store import BlockStore

T = TypeVar("T")


class BlockMemo:
    """Results by name, until the blocks that they were computed from may have changed.

    Meant for views of the buffers of finished blocks and for small numbers derived from them (a largest norm per head): a
    decode step appends a token to the exact ones and leaves the blocks alone, all but one time in `block_size`.

    Whatever changes a block clears it beforehand: an append that finishes blocks, a crop into blocks, an undone step, a reorder
    or selection, a reset, a repair. A copy of a layer begins with an empty one. What the blocks of another store, or another
    number of them, gave is never returned, even where nobody cleared it.

    A derived number is as good as the blocks were when it was computed. Damage that comes later does not get into it; damage
    that was there is in it, as it is in everything else that reads the block, until the block's checksum gives it away: the
    repair clears all. A derived number has no checksum of its own: it is computed anew whenever a block is finished and after
    every `cache.scrub()`. Nothing large belongs here: it is not part of what `cache.memory()` counts.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}
        self._store: BlockStore | None = None
        self._blocks = -1

    def get(self, store: BlockStore, name: str, compute: Callable[[], T]) -> T:
        """What `compute` gives for the blocks that `store` holds now; it is called once for them."""
        if self._store is not store or self._blocks != store.blocks:
            self.clear()
            self._store, self._blocks = store, store.blocks
        kept = self._kept
        if name in kept:
            found: T = kept[name]
            return found
        value = kept[name] = compute()  # in the dictionary of before: if computing repaired a block, nobody reads that again
        return value

    def clear(self) -> None:
        """Forget everything. Cannot fail."""
        self._kept, self._store, self._blocks = {}, None, -1
