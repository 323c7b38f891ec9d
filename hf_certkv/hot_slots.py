"""Hot slots: originals of the blocks promoted last, kept on the device. Correctness never depends on what is in them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .streams import asynchronous, has_come, wait_for

if TYPE_CHECKING:
    from .shadow import ShadowPages
    from .store import Index

HOT_SHARE = 0.04  # of a dense cache's bytes: the most that hot slots take where nobody says how many there are to be
SLOTS_PER_REFILL = 4  # per batch row and KV head: bounds what one step brings over the bus
AUTOMATIC = ("cuda",)  # device types with hot slots where nobody says how many there are to be
MAP_STEP = 64  # blocks by which the map from blocks to slots grows
INDEX_BYTES, MAP_BYTES = 16, 4  # of a slot, for which block it is and when it was used; of a block, for its slot


def map_room(blocks: int) -> int:
    """Entries of the map from blocks to slots, per batch row and KV head, that a layer of so many blocks has."""
    return -(-blocks // MAP_STEP) * MAP_STEP


def hot_budget(tokens: int, block: int, widths: tuple[int, int], itemsize: int) -> int:
    """How many slots, with all that belongs to them, fit into `HOT_SHARE` of a dense cache: per batch row and KV head."""
    token = sum(widths) * itemsize
    left = HOT_SHARE * tokens * token - MAP_BYTES * map_room(tokens // block)
    return max(0, int(left // (block * token + INDEX_BYTES)))


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def gathers(device: torch.device) -> bool:
    """Whether slots can be refilled by the device itself: there is Triton, and the device runs its kernels."""
    if not _triton_installed():
        return False
    if asynchronous(device):
        return True
    from .kernels.triton_common import interpreted

    return interpreted()


class HotSlots:
    """A fixed number of slots per batch row and KV head. A block in a slot is read at level 2 from the start.

    A kernel finds the slot of a block in `slot_map`; it uses the slot only if `blocks` names the block there too, so that a
    wrong entry of the map does no harm.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.blocks: Tensor | None = None  # int64 [batch, kv_heads, slots], -1 where empty
        self.used: Tensor | None = None  # int64, shaped as blocks: the step of the last use
        self.keys: Tensor | None = None  # [batch, kv_heads, slots, block, channels]
        self.values: Tensor | None = None
        self.slot_of: Tensor | None = None  # int32 [batch, kv_heads, room]: -1 where no slot; None until a kernel wants it
        self._refilled: torch.cuda.Event | None = None

    def ready(self) -> None:
        """Have the current stream wait for a refill under way; the host does not wait."""
        if self._refilled is None or self.blocks is None:
            return
        wait_for(self.blocks.device, self._refilled)
        if has_come(self._refilled):
            self._refilled = None

    def _make(self, batch: int, heads: int, keys: Tensor, values: Tensor) -> None:
        """Allocate empty slots for pages like `[..., block, channels]`."""
        with torch.inference_mode(False):
            empty = torch.full((batch, heads, self.slots), -1, dtype=torch.int64, device=keys.device)
            self.used = torch.full_like(empty, -1)
            self.keys = keys.new_zeros(batch, heads, self.slots, *keys.shape[-2:])
            self.values = values.new_zeros(batch, heads, self.slots, *values.shape[-2:])
            self.slot_of = None
            self.blocks = empty  # last: without it there are no slots

    def insert(self, index: Index, keys: Tensor, values: Tensor, batch: int, heads: int, step: int) -> None:
        """Put blocks `[n, block, channels]` into the slots used longest ago. `index`: batch row, KV head, block."""
        if self.slots == 0 or len(index[0]) == 0:
            return
        self.ready()
        if self.blocks is None:
            self._make(batch, heads, keys, values)
        assert self.blocks is not None and self.used is not None and self.keys is not None and self.values is not None
        room, self.slot_of = 0 if self.slot_of is None else self.slot_of.shape[2], None
        for i, (row, head, block) in enumerate(zip(*(part.tolist() for part in index), strict=True)):
            slot = int(self.used[row, head].argmin())
            # Whatever fails here, a slot never names a block that it does not hold.
            self.blocks[row, head, slot] = -1
            self.keys[row, head, slot], self.values[row, head, slot] = keys[i], values[i]
            self.used[row, head, slot] = step
            self.blocks[row, head, slot] = block
        if room:
            self.slot_map(room)

    def refill(self, promoted: Tensor, shadow: ShadowPages, step: int, per_step: int = SLOTS_PER_REFILL) -> None:
        """Fetch blocks that were promoted into the slots used longest ago, by the device alone: the host waits for nothing.

        It is queued behind the current stream's work on the side stream of `shadow`; who reads slots calls `ready` first, as
        all methods do. A page whose checksum is wrong leaves its slot empty; the step that needs it tells of it.

        Args:
            promoted: bool, or the mass that the block got (float, 0 where it was not promoted) `[batch, kv_heads, blocks]`, of
                blocks that `shadow` has; those of most mass come first, and those in a slot already stay there.
            shadow: the originals, with `device_sums`; step: counts up; per_step: slots to refill at most, per row and head.
        """
        count = promoted.shape[2]
        if self.slots == 0 or count == 0:
            return
        from .kernels.triton_gather import gather

        self.ready()
        if self.blocks is None:
            like = [torch.empty(0, shadow.block, w, dtype=shadow.dtype, device=promoted.device) for w in shadow.widths]
            self._make(shadow.batch, shadow.heads, like[0], like[1])
        slot_of, table = self.slot_map(count), shadow.table()
        blocks, used, keys, values = self.blocks, self.used, self.keys, self.values
        assert blocks is not None and used is not None and keys is not None and values is not None and slot_of is not None
        picks = min(per_step, self.slots, count)
        with shadow.side.queue():
            score = promoted.float().nan_to_num()
            present = (blocks >= 0) & (blocks < count)
            used.masked_fill_(present & (score.gather(2, blocks.clamp(0, count - 1)) > 0), step)
            mass, block = score.masked_fill(slot_of[:, :, :count] >= 0, 0.0).topk(picks)
            last_use, slot = used.topk(picks, largest=False)
            # What was promoted just now stays, even if there is more of it than slots.
            block = torch.where((mass > 0) & (last_use < step), block, -1)
            sums = shadow.device_sums.data
            assert sums is not None, "refills need the checksums that the device has taken"
            gather(block, slot, step, table, sums, (blocks, used, slot_of), (keys, values))
            shadow.side.keep(promoted, blocks, used, keys, values, slot_of, table.slabs, sums)
            self._refilled = shadow.side.mark()

    def slot_map(self, blocks: int) -> Tensor | None:
        """The slot of every block, for kernels on the current stream: int32 `[batch, kv_heads, room]`, -1 where there is none.

        Kept right from the first call on. Args: blocks: that it must have room for. Returns: None while there are no slots.
        """
        if self.blocks is None:
            return None
        self.ready()
        if self.slot_of is None or self.slot_of.shape[2] < blocks:
            self.slot_of = self._mapped(self.blocks, map_room(blocks))
        return self.slot_of

    @staticmethod
    def _mapped(blocks: Tensor, room: int) -> Tensor:
        """The map that `blocks` makes; a damaged number may be anything, and names no block."""
        slots = torch.arange(blocks.shape[2], dtype=torch.int32, device=blocks.device).expand(blocks.shape)
        with torch.inference_mode(False):
            made = torch.full((*blocks.shape[:2], room + 1), -1, dtype=torch.int32, device=blocks.device)
            made.scatter_(2, torch.where((blocks >= 0) & (blocks < room), blocks, room), slots)
            return made[:, :, :room].contiguous()

    def lookup(self, stop: int) -> tuple[Index, Tensor, Tensor] | None:
        """Index (batch row, KV head, block), keys and values of every slot that holds a block below `stop`, or None."""
        if self.blocks is None:
            return None
        self.ready()
        filled = (self.blocks >= 0) & (self.blocks < stop)  # a damaged number may be anything
        if not bool(filled.any()):
            return None
        assert self.keys is not None and self.values is not None
        rows, heads, slots = torch.nonzero(filled, as_tuple=True)
        return (
            (rows, heads, self.blocks[rows, heads, slots]),
            self.keys[rows, heads, slots],
            self.values[rows, heads, slots],
        )

    def touch(self, index: Index, step: int) -> None:
        """Note that blocks already here would have been promoted again."""
        if self.blocks is None or self.used is None:
            return
        self.ready()
        rows, heads, blocks = index
        here = (self.blocks[rows, heads] == blocks[:, None]).to(torch.int64)
        self.used.masked_fill_(torch.zeros_like(self.used).index_put_((rows, heads), here, accumulate=True) > 0, step)

    def clear(self) -> None:
        """Empty all slots."""
        if self.blocks is not None and self.used is not None:
            self.ready()
            self.blocks.fill_(-1)
            self.used.fill_(-1)
            if self.slot_of is not None:
                self.slot_of.fill_(-1)

    def truncate(self, blocks: int) -> None:
        """Empty the slots of blocks from `blocks` on. Cannot fail: without memory for that, all slots are given up."""
        if self.blocks is None or self.used is None:
            return
        try:
            self.ready()
            gone = self.blocks >= blocks
            self.blocks.masked_fill_(gone, -1)
            self.used.masked_fill_(gone, -1)
            if self.slot_of is not None:
                self.slot_of[:, :, blocks:].fill_(-1)
        except (RuntimeError, MemoryError):
            self._give_up()

    def _give_up(self) -> None:
        self.blocks = self.used = self.keys = self.values = self.slot_of = None

    def resize(self, slots: int) -> None:
        """Have so many slots, the ones used last among them. On an error nothing has changed."""
        if self.blocks is None or self.used is None or slots == 0:
            self.slots = slots
            self._give_up()
            return
        self.ready()
        keys, values, kept = self.keys, self.values, min(slots, self.slots)
        assert keys is not None and values is not None
        with torch.inference_mode(False):
            order = self.used.topk(kept).indices
            new = HotSlots(slots)
            new._make(order.shape[0], order.shape[1], keys, values)
            assert new.blocks is not None and new.used is not None and new.keys is not None and new.values is not None
            pairs = ((new.blocks, self.blocks), (new.used, self.used), (new.keys, keys), (new.values, values))
            for part, old in pairs:
                place = order.view(*order.shape, *(1,) * (old.dim() - 3)).expand(*order.shape, *old.shape[3:])
                part[:, :, :kept] = old.gather(2, place)
        self._give_up()
        self.slots, self.used, self.keys, self.values = slots, new.used, new.keys, new.values
        self.blocks = new.blocks

    def fit(self, slots: int) -> None:
        """As `resize`, but where it takes too much or can be doubled only, and where there is memory for it."""
        if slots < self.slots or slots >= max(1, 2 * self.slots):
            with suppress(torch.OutOfMemoryError, MemoryError):  # then it stays as it is: nothing depends on slots
                self.resize(slots)

    def selected(self, index: Tensor) -> HotSlots:
        """A copy with the batch rows in `index`."""
        return self._copied(lambda part: part.index_select(0, index.to(part.device)))

    def __deepcopy__(self, memo: dict[int, Any]) -> HotSlots:
        new = self._copied(torch.clone)
        memo[id(self)] = new
        return new

    def _copied(self, change: Callable[[Tensor], Tensor]) -> HotSlots:
        new = HotSlots(self.slots)
        if self.blocks is not None and self.used is not None and self.keys is not None and self.values is not None:
            self.ready()
            with torch.inference_mode(False):
                new.used, new.keys, new.values = change(self.used), change(self.keys), change(self.values)
                new.slot_of = None if self.slot_of is None else change(self.slot_of)
                new.blocks = change(self.blocks)
        return new

    @property
    def nbytes(self) -> int:
        """Device bytes, as allocated."""
        parts = (self.blocks, self.used, self.keys, self.values, self.slot_of)
        return sum(part.nbytes for part in parts if part is not None)
