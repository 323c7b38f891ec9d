"""The originals: host pages of a fixed power-of-two slab size, copied on a side stream on CUDA, checked when read.

A page is one block of keys, or of values, of one batch row and KV head; each has an XXH3 checksum, taken when it was
written and compared whenever the host reads it. A slab is one allocation that holds many pages: torch rounds pinned
allocations up to a power of two, so slabs have that size to begin with. Kernels find a page by its address (`table`) and
compare it with a checksum of their own (`device_sums`), since XXH3 is nothing for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import xxhash
from torch import Tensor

from .checksums import page_sums
from .errors import CorruptedPageError, HostMemoryError
from .kernels import threads
from .store import GrowingBuffer
from .streams import SideStream, asynchronous, has_come, wait_for

KEYS, VALUES = 0, 1
ROWS_PER_SLAB = 8
DEVICE_SUMS = False  # whether checksums for kernels are kept on the CPU too, where only Triton's interpreter uses them
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def allocate_host(count: int, pinned: bool) -> Tensor:
    """One host allocation of `count` bytes, pinned where a GPU copies into it. Raises what the allocator raises."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=pinned)


@dataclass
class Slab:
    """One host allocation: `ROWS_PER_SLAB` or more block rows. `sums[kind][row, batch, head]` are the checksums."""

    memory: Tensor
    pages: tuple[Tensor, Tensor]
    sums: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PageTable:
    """Where pages lie, for kernels.

    The page of (kind, block row, unit), units counting batch row by batch row through the KV heads, begins at
    `slabs[row // rows_per_slab] + (value_offset if kind else 0) + ((row % rows_per_slab) * units + unit) * page_bytes[kind]`.

    Attributes: slabs: int64 `[slabs]` on the device, addresses; host: the same in host memory, which a copy may still read.
    """

    slabs: Tensor
    rows_per_slab: int
    value_offset: int
    units: int
    page_bytes: tuple[int, int]
    host: Tensor


@dataclass
class _Pending:
    """Pages whose copy may still be under way: the source is kept alive and the checksum is not taken yet."""

    first: int
    last: int
    event: torch.cuda.Event | None
    sources: tuple[Tensor, Tensor]


