"""Certified layers of other kinds: sliding and chunked attention, and attention beside linear attention in one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from .config import CertKVConfig
from .errors import CacheStateError
from .handle import KEYS, VALUES
from .layers import CertifiedLayer

if TYPE_CHECKING:
    from .cache import CertifiedQuantizedCache


class CertifiedSlidingLayer(CertifiedLayer):
    """A layer of which a token attends to the last `window` tokens only: older ones are given up, whole strides at a time.

    What is held is a function of the number of tokens before the last update: all from `start_of` that number on. What is
    shown is what transformers' own layer would hold: the last `window - 1` tokens before it, and the new ones. There is no
    exact sink block.

    Args: as `CertifiedLayer`; window: tokens that a token attends to, itself among them; for chunked attention, of a chunk.
    """

    is_sliding = True

    def __init__(self, config: CertKVConfig, layer_idx: int, cache: CertifiedQuantizedCache, window: int) -> None:
        self.sliding_window = window
        self.stride = config.block_size * max(1, window // (4 * config.block_size))
        self.record_past = False
        super().__init__(config.replace(sink_blocks=0), layer_idx, cache)

    def activate_past_recording(self) -> None:
        """As in transformers: have `crop` able to undo a whole update. Without, it is all but the first."""
        self.record_past = True

    def _clear(self) -> None:
        super()._clear()
        self.dropped = self.hidden = 0  # tokens before the first that is held; of those held, that are not shown

    def start_of(self, length: int) -> int:
        """Where the tokens that are held for a token behind `length` others begin; a multiple of the block size."""
        return max(0, length - (self.sliding_window - 1)) // self.stride * self.stride

    def held(self, length: int) -> int:
        """Tokens held after one prefill of `length`, unless past is recorded: then all are, until the next update."""
        return length - self.start_of(length)

    def dense_tokens(self, length: int) -> int:
        """Tokens that transformers' own layer holds: a window without the next token."""
        return min(length, self.sliding_window - 1)

    def get_seq_length(self) -> int:
        """Tokens that this layer was given."""
        return self.dropped + self.sequence_length

    def get_max_length(self) -> int:
        """The window, as in transformers."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return for `query_length` new tokens."""
        offset = max(0, self.get_seq_length() - (self.sliding_window - 1))
        return self.get_seq_length() + query_length - offset, offset

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `CertifiedLayer.update`; tokens that no later token attends to are given up first."""
        self._check(key_states, value_states)
        before = self.get_seq_length()
        if self.sequence_length:
            self._slide(self.start_of(before))
        if self.sequence_length:
            self.hidden = max(0, before - (self.sliding_window - 1)) - self.dropped
            return super().update(key_states, value_states, *args, **kwargs)
        # Nothing is held: attention sees the new tokens as they are, of which only the last ones are kept.
        count = key_states.shape[2]
        cut = 0 if self.record_past else self.start_of(before + count) - self.dropped
        if cut <= 0:
            return super().update(key_states, value_states, *args, **kwargs)
        super().update(key_states[:, :, cut:], value_states[:, :, cut:], *args, **kwargs)
        self.dropped, self.new_tokens = self.dropped + cut, count
        return key_states.contiguous(), value_states.contiguous()

    def _slide(self, start: int) -> None:
        """Give up what is before `start`. On an error nothing has changed."""
        cut = start - self.dropped
        if cut <= 0:
            return
        self.settle()
        keys, values = (self.materialise(kind)[:, :, cut:] for kind in (KEYS, VALUES))
        before, epoch = dict(self.__dict__), self.epoch
        try:
            self._clear()
            if keys.shape[2]:
                self.lazy_initialization(keys, values)
                self._append(keys.contiguous(), values.contiguous())
                self.sequence_length = keys.shape[2]
            self.dropped = start
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            self.epoch = epoch
            raise

    def checkpoint(self) -> Callable[[], None]:
        """As `CertifiedLayer.checkpoint`: when `update` gives tokens up, it puts new stores in place of the old ones."""
        before, undo_rest = dict(self.__dict__), super().checkpoint()

        def undo() -> None:
            epoch = self.epoch
            self.__dict__.clear()
            self.__dict__.update(before)
            self.epoch = epoch
            undo_rest()
            self.dropped = before["dropped"]

        return undo

    def prepare_crop(self, tokens_to_remove: int) -> Callable[[], None]:
        """As `CertifiedLayer.prepare_crop`. Raises: CacheStateError: tokens within the window have been given up."""
        left = self.get_seq_length() + int(tokens_to_remove)
        if int(tokens_to_remove) < 0 and self.dropped and left - (self.sliding_window - 1) < self.dropped:
            raise CacheStateError(
                f"crop({int(tokens_to_remove)}): the next token would attend to tokens that layer {self.layer_idx}, of sliding "
                f"attention over {self.sliding_window} tokens, has given up: all before token {self.dropped}. Crop less."
            )
        return super().prepare_crop(tokens_to_remove)


class CertifiedHybridLayer(CertifiedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with attention, which is certified, beside linear attention, whose states are transformers' own."""

    def __init__(self, config: CertKVConfig, layer_idx: int, cache: CertifiedQuantizedCache, number_of_states: int = 1) -> None:
        super().__init__(config, layer_idx, cache)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """With two tensors of the attention; with keywords of the linear attention, as in transformers."""
        if len(args) == 2:
            CertifiedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can put the states back."""
        return bool(LinearAttentionLayer.is_croppable.__get__(self))

    def _states(self) -> tuple[dict[int, Tensor | None], dict[int, Tensor | None]]:
        return self.conv_states, self.recurrent_states

    def reset(self) -> None:
        """Forget all tokens, and the states."""
        CertifiedLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def _select_batch(self, index: Tensor) -> None:
        chosen = [
            {i: None if state is None else state.index_select(0, index.to(state.device)) for i, state in states.items()}
            for states in self._states()
        ]
        super()._select_batch(index)
        self.conv_states, self.recurrent_states = chosen

    def prepare_crop(self, tokens_to_remove: int) -> Callable[[], None]:
        """As `CertifiedLayer.prepare_crop`. Raises: RuntimeError: the states do not go back, as in transformers."""
        carry_out = super().prepare_crop(tokens_to_remove)
        if not (tokens_to_remove or self.record_past) or not self.is_initialized:
            return carry_out
        before = dict(self.conv_states)
        try:
            LinearAttentionLayer.crop(self, tokens_to_remove)
            cropped = dict(self.conv_states)
        finally:
            self.conv_states = before

        def both() -> None:
            carry_out()
            self.conv_states = cropped

        return both

    def nbytes(self) -> dict[str, int]:
        """As `CertifiedLayer.nbytes`, with the states."""
        states = sum(state.nbytes for part in self._states() for state in part.values() if state is not None)
        return {**super().nbytes(), "exact_layers": states}

    def dense_nbytes(self) -> int:
        """Bytes that transformers' layer of the same tokens holds."""
        return super().dense_nbytes() + self.nbytes()["exact_layers"]


def certified_kind(layer: Any, settings: CertKVConfig, index: int, cache: CertifiedQuantizedCache) -> Any:
    """The certified layer in place of one of transformers' own; that one itself where there is none."""
    if type(layer) is DynamicLayer:
        return CertifiedLayer(settings, index, cache)
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return CertifiedHybridLayer(settings, index, cache, layer.number_of_states)
    if type(layer) is DynamicSlidingWindowLayer and settings.certify_sliding:
        return CertifiedSlidingLayer(settings, index, cache, layer.sliding_window)
    return layer
