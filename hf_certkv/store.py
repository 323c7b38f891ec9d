"""Device storage of one layer: buffers that grow, and the quantised blocks. No attention, no policy."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .checksums import block_checksum
from .codecs import PER_LEVEL, EncodedBlocks, KeyCodec, ValueCodec
from .hot_slots import HotSlots as HotSlots
from .kernels import cpu
from .precision import full_precision

ENCODE_NUMBERS = 2**16  # numbers quantised at a time: bounds the float64 scratch of a prefill
COMPILED = True  # whether a compiled writer is used where there is one; the codecs make the same blocks
WRITER = "auto"  # or "triton", in its interpreter also on the CPU, or "codec": which one; by default the one for the device
PARTS = ("codes", "plane", "scale", "offset", "numbers", "lengths")  # of a block, in the order in which its checksum takes them
Index = tuple[Tensor, Tensor, Tensor]  # int64 [n] each: batch row, KV head, block


class GrowingBuffer:
    """A tensor `[batch, kv_heads, length, ...]` with room to grow along its third axis.

    Args:
        room: entries to allocate at least. After that it grows by 1/64 of itself or what is needed, so that the unused
            room stays under 2 %, and a decode step over quantised blocks allocates nothing but once a block.

    Attributes: pinned: whether it lies in host memory that a GPU reads and writes by itself. Such allocations are rounded up to
        a power of two: so it grows to the next one.
    """

    def __init__(self, room: int = 0) -> None:
        self.data: Tensor | None = None
        self.length = 0
        self.room = room
        self.pinned = False

    def reserve(self, like: Tensor, count: int) -> Tensor:
        """Make room for `count` more entries shaped as those of `like`; all of the data. The contents do not change."""
        needed = max(self.length + count, self.room)
        if self.data is not None and self.data.shape[2] >= needed:
            return self.data
        if self.data is not None:
            needed = max(needed, self.length + max(count, self.length // 64))
        if self.pinned:
            each = math.prod((*like.shape[:2], *like.shape[3:])) * like.dtype.itemsize
            needed = (1 << (needed * each - 1).bit_length()) // each
            self.settle()
        shape = (*like.shape[:2], needed, *like.shape[3:])
        with torch.inference_mode(False):  # written again later, perhaps outside of inference mode
            grown = torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=self.pinned)
        if self.data is not None:
            grown[:, :, : self.length] = self.data[:, :, : self.length]
        self.data = grown
        return grown

    def append(self, entries: Tensor) -> None:
        """Add entries `[batch, kv_heads, count, ...]`."""
        self.write(entries)
        self.length += entries.shape[2]

    def write(self, entries: Tensor) -> None:
        """Put entries behind the last, without counting them yet."""
        place = self.reserve(entries, entries.shape[2])[:, :, self.length : self.length + entries.shape[2]]
        place.copy_(entries)

    def settle(self) -> None:
        """Have the GPU come to an end with what it writes here, or reads, before the host does either. Nothing elsewhere."""
        if self.pinned and self.data is not None:
            torch.cuda.synchronize()

    @property
    def view(self) -> Tensor:
        """The entries, without the room: `[batch, kv_heads, length, ...]`."""
        assert self.data is not None, "nothing was appended yet"
        return self.data[:, :, : self.length]

    def selected(self, index: Tensor) -> GrowingBuffer:
        """A copy with the batch rows in `index` (int64 `[n]`)."""
        new = GrowingBuffer(self.room)
        new.pinned = self.pinned
        if self.data is not None:
            self.settle()
            with torch.inference_mode(False):
                new.data = self.data.index_select(0, index.to(self.data.device))
                new.data = new.data.pin_memory() if self.pinned else new.data
            new.length = self.length
        return new

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room included."""
        return self.data.nbytes if self.data is not None else 0


def slice_across(buffer: GrowingBuffer, new: Tensor, held: int, start: int, stop: int) -> Tensor:
    """Entries start..stop-1 of `held` ones in a buffer followed by `new`, without copying where one of them holds all."""
    if start >= held:
        return new[:, :, start - held : stop - held]
    old = buffer.view[:, :, start : min(stop, held)]
    return old if stop <= held else torch.cat([old, new[:, :, : stop - held]], dim=2)


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def compiled_writer(*originals: Tensor) -> ModuleType | None:
    """`kernels.cpu_write` or `triton_write`, the one that can encode blocks of all `originals`, or None: then the codecs do."""
    device = originals[0].device
    if COMPILED and WRITER != "codec" and (device.type == "cuda" or WRITER == "triton"):
        return _triton_writer(originals)
    writer = _compiled(device)
    return writer if writer is not None and all([x.dtype in writer.FORMS for x in originals]) else None


def _triton_writer(originals: tuple[Tensor, ...]) -> ModuleType | None:
    """`kernels.triton_write` where it is installed, runs on the device and has room for such blocks."""
    if not _triton_installed():
        return None
    from .kernels import triton_common, triton_write

    runs = originals[0].device.type == "cuda" or triton_common.interpreted()
    return triton_write if runs and all([triton_write.fits(x) for x in originals]) else None


