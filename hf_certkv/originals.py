"""The exact originals of a layer, wherever they lie: the sink and the tail on the device, finished blocks in host pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import CertKVConfig
from .errors import InputError
from .handle import KEYS, VALUES
from .shadow import ShadowPages
from .store import BlockStore, GrowingBuffer


class Originals:
    """The part of a layer that reads originals.

    The tokens that the device holds exactly lie in one buffer each for keys and values: the sink blocks at the front and the
    tail behind them, without the blocks that were quantised in between.
    """

    config: CertKVConfig
    sequence_length: int
    exact: tuple[GrowingBuffer, GrowingBuffer]
    store: BlockStore
    shadow: ShadowPages | None

    @property
    def keys(self) -> Tensor | None:
        """The exact originals `[batch, kv_heads, tokens, channels]`, put together on every access; None while empty."""
        return self.materialise(KEYS) if self.sequence_length else None

    @keys.setter
    def keys(self, value: None) -> None:
        if value is not None:
            raise InputError("The keys of a certified layer are written by `update` only.")

    @property
    def values(self) -> Tensor | None:
        """The exact originals, as `keys`."""
        return self.materialise(VALUES) if self.sequence_length else None

    @values.setter
    def values(self, value: None) -> None:
        if value is not None:
            raise InputError("The values of a certified layer are written by `update` only.")

    @property
    def sink_tokens(self) -> int:
        """Exact tokens at the start, 0 while nothing is quantised."""
        return self.config.sink_blocks * self.config.block_size if self.store.blocks else 0

    def exact_tokens(self, kind: int) -> Tensor:
        """Sink and tail: `[batch, kv_heads, tokens, channels]`, all that is exact on the device. A view, until `update`."""
        return self.exact[kind].view

    def materialise(self, kind: int, length: int | None = None) -> Tensor:
        """The exact originals, contiguous: `[batch, kv_heads, length or all tokens, channels]`.

        Raises: CorruptedPageError: a page's checksum does not match.
        """
        if self.store.blocks == 0:
            return self.exact[kind].view[:, :, :length].clone(memory_format=torch.contiguous_format)
        return self._together(kind, 0, slice(None), slice(None))[:, :, :length].contiguous()

    def unit_originals(self, kind: int, row: int, head: int) -> Tensor:
        """The exact originals of one batch row and KV head: `[1, 1, tokens, channels]`."""
        return self._together(kind, 0, slice(row, row + 1), slice(head, head + 1))

    def _together(self, kind: int, first: int, rows: slice, heads: slice) -> Tensor:
        """The originals of some batch rows and KV heads, without those of the blocks before `first`."""
        assert self.shadow is not None
        pages = self.shadow.read_range(kind, first, self.store.blocks, rows, heads)
        exact, sink = self.exact[kind].view[rows, heads], self.sink_tokens
        return torch.cat([exact[:, :, :sink], pages, exact[:, :, sink:]], dim=2)

    def _exact_buffer(self, sink: Tensor, tail: Tensor) -> GrowingBuffer:
        """A new buffer of exact tokens; with room for the most that there can be, as long as blocks are quantised."""
        buffer = GrowingBuffer(sink.shape[2] + self.config.recent_window + self.config.block_size)
        buffer.append(sink)
        buffer.append(tail)
        return buffer

    def _exact_of(self, length: int, target: int) -> tuple[GrowingBuffer, GrowingBuffer]:
        """The exact tokens of a cache of `length` tokens, `target` blocks of which are quantised, from the originals."""
        made = []
        for kind in (KEYS, VALUES):
            kept = self._together(kind, target, slice(None), slice(None))
            kept = kept[:, :, : kept.shape[2] - (self.sequence_length - length)]
            if target:
                sink = self.sink_tokens
                made.append(self._exact_buffer(kept[:, :, :sink], kept[:, :, sink:]))
            else:
                buffer = GrowingBuffer()
                buffer.append(kept)
                made.append(buffer)
        return made[0], made[1]
