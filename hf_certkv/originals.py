"""The exact originals of a layer, wherever they lie: the sink and the tail on the device, finished blocks in host pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import CertKVConfig
from .errors import InputError
from .handle import KEYS, VALUES
from .shadow import ShadowPages
from .store import BlockStore, GrowingBuffer
from .streams import asynchronous, wait_for

if TYPE_CHECKING:
    from .cache import CertifiedQuantizedCache


@dataclass
class Ahead:
    """Pages of the first blocks on their way to the device, not verified yet. Attributes: pages: by kind, taken out once."""

    pages: dict[int, Tensor]
    blocks: int
    epoch: int
    event: torch.cuda.Event | None


class Originals:
    """The part of a layer that reads originals.

    The tokens that the device holds exactly lie in one buffer each for keys and values: the sink blocks at the front and the
    tail behind them, without the blocks that were quantised in between.
    """

    config: CertKVConfig
    sequence_length: int
    new_tokens: int
    layer_idx: int
    epoch: int
    device: torch.device
    exact: tuple[GrowingBuffer, GrowingBuffer]
    store: BlockStore
    shadow: ShadowPages | None
    ahead: Ahead | None
    _owner: Callable[[], CertifiedQuantizedCache | None]

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
        found = self._together(kind, 0, slice(None), slice(None))[:, :, :length].contiguous()
        if kind == VALUES and self.new_tokens > self.config.certify_queries:  # the next layer will be computed exactly as well
            following = self.following()
            if following is not None:
                following.fetch_ahead()
        return found

    def following(self) -> Originals | None:
        """The next layer of the model, if it is quantised."""
        owner = self._owner()
        layers = [] if owner is None else owner.layers[self.layer_idx + 1 : self.layer_idx + 2]
        return layers[0] if layers and isinstance(layers[0], Originals) else None

    def fetch_ahead(self) -> None:
        """Start copying all originals to the device beside what it computes, for `materialise` to use. On the CPU: nothing."""
        self.ahead, shadow, blocks = None, self.shadow, self.store.blocks
        if shadow is None or blocks == 0 or not asynchronous(self.device):
            return
        try:
            with shadow.side.queue(behind=False):
                pages = {kind: shadow.lift(kind, 0, blocks) for kind in (KEYS, VALUES)}
                self.ahead = Ahead(pages, blocks, self.epoch, shadow.side.mark())
        except torch.OutOfMemoryError:  # then they are fetched when they are needed
            return

    def _fetched(self, kind: int) -> tuple[Tensor, int] | None:
        """What `fetch_ahead` has brought of these blocks, verified, `[B, H, tokens, channels]`, and how many blocks; once."""
        ahead, shadow = self.ahead, self.shadow
        if ahead is None or shadow is None:
            return None
        if ahead.epoch != self.epoch or ahead.blocks > self.store.blocks or kind not in ahead.pages:
            self.ahead = None
            return None
        pages = ahead.pages.pop(kind)
        if not ahead.pages:
            self.ahead = None
        shadow.verify_range(kind, 0, ahead.blocks)
        wait_for(self.device, ahead.event)
        if pages.is_cuda:
            pages.record_stream(torch.cuda.current_stream(self.device))
        return pages.movedim(0, 2).flatten(2, 3), ahead.blocks

    def unit_originals(self, kind: int, row: int, head: int) -> Tensor:
        """The exact originals of one batch row and KV head: `[1, 1, tokens, channels]`."""
        return self._together(kind, 0, slice(row, row + 1), slice(head, head + 1))

    def _together(self, kind: int, first: int, rows: slice, heads: slice) -> Tensor:
        """The originals of some batch rows and KV heads, without those of the blocks before `first`."""
        assert self.shadow is not None
        exact, sink = self.exact[kind].view[rows, heads], self.sink_tokens
        parts: list[Tensor] = []
        whole = rows == heads == slice(None)
        fetched = self._fetched(kind) if whole and first == 0 else None
        if fetched is not None:
            parts, first = [fetched[0]], fetched[1]
        # Blocks that were finished just now are still on the device: the host need not wait for their copy.
        stop = max(first, self.shadow.arrived) if whole else self.store.blocks
        if first < stop:
            parts.append(self.shadow.read_range(kind, first, stop, rows, heads))
        if stop < self.store.blocks:
            parts.append(self.shadow.arriving(kind, stop))
        return torch.cat([exact[:, :, :sink], *parts, exact[:, :, sink:]], dim=2)

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