def _compiled(device: torch.device) -> ModuleType | None:
    """`kernels.cpu_write` where it is installed and the blocks lie where it can read them."""
    if not COMPILED or WRITER == "codec" or device.type != "cpu" or not cpu.installed():
        return None
    from .kernels import cpu_write

    return cpu_write


def part_shapes(codec: KeyCodec | ValueCodec, tokens: int, channels: int) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of the parts of one block, checksum included; no plane where the format has none."""
    half = (channels + 1) // 2
    if isinstance(codec, KeyCodec):
        width, steps = channels, [channels]
    else:
        width = channels if codec.bits == 8 else half
        steps = [tokens, -(-channels // codec.group_size(channels))]
    shapes: dict[str, tuple[list[int], torch.dtype]] = {"codes": ([tokens, width], torch.uint8)}
    if codec.levels == 2:
        shapes["plane"] = ([tokens, half], torch.uint8)
    shapes["scale"] = shapes["offset"] = (steps, torch.float16)
    shapes["numbers"] = ([codec.levels * PER_LEVEL + 1], torch.float32)
    if isinstance(codec, ValueCodec):
        shapes["lengths"] = ([tokens], torch.int16)
    shapes["checksum"] = ([], torch.int64)
    return shapes


def write_compiled(tasks: list[tuple[Tensor, KeyCodec | ValueCodec, dict[str, Tensor], int]]) -> None:
    """Encode and sign blocks. What the compiled writer leaves out the codec encodes.

    Args: tasks: originals `[batch, kv_heads, blocks, block, channels]`, their codec, where the parts
        `[batch, kv_heads, places, ...]`, contiguous, are to lie, and the first place.
    """
    writer = compiled_writer(*[x for x, *_ in tasks])
    assert writer is not None
    for (x, codec, data, first), left in zip(tasks, writer.write_signed(tasks, PARTS), strict=True):
        if left is None or not bool(left.any()):
            continue
        rows, heads, blocks = torch.nonzero(left, as_tuple=True)
        encoded = codec.encode(x[left])
        for name in PARTS:
            if name in data:
                data[name][rows, heads, first + blocks] = getattr(encoded, name)
        writer.sign([data.get(name) for name in PARTS], data["checksum"], first, x.shape[2])


class BlockStore:
    """The quantised blocks of one layer: codes, planes, scales, the numbers of the certificate, and a checksum of all that.

    Args: refine: `"device"`, `"host"` or `"off"`, where the refinement planes live.
    """

    def __init__(self, key_codec: KeyCodec, value_codec: ValueCodec, refine: str) -> None:
        self.key_codec, self.value_codec, self.refine = key_codec, value_codec, refine
        self.keys = {name: GrowingBuffer() for name in (*PARTS, "checksum")}
        self.values = {name: GrowingBuffer() for name in (*PARTS, "checksum")}
        self.blocks = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Quantise, measure and add whole blocks. Atomic: on an error only unused room has changed.

        Args: keys, values: originals `[batch, kv_heads, blocks, block, channels]`.
        """
        with full_precision(keys.device.type):
            self._append(keys, values)
        self.truncate(self.blocks + keys.shape[2])

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if compiled_writer(keys, values) is not None:
            given = ((keys, self.key_codec, self.keys), (values, self.value_codec, self.values))
            write_compiled([(x, codec, self._room(x, codec, buffers), self.blocks) for x, codec, buffers in given])
            return
        batch, heads, count, block, channels = keys.shape
        step = max(1, ENCODE_NUMBERS // (batch * heads * block * max(channels, values.shape[-1])))
        for start in range(0, count, step):
            stop = min(start + step, count)
            encoded = (
                self.key_codec.encode(keys[:, :, start:stop]),
                self.value_codec.encode(values[:, :, start:stop]),
            )
            for buffers, blocks in zip((self.keys, self.values), encoded, strict=True):
                for name, part in self._signed(blocks).items():
                    buffer = buffers[name]
                    buffer.pinned = keys.is_cuda and not part.is_cuda
                    if start == 0:
                        buffer.reserve(part, count)
                    buffer.length = self.blocks + start
                    buffer.append(part)

    def _room(self, x: Tensor, codec: KeyCodec | ValueCodec, buffers: dict[str, GrowingBuffer]) -> dict[str, Tensor]:
        """All data of the buffers, with room for blocks of `x` behind those that there are."""
        batch, heads, count, block, channels = x.shape
        data = {}
        for name, (shape, dtype) in part_shapes(codec, block, channels).items():
            buffers[name].length = self.blocks
            place = self._place(name, x.device)
            buffers[name].pinned = x.is_cuda and place.type == "cpu"
            like = x.new_empty((batch, heads, 0, *shape), dtype=dtype, device=place)
            data[name] = buffers[name].reserve(like, count)
        return data

    def _place(self, name: str, device: torch.device) -> torch.device:
        """Where a part lies, of blocks on `device`."""
        return torch.device("cpu") if name == "plane" and self.refine == "host" else device

    def _signed(self, blocks: EncodedBlocks) -> dict[str, Tensor]:
        """The parts of encoded blocks where they are to lie, with their checksum."""
        parts = {name: getattr(blocks, name) for name in PARTS}
        leading = blocks.numbers.dim() - 1
        parts["checksum"] = block_checksum([parts[name] for name in PARTS], leading, blocks.codes.device)
        if parts["plane"] is not None and self.refine == "host":
            parts["plane"] = parts["plane"].cpu()
        return {name: part for name, part in parts.items() if part is not None}

    def damaged(self, index: Index) -> Tensor:
        """Which blocks no longer have the checksum they were written with, keys or values: bool `[n]`."""
        wrong = torch.zeros(len(index[0]), dtype=torch.bool, device=index[0].device)
        for buffers in (self.keys, self.values):
            data = [buffers[name].data for name in PARTS]
            assert data[0] is not None
            writer = _compiled(data[0].device)
            if writer is not None:
                wrong |= writer.signatures(data, index) != _entries(buffers["checksum"], index)
                continue
            parts = [_entries(buffers[name], index) if buffers[name].data is not None else None for name in PARTS]
            wrong |= block_checksum(parts, 1, wrong.device) != _entries(buffers["checksum"], index)
        return wrong

    def rewrite(self, index: Index, keys: Tensor, values: Tensor) -> None:
        """Encode single blocks anew, in place. Args: keys, values: originals `[n, block, channels]`."""
        given = ((keys, self.key_codec, self.keys), (values, self.value_codec, self.values))
        with full_precision(keys.device.type):
            made = [self._encoded(x, codec) for x, codec, _ in given]
        for (_, _, buffers), parts in zip(given, made, strict=True):
            for name, part in parts.items():
                buffers[name].settle()
                view = buffers[name].view
                view[_moved(index, view.device)] = part

    def _encoded(self, x: Tensor, codec: KeyCodec | ValueCodec) -> dict[str, Tensor]:
        """The parts of blocks `[n, block, channels]`, by the same way as `append` goes: the numbers depend on it, by a hair."""
        if compiled_writer(x) is None:
            return self._signed(codec.encode(x))
        data = {}
        for name, (shape, dtype) in part_shapes(codec, x.shape[1], x.shape[2]).items():
            data[name] = torch.empty((1, 1, x.shape[0], *shape), dtype=dtype, device=self._place(name, x.device))
        write_compiled([(x[None, None], codec, data, 0)])
        return {name: part[0, 0] for name, part in data.items()}

    def truncate(self, blocks: int) -> None:
        """Keep the first `blocks` blocks. Cannot fail."""
        self.blocks = blocks
        for buffer in (*self.keys.values(), *self.values.values()):
            if buffer.data is not None:
                buffer.length = blocks

    def selected(self, index: Tensor) -> BlockStore:
        """A copy with the batch rows in `index`."""
        new = BlockStore(self.key_codec, self.value_codec, self.refine)
        new.keys = {name: buffer.selected(index) for name, buffer in self.keys.items()}
        new.values = {name: buffer.selected(index) for name, buffer in self.values.items()}
        new.blocks = self.blocks
        return new

    def encoded(self) -> tuple[EncodedBlocks, EncodedBlocks]:
        """Views of all blocks, keys and values; the planes are None (they are read block by block)."""
        key, value = (
            EncodedBlocks(b["codes"].view, None, b["scale"].view, b["offset"].view, b["numbers"].view, lengths)
            for b, lengths in ((self.keys, None), (self.values, self.values["lengths"].view))
        )
        return key, value

    def decode(self, kind: str, level: int, index: Index, channels: int) -> Tensor:
        """Single blocks as float32 `[n, block, channels]` at `level` 0 or 1.

        Args: kind: `"keys"` or `"values"`; index: int64 `[n]` each, batch row, KV head and block.
        """
        buffers = self.keys if kind == "keys" else self.values
        plane = None
        if level == 1:
            plane = _entries(buffers["plane"], index).to(index[0].device)
        codes, scale, offset = (_entries(buffers[name], index) for name in ("codes", "scale", "offset"))
        if kind == "keys":
            return self.key_codec.decode(codes, plane, scale, offset)
        return self.value_codec.decode(codes, plane, scale, offset, channels)

    def nbytes(self) -> dict[str, int]:
        """Bytes by part, as allocated: codes, planes (device and host), scales, numbers, checksums."""
        both = (self.keys, self.values)
        planes = sum(b["plane"].nbytes for b in both)
        return {
            "codes": sum(b["codes"].nbytes for b in both),
            "planes": planes if self.refine == "device" else 0,
            "host_planes": planes if self.refine == "host" else 0,
            "scales": sum(b["scale"].nbytes + b["offset"].nbytes for b in both),
            "numbers": sum(b["numbers"].nbytes + b["lengths"].nbytes for b in both),
            "checksums": sum(b["checksum"].nbytes for b in both),
        }


def _moved(index: Index, device: torch.device) -> Index:
    return index[0].to(device), index[1].to(device), index[2].to(device)


def _entries(buffer: GrowingBuffer, index: Index) -> Tensor:
    """Single blocks of a buffer, where the buffer lies: `[n, ...]`."""
    buffer.settle()
    return buffer.view[_moved(index, buffer.view.device)]