@dataclass
class ShadowPages:
    """Originals of one layer's finished blocks, `[batch, kv_heads]` pages each for keys and values.

    Args:
        layer: index, for messages; batch, heads: of the cache; block: tokens a block; widths: channels of keys and values;
        dtype: of the originals; device: where reads are returned.
    """

    layer: int
    batch: int
    heads: int
    block: int
    widths: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    blocks: int = 0
    slabs: list[Slab] = field(default_factory=list)
    device_sums: GrowingBuffer = field(default_factory=GrowingBuffer)  # int64 [batch, heads, blocks, 2], for kernels
    _pending: list[_Pending] = field(default_factory=list)
    _table: PageTable | None = None  # of the slabs that there are now
    _addressed: bool = False  # addresses were given away: kernels may be reading what is freed here

    def __post_init__(self) -> None:
        self.side = SideStream(self.device)
        self.signs = DEVICE_SUMS or self.device.type == "cuda"
        if asynchronous(self.device):
            self.__class__ = _SharedPages
        row = self.batch * self.heads * self.block * sum(self.widths) * self.dtype.itemsize
        self.slab_bytes = 1 << (row * ROWS_PER_SLAB - 1).bit_length()
        self.rows_per_slab = self.slab_bytes // row

    def _new_slab(self) -> Slab:
        try:
            with torch.inference_mode(False):  # written again later, perhaps outside of inference mode
                memory = allocate_host(self.slab_bytes, self.device.type == "cuda")
        except (RuntimeError, MemoryError) as error:
            raise HostMemoryError(
                f"Layer {self.layer}: the host refused {self.slab_bytes:,} bytes for originals ({error}). The cache is as it "
                "was before the step. Free host memory, or use a shorter context or a smaller batch."
            ) from error
        parts, start = [], 0
        for width in self.widths:
            count = self.rows_per_slab * self.batch * self.heads * self.block * width * self.dtype.itemsize
            part = memory[start : start + count].view(self.dtype)
            parts.append(part.view(self.rows_per_slab, self.batch, self.heads, self.block, width))
            start += count
        sums = tuple(np.zeros((self.rows_per_slab, self.batch, self.heads), dtype=np.uint64) for _ in range(2))
        return Slab(memory, (parts[0], parts[1]), (sums[0], sums[1]))

    def append(self, keys: Tensor, values: Tensor, sums: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Add finished blocks, `[batch, kv_heads, blocks, block, channels]`. Atomic: on an error nothing has changed.

        Args: sums: checksums `[blocks, batch, kv_heads]` to keep instead of taking new ones (when pages are moved).
        Raises: HostMemoryError: the host refused memory.
        """
        count = keys.shape[2]
        slabs = list(self.slabs)
        while len(slabs) * self.rows_per_slab < self.blocks + count:
            slabs.append(self._new_slab())
        self.flush()
        if self.signs and sums is None:
            made = [page_sums(part.detach(), kind) for kind, part in enumerate((keys, values))]
            self.device_sums.write(torch.stack(made, dim=-1))
        if len(slabs) > len(self.slabs):
            self._table, self.slabs = None, slabs
        sources = (keys.movedim(2, 0), values.movedim(2, 0))
        if asynchronous(self.device) and keys.device == self.device and sums is None:
            self._copy_aside(sources, count)
        else:
            threads.share([piece for kind in (KEYS, VALUES) for piece in self._copies(kind, sources[kind], sums)])
        self.blocks += count
        if self.signs and sums is None:
            self.device_sums.length = self.blocks

    def _place(self, row: int) -> tuple[Slab, int]:
        return self.slabs[row // self.rows_per_slab], row % self.rows_per_slab

    def _spans(self, first: int, last: int) -> list[tuple[Slab, slice, slice]]:
        """Where block rows first..last-1 lie: slabs, places in each, and which of the rows these are."""
        spans, done = [], first
        while done < last:
            slab, place = self._place(done)
            count = min(self.rows_per_slab - place, last - done)
            spans.append((slab, slice(place, place + count), slice(done - first, done - first + count)))
            done += count
        return spans

    def _copies(self, kind: int, source: Tensor, sums: tuple[np.ndarray, np.ndarray] | None) -> list[threads.Piece]:
        """Pieces of work that copy rows behind the last and take their checksums, or those that are given. On the host."""
        given = _bits(source.detach().cpu())
        pieces: list[threads.Piece] = []
        for slab, places, rows in self._spans(self.blocks, self.blocks + len(given)):
            known = None if sums is None else sums[kind][rows]
            pages = _bits(slab.pages[kind][places])
            pieces.append(partial(_copy, given[rows], pages, slab.sums[kind][places], known))
        return pieces

    def _copy_aside(self, sources: tuple[Tensor, Tensor], count: int) -> None:
        """Copy on a side stream behind what the current stream has computed; checksums follow when it is done."""
        with self.side.queue():
            for kind in (KEYS, VALUES):
                source = sources[kind].contiguous()
                for slab, places, rows in self._spans(self.blocks, self.blocks + count):
                    slab.pages[kind][places].copy_(source[rows], non_blocking=True)
            self.side.keep(*sources)
            event = self.side.mark()
        self._pending.append(_Pending(self.blocks, self.blocks + count, event, sources))

    def _settle(self) -> None:
        """Wait for copies under way and take their checksums: before the host reads."""
        while self._pending:
            event = self._pending[0].event
            if event is not None:
                event.synchronize()
            self._take_first()

    def _await(self, last: int) -> None:
        """Have block rows before `last` on the host."""
        if self.arrived < last:
            self._settle()

    def flush(self) -> None:
        """Take the checksums of copies that have arrived; wait for none."""
        while self._pending and has_come(self._pending[0].event):
            self._take_first()

    def _take_first(self) -> None:
        pending = self._pending[0]
        self._sign(pending.first, min(pending.last, self.blocks))
        self._pending.pop(0)

    def ready(self) -> None:
        """Have the current stream wait for copies under way, before a kernel reads pages. The host does not wait."""
        for pending in self._pending:
            wait_for(self.device, pending.event)

    def table(self) -> PageTable:
        """Where pages lie, for kernels; to be used after `ready`. Made anew only when there are other slabs."""
        if self._table is None:
            with torch.inference_mode(False):
                host = torch.empty(len(self.slabs), dtype=torch.int64, pin_memory=self.device.type == "cuda")
                host.copy_(torch.tensor([slab.memory.data_ptr() for slab in self.slabs], dtype=torch.int64))
                there = host.to(self.device, non_blocking=True)
            units = self.batch * self.heads
            key_bytes, value_bytes = (self.block * width * self.dtype.itemsize for width in self.widths)
            offset = self.rows_per_slab * units * key_bytes
            self._table = PageTable(there, self.rows_per_slab, offset, units, (key_bytes, value_bytes), host)
        self._addressed = True
        return self._table

    def _let_go(self, slabs: list[Slab]) -> None:
        """Slabs are about to be freed: a copy of one byte has the allocator wait for kernels that may be reading them."""
        if self._addressed and asynchronous(self.device):
            try:
                with self.side.queue():
                    for slab in slabs:
                        slab.memory[:1].to(self.device, non_blocking=True)
            except RuntimeError:  # not even that much memory
                torch.cuda.synchronize(self.device)

    def _sign(self, first: int, last: int) -> None:
        """Take the checksums of block rows first..last-1."""
        for slab, places, _ in self._spans(first, last):
            for kind in (KEYS, VALUES):
                _sign(_bits(slab.pages[kind][places]), slab.sums[kind][places])

    def _verify(self, slab: Slab, place: int, kind: int, row: int, batch: int, head: int) -> None:
        if _digest(_bits(slab.pages[kind][place, batch, head])) != int(slab.sums[kind][place, batch, head]):
            raise CorruptedPageError(
                f"Layer {self.layer}: the originals of block {row} ({('keys', 'values')[kind]}, batch row {batch}, KV head "
                f"{head}) no longer match their checksum. Host memory was overwritten or is faulty; nothing was returned "
                "from this page. Rebuild the cache from the prompt."
            )

    def read_pages(self, kind: int, rows: Tensor, heads: Tensor, blocks: Tensor) -> Tensor:
        """Originals of single pages, on the device: `[n, block, channels]`.

        Args: kind: KEYS or VALUES; rows, heads, blocks: int64 `[n]`, batch row, KV head and block of each page.
        Raises: CorruptedPageError: a checksum does not match.
        """
        self._settle()
        places = list(zip(blocks.tolist(), rows.tolist(), heads.tolist(), strict=True))
        pinned = self.device.type == "cuda"
        out = torch.empty(len(places), self.block, self.widths[kind], dtype=self.dtype, pin_memory=pinned)
        for i, (block, batch, head) in enumerate(places):
            slab, place = self._place(block)
            self._verify(slab, place, kind, block, batch, head)
            out[i] = slab.pages[kind][place, batch, head]
        return out.to(self.device, non_blocking=pinned)

    def read_range(self, kind: int, first: int, last: int, rows: slice, heads: slice) -> Tensor:
        """Originals of blocks first..last-1, on the device: `[batch rows, kv heads, tokens, channels]`.

        Raises: CorruptedPageError: a checksum does not match.
        """
        self._await(last)
        if asynchronous(self.device) and rows == heads == slice(None):
            self.verify_range(kind, first, last)
            return self.lift(kind, first, last).movedim(0, 2).flatten(2, 3)
        batch_range, head_range = range(self.batch)[rows], range(self.heads)[heads]
        shape = (len(batch_range), len(head_range), last - first, self.block, self.widths[kind])
        pinned = self.device.type == "cuda"
        out = torch.empty(shape, dtype=self.dtype, pin_memory=pinned)
        for slab, places, these in self._spans(first, last):
            self._verify_span(kind, slab, places, first + these.start, batch_range, head_range)
            out[:, :, these] = slab.pages[kind][places, rows, heads].movedim(0, 2)
        return out.flatten(2, 3).to(self.device, non_blocking=pinned)

    def _verify_span(self, kind: int, slab: Slab, places: slice, row: int, batches: range, heads: range) -> None:
        """Verify some pages of block rows from `row` on, which lie in one slab."""
        for step, place in enumerate(range(places.start, places.stop)):
            for batch in batches:
                for head in heads:
                    self._verify(slab, place, kind, row + step, batch, head)

    def verify_range(self, kind: int, first: int, last: int) -> None:
        """Verify all pages of block rows first..last-1 on the host. Raises: CorruptedPageError."""
        self._await(last)
        every = range(self.batch), range(self.heads)
        spans = self._spans(first, last)
        threads.share([partial(self._verify_span, kind, slab, places, first + at.start, *every) for slab, places, at in spans])

    def lift(self, kind: int, first: int, last: int) -> Tensor:
        """Pages of block rows first..last-1 as they are, unverified, by the current stream: `[rows, B, H, block, channels]`."""
        shape = (last - first, self.batch, self.heads, self.block, self.widths[kind])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for slab, places, rows in self._spans(first, last):
            out[rows].copy_(slab.pages[kind][places], non_blocking=True)
        return out

    @property
    def arrived(self) -> int:
        """Blocks before the first whose copy may be under way."""
        return self._pending[0].first if self._pending else self.blocks

    def arriving(self, kind: int, first: int) -> Tensor:
        """Originals of all blocks from `first` on, which have not `arrived`: `[batch, kv heads, tokens, channels]`."""
        late = [
            (pending.sources[kind].movedim(0, 2), first - pending.first) for pending in self._pending if pending.last > first
        ]
        return torch.cat([source[:, :, max(0, skip) :] for source, skip in late], dim=2).flatten(2, 3)

    def truncate(self, blocks: int) -> None:
        """Forget all blocks from `blocks` on, and give back slabs that hold none."""
        if any([pending.last > blocks for pending in self._pending]):
            self._settle()
        self.blocks = min(self.blocks, blocks)
        self.device_sums.length = min(self.device_sums.length, self.blocks)
        needed = -(-self.blocks // self.rows_per_slab)
        if needed < len(self.slabs):
            self._let_go(self.slabs[needed:])
            self._table = None
            del self.slabs[needed:]

    def checkpoint(self) -> Callable[[], None]:
        """What brings back the pages that there are now, as long as none is added meanwhile."""
        blocks, slabs, signed = self.blocks, list(self.slabs), self.device_sums.length

        def undo() -> None:
            self._table = None
            self.blocks, self.slabs, self.device_sums.length = blocks, slabs, signed

        return undo

    def selected(self, index: Tensor) -> ShadowPages:
        """Pages of the batch rows in `index` (int64 `[n]`), as a new store; checksums are carried, not renewed."""
        self._settle()
        index = index.cpu()
        new = ShadowPages(self.layer, len(index), self.heads, self.block, self.widths, self.dtype, self.device)
        for first in range(0, self.blocks, self.rows_per_slab):
            slab = self.slabs[first // self.rows_per_slab]
            count = min(self.rows_per_slab, self.blocks - first)
            parts = [slab.pages[kind][:count, index].movedim(0, 2) for kind in (KEYS, VALUES)]
            kept = [slab.sums[kind][:count][:, index.numpy()] for kind in (KEYS, VALUES)]
            new.append(parts[0], parts[1], sums=(kept[0], kept[1]))
        new.signs = self.signs
        new.device_sums = self.device_sums.selected(index)
        return new

    @property
    def nbytes(self) -> int:
        """Host bytes: slabs as allocated, and checksums. `device_sums` lie on the device and are not among them."""
        return sum(slab.memory.numel() + sum(part.nbytes for part in slab.sums) for slab in self.slabs)


class _SharedPages(ShadowPages):
    """Pages that a GPU reads by itself. On a CPU nothing runs when pages are freed: Ctrl-C would be lost in there."""

    def __del__(self) -> None:
        with suppress(Exception):  # also of an object that was never finished, and when the process ends
            self._let_go(self.slabs)


def _bits(x: Tensor) -> np.ndarray:
    """A tensor on the host as numpy can have it: its numbers' bits, as integers."""
    return x.view(INTEGERS[x.dtype.itemsize]).numpy()


def _sign(pages: np.ndarray, sums: np.ndarray) -> None:
    """The checksums of pages `[rows, batch, heads, block, channels]`, contiguous."""
    every = pages.reshape(sums.size, -1)
    sums.reshape(-1)[:] = np.array([_digest(page) for page in every], dtype=np.uint64)


def _copy(source: np.ndarray, pages: np.ndarray, sums: np.ndarray, known: np.ndarray | None) -> None:
    """Copy pages; take their checksums while they are near, unless they are known."""
    pages[...] = source
    if known is None:
        _sign(pages, sums)
    else:
        sums[...] = known


def _digest(page: np.ndarray) -> int:
    """XXH3-64 of a contiguous page's bytes."""
    return xxhash.xxh3_64_intdigest(page.data)
