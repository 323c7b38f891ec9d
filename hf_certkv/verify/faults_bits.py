"""Single bits flipped in stored blocks and in pages of originals: where they are, and how a cache to flip them in is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..handle import KEYS, VALUES
from ..layers import CertifiedLayer
from ..shadow import Slab
from ..store import PARTS, GrowingBuffer
from .cases import Case, call_on, new_cache
from .faults_state import fresh_copy

STORED = tuple((kind, name) for kind in ("keys", "values") for name in (*PARTS, "checksum"))


@dataclass(frozen=True)
class Format:
    """Settings and sizes of a cache whose bits are flipped."""

    value_bits: int
    block: int
    refine: str
    value_group: int | None
    dtype: torch.dtype
    widths: tuple[int, int]

    @property
    def name(self) -> str:
        """For figures."""
        values = f"int{self.value_bits}, planes {self.refine}, block {self.block}, group {self.value_group}"
        return f"{values}, {str(self.dtype).removeprefix('torch.')}, channels {self.widths}"


FORMATS = (
    Format(4, 16, "host", None, torch.float32, (8, 8)),
    Format(4, 16, "device", 2, torch.bfloat16, (7, 9)),
    Format(8, 16, "host", 0, torch.float16, (5, 6)),
    Format(4, 32, "off", 3, torch.bfloat16, (16, 11)),
    Format(8, 64, "device", None, torch.float32, (4, 20)),
    Format(4, 64, "host", 0, torch.float16, (33, 16)),
    Format(8, 32, "off", 16, torch.float32, (20, 33)),
    Format(4, 16, "device", 16, torch.float16, (16, 32)),  # these two fill the vectors of the CPU kernel
    Format(8, 16, "off", 0, torch.float32, (32, 16)),
)


# What the Triton kernels take.
FORMATS_OF_TRITON = (
    Format(4, 16, "host", None, torch.float32, (8, 8)),
    Format(4, 16, "device", 16, torch.bfloat16, (16, 32)),
    Format(8, 32, "off", 0, torch.float16, (33, 9)),
)


@dataclass
class Subject:
    """A cache of one layer, a step that is about to be taken on it, and what that step gives undisturbed.

    Attributes: blocks, batch, heads: quantised blocks and sizes; changes: of the settings; cache; case: all originals, the new
        token's included, and the query.
    """

    form: Format
    device: torch.device
    seed: int
    blocks: int
    batch: int = 1
    heads: int = 2
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        form, generator = self.form, torch.Generator().manual_seed(self.seed)
        tokens = (2 + self.blocks) * form.block + 5  # a sink block, a block of exact tokens, five of an unfinished one
        shape = (self.batch, self.heads, tokens)
        keys, values = (torch.randn(*shape, width, generator=generator).to(form.dtype) for width in form.widths)
        query = torch.randn(self.batch, 2 * self.heads, 1, form.widths[0], generator=generator).to(form.dtype)
        settings: dict[str, Any] = {
            "value_bits": form.value_bits,
            "block_size": form.block,
            "refine": form.refine,
            "value_group": form.value_group,
            "sink_blocks": 1,
            "recent_window": form.block,
            **self.changes,
        }
        self.case = Case(query, keys, values, settings=settings).to(self.device)
        self.cache = new_cache(self.case)
        self.cache.update(self.case.keys[:, :, :-1], self.case.values[:, :, :-1], 0)

    @property
    def layer(self) -> CertifiedLayer:
        """The one layer."""
        return self.cache.certified_layers[0]

    def copy(self) -> Subject:
        """The same tokens, in a cache of its own."""
        new = object.__new__(Subject)
        new.__dict__.update(self.__dict__)
        new.cache = fresh_copy(self.cache)
        return new

    def called(self) -> Tensor:
        """A certified step with the new token, whose record nobody has looked at."""
        held = self.cache.update(self.case.keys[:, :, -1:], self.case.values[:, :, -1:], 0)
        return call_on(self.case, *held)

    def looked_at(self) -> None:
        """The step is over, and its record is looked at. Raises: CorruptedPageError: it met a damaged page."""
        self.cache.recorder.commit()
        self.cache.recorder.look(wait=True)

    def step(self) -> Tensor:
        """The whole step."""
        output = self.called()
        self.looked_at()
        return output


def buffer_of(layer: CertifiedLayer, kind: str, name: str) -> GrowingBuffer | None:
    """A buffer of the store, or None where the format has none."""
    buffer = (layer.store.keys if kind == "keys" else layer.store.values)[name]
    return buffer if buffer.data is not None else None


def bytes_of(buffer: GrowingBuffer) -> Tensor:
    """The bytes of a buffer, its unused room included: uint8 `[batch, kv_heads, blocks and room, bytes a block]`, a view."""
    data = buffer.data
    assert data is not None
    flat = data.flatten(3) if data.dim() > 3 else data.unsqueeze(-1)
    return flat.view(torch.uint8)


def flip(raw: Tensor, place: tuple[Any, ...], bit: Any) -> None:
    """Flip bits in place: `bit` counts within each of the entries of `place`, numbers or int64 tensors."""
    bits = torch.as_tensor(bit, device=raw.device)
    index = (*(torch.as_tensor(part, device=raw.device) for part in place), bits // 8)
    raw[index] = raw[index] ^ (torch.ones_like(bits) << (bits % 8)).to(torch.uint8)


def bits_stored(layer: CertifiedLayer) -> dict[tuple[str, str], int]:
    """Bits a block, by part, of what the format stores."""
    found = {}
    for kind, name in STORED:
        buffer = buffer_of(layer, kind, name)
        if buffer is not None:
            found[kind, name] = 8 * bytes_of(buffer).shape[-1]
    return found


@dataclass(frozen=True)
class Place:
    """A single bit of what is stored of a block."""

    kind: str
    part: str
    row: int
    head: int
    block: int
    bit: int

    def __str__(self) -> str:
        return f"bit {self.bit} of the {self.kind}' {self.part}, batch row {self.row}, KV head {self.head}, block {self.block}"

    def flip(self, layer: CertifiedLayer) -> None:
        """Flip it, or flip it back."""
        buffer = buffer_of(layer, self.kind, self.part)
        assert buffer is not None
        flip(bytes_of(buffer), (self.row, self.head, self.block), self.bit)


def random_place(layer: CertifiedLayer, rng: np.random.Generator) -> Place:
    """A bit at random: first the part, then the bit, so that small parts get their share."""
    sizes = bits_stored(layer)
    kind, part = sorted(sizes)[int(rng.integers(len(sizes)))]
    row, head, block = (int(rng.integers(size)) for size in (layer.batch, layer.heads, layer.store.blocks))
    return Place(kind, part, row, head, block, int(rng.integers(sizes[kind, part])))


@dataclass(frozen=True)
class PagePlace:
    """A single bit of a page of originals, or of its checksum."""

    kind: int
    of_sum: bool
    row: int
    head: int
    block: int
    bit: int

    def __str__(self) -> str:
        what = "the checksum of " if self.of_sum else ""
        name = ("keys", "values")[self.kind]
        return f"bit {self.bit} of {what}page {self.block} ({name}), batch row {self.row}, KV head {self.head}"

    def raw(self, layer: CertifiedLayer) -> np.ndarray:
        """The bytes it lies in, in place."""
        slab, place = slab_of(layer, self.block)
        if self.of_sum:
            return slab.sums[self.kind][place, self.row, self.head : self.head + 1].view(np.uint8)
        return slab.pages[self.kind][place, self.row, self.head].flatten().view(torch.uint8).numpy()

    def flip(self, layer: CertifiedLayer) -> None:
        """Flip it, or flip it back."""
        self.raw(layer)[self.bit // 8] ^= np.uint8(1 << (self.bit % 8))

    def read(self, layer: CertifiedLayer) -> None:
        """Read the page. Raises: CorruptedPageError."""
        assert layer.shadow is not None
        layer.shadow.read_pages(self.kind, *(torch.tensor([at]) for at in (self.row, self.head, self.block)))


@dataclass(frozen=True)
class SumPlace:
    """A single bit of the checksum that the Triton kernels compare a page with."""

    kind: int
    row: int
    head: int
    block: int
    bit: int

    def __str__(self) -> str:
        name = ("keys", "values")[self.kind]
        return (
            f"bit {self.bit} of the device's checksum of page {self.block} ({name}), batch row {self.row}, KV head {self.head}"
        )

    def flip(self, layer: CertifiedLayer) -> None:
        """Flip it, or flip it back."""
        assert layer.shadow is not None and layer.shadow.device_sums.data is not None
        raw = layer.shadow.device_sums.data.view(torch.uint8)
        flip(raw[self.row, self.head, self.block], (), 64 * self.kind + self.bit)


def slab_of(layer: CertifiedLayer, block: int) -> tuple[Slab, int]:
    """The slab that holds a block's pages, and its place there; copies under way have arrived."""
    assert layer.shadow is not None
    layer.shadow._settle()
    return layer.shadow._place(block)


def random_page(layer: CertifiedLayer, rng: np.random.Generator, first: int = 0) -> PagePlace:
    """A bit of a page from block `first` on; one in eight is of a checksum."""
    kind, of_sum = int(rng.integers(2)), int(rng.integers(8)) == 0
    row, head = int(rng.integers(layer.batch)), int(rng.integers(layer.heads))
    block = int(rng.integers(first, layer.store.blocks))
    bits = 64 if of_sum else 8 * layer.block * layer.widths[kind] * layer.dtype.itemsize
    return PagePlace(kind, of_sum, row, head, block, int(rng.integers(bits)))


def every_page_bit(layer: CertifiedLayer, block: int) -> Iterator[PagePlace]:
    """Every bit of a block's pages and checksums, batch row 0, KV head 0."""
    for kind in (KEYS, VALUES):
        for of_sum in (True, False):
            bits = 64 if of_sum else 8 * layer.block * layer.widths[kind] * layer.dtype.itemsize
            for bit in range(bits):
                yield PagePlace(kind, of_sum, 0, 0, block, bit)
