"""`CertifiedLayer`: the state of one full-attention layer. Update, crop, reorder, repeat, select, reset; no arithmetic.

How tokens are held is a function of the length alone (`finished_blocks`): the first `sink_blocks` exact on the device, then
quantised blocks whose originals lie in host pages, then at least `recent_window` exact tokens on the device. So cropping,
by however much, gives the very state that a cache of that length has.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .codecs import KeyCodec, ValueCodec
from .config import CertKVConfig
from .errors import CachePicklingError, GradientError, InputError, StaleHandleError
from .handle import KEYS, VALUES, Handle
from .hot_slots import AUTOMATIC, HotSlots, gathers, hot_budget
from .memo import BlockMemo
from .originals import Ahead, Originals
from .shadow import ShadowPages
from .store import BlockStore, GrowingBuffer, slice_across

if TYPE_CHECKING:
    from .cache import CertifiedQuantizedCache

T = TypeVar("T")
QUANTISABLE = (torch.float32, torch.float16, torch.bfloat16)


class CertifiedLayer(Originals, CacheLayerMixin):
    """One layer's keys and values: codes on the device, originals in host pages.

    Args:
        config: of the cache; layer_idx: position in the model; cache: the owner, which keeps records and undoes failed steps.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    groups: int | None = None  # query heads of a KV head, where the model's config says
    hidden = 0  # tokens held that are not shown: they are too old to be attended to

    def __init__(self, config: CertKVConfig, layer_idx: int, cache: CertifiedQuantizedCache) -> None:
        self.config, self.layer_idx = config, layer_idx
        self._owner = weakref.ref(cache)
        self.key_codec = KeyCodec(refine=config.refine != "off")
        self.value_codec = ValueCodec(config.value_bits, config.value_scale_channels, refine=config.refine != "off")
        self.epoch = 0
        self._lent: list[weakref.ref[Any]] = []
        self._memo = BlockMemo()
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.forget()
        self.is_initialized = False
        self.sequence_length = 0
        self.new_tokens = 0
        self.exact = (GrowingBuffer(), GrowingBuffer())
        self.store = BlockStore(self.key_codec, self.value_codec, self.config.refine)
        self.hot = HotSlots(self.config.hot_blocks or 0)
        self.wanted: tuple[Tensor, Tensor, Tensor] | None = None  # blocks promoted last, as an index
        self.promoted: Tensor | None = None  # the same for `HotSlots.refill`, where the device refills slots by itself
        self.ahead: Ahead | None = None
        self.shadow: ShadowPages | None = None
        self.working_bytes = 0  # scratch that the last certified step used, for all layers the same
        self.epoch += 1

    @property
    def cache(self) -> CertifiedQuantizedCache:
        """The cache that owns this layer."""
        owner = self._owner()
        if owner is None:
            raise StaleHandleError("The cache of this layer no longer exists; keep a reference to it while it is used.")
        return owner

    @property
    def block(self) -> int:
        """Tokens a block."""
        return self.config.block_size

    def finished_blocks(self, length: int) -> int:
        """How many blocks of a cache of `length` tokens are quantised."""
        if length <= self.config.exact_below or self.dtype not in QUANTISABLE:
            return 0
        # One token at least stays exact, so that no pass is without exact tokens.
        recent = max(1, self.config.recent_window)
        return max(0, (length - self.config.sink_blocks * self.block - recent) // self.block)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and sizes from the first keys and values; allocates nothing."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.heads, _, key_width = key_states.shape
        self.widths = (key_width, value_states.shape[-1])
        self.shadow = ShadowPages(self.layer_idx, self.batch, self.heads, self.block, self.widths, self.dtype, self.device)
        self.shadow.signs |= self.config.kernel == "triton"
        self.is_initialized = True

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse what does not fit, before anything changes."""
        keys, values = key_states.shape, value_states.shape
        if len(keys) != 4 or len(values) != 4 or keys[:3] != values[:3]:
            raise InputError(
                f"Layer {self.layer_idx}: {_words(key_states, value_states)}: expected two tensors [batch, kv_heads, "
                "new_tokens, channels] that agree in all but the last size."
            )
        if key_states.dtype != value_states.dtype:
            raise InputError(
                f"Layer {self.layer_idx}: {_words(key_states, value_states)}: expected one dtype for both. Under autocast, "
                "rotary embeddings make keys float32 and leave values 16-bit: load the model in one dtype "
                "(`dtype=torch.bfloat16`) and leave autocast out."
            )
        if (key_states.requires_grad or value_states.requires_grad) and torch.is_grad_enabled():
            raise GradientError(
                "The keys require gradients, and a quantised cache cannot be differentiated through. Run the model under "
                "`torch.no_grad()` (as `generate` does), or use a DynamicCache for training."
            )
        if not self.is_initialized:
            return
        same = (keys[0], keys[1]) == (self.batch, self.heads) and (keys[3], values[3]) == self.widths
        if not same or key_states.dtype != self.dtype or key_states.device != self.device:
            raise InputError(
                f"Layer {self.layer_idx}: {_words(key_states, value_states)} on {key_states.device}: expected batch "
                f"{self.batch}, {self.heads} KV heads, channels {self.widths}, {self.dtype} on {self.device}, as the tokens "
                "already held. Use a new cache, or `reset()` this one."
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; return what attention is to be computed with.

        Args: key_states, value_states: `[batch, kv_heads, new_tokens, channels]`, one dtype.
        Returns: the plain tensors while the layer was empty or nothing is quantised, else two handles (handle.py).
        Raises: InputError, GradientError, HostMemoryError: the layer is as it was before.
        """
        self._check(key_states, value_states)
        key_states, value_states = key_states.resolve_neg(), value_states.resolve_neg()  # what is copied is bits
        self.prefetch()
        was_empty, count = self.sequence_length == 0, key_states.shape[2]
        fresh = not self.is_initialized
        if fresh:
            self.lazy_initialization(key_states, value_states)
        try:
            if was_empty:
                # As DynamicCache returns them: contiguous, so that attention sees the same memory layout.
                key_states, value_states = key_states.contiguous(), value_states.contiguous()
            self._append(key_states, value_states)
        except BaseException:
            if fresh:
                self._clear()
            raise
        self.sequence_length += count
        self.new_tokens = count
        if count <= self.config.certify_queries:
            self.ahead = None
        if self.config.hot_blocks is None and self.device.type in AUTOMATIC and self.store.blocks:
            self.hot.fit(hot_budget(self.sequence_length, self.block, self.widths, self.dtype.itemsize))
        if was_empty:
            return key_states, value_states
        if self.store.blocks == 0:
            return self.materialise(KEYS)[:, :, self.hidden :], self.materialise(VALUES)[:, :, self.hidden :]
        return Handle.make(self, KEYS), Handle.make(self, VALUES)

    def checkpoint(self) -> Callable[[], None]:
        """What brings this layer back to how it is now, as long as only `update` came between. Reads and allocates nothing."""
        if not self.is_initialized:
            return self._clear
        exact, blocks = self.exact, self.store.blocks
        lengths = (exact[0].length, exact[1].length)
        tokens, new_tokens = self.sequence_length, self.new_tokens

        def undo() -> None:
            self.forget()
            self.exact = exact
            exact[0].length, exact[1].length = lengths
            self.sequence_length, self.new_tokens = tokens, new_tokens
            self.wanted = self.promoted = self.ahead = None
            self.epoch += 1
            self.store.truncate(blocks)
            self.hot.truncate(blocks)
            if self.shadow is not None:
                self.shadow.truncate(blocks)

        return undo

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put new tokens behind the tail, finishing the blocks that the new length finishes. Atomic."""
        assert self.shadow is not None
        target = self.finished_blocks(self.sequence_length + key_states.shape[2])
        new = tuple(part.detach() if part.requires_grad else part for part in (key_states, value_states))
        held, before = self.exact[0].length, self.store.blocks
        if target == before:
            # Written tokens count only when both are written.
            for buffer, part in zip(self.exact, new, strict=True):
                buffer.write(part)
            self.exact[0].length = self.exact[1].length = held + key_states.shape[2]
            return
        # Everything that can fail is done on new objects or on unused room; the assignments at the end cannot.
        self.forget()
        start, count = self.config.sink_blocks * self.block, (target - before) * self.block
        finished, exact = [], []
        for buffer, part in zip(self.exact, new, strict=True):
            sink, blocks, tail = (
                slice_across(buffer, part, held, first, last)
                for first, last in ((0, start), (start, start + count), (start + count, held + part.shape[2]))
            )
            finished.append(blocks.unflatten(2, (-1, self.block)))
            exact.append(self._exact_buffer(sink, tail))
        try:
            self.store.append(finished[0], finished[1])
            self.shadow.append(finished[0], finished[1])
        except BaseException:
            self.store.truncate(before)
            raise
        self.exact = (exact[0], exact[1])

    def memo(self, name: str, compute: Callable[[], T]) -> T:
        """What `compute` gives, kept as long as the finished blocks stay as they are: views, small numbers (memo.py)."""
        return self._memo.get(self.store, name, compute)

    def lend(self, weights: Any) -> None:
        """Note attention weights that have not been computed and that somebody may still look at: `settle` computes them."""
        self._lent = [*(known for known in self._lent if known() is not None), weakref.ref(weights)]

    def settle(self) -> None:
        """What was lent and is still there is computed: the tokens that it stands for are about to change."""
        for known in self._lent:
            weights = known()
            if weights is not None:
                weights.settle()
        self._lent = []

    def forget(self) -> None:
        """Drop all that `memo` keeps: finished blocks are about to change, or to be replaced."""
        self._memo.clear()

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.sequence_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover for `query_length` new tokens."""
        return self.sequence_length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, exactly: a quantised block that is cut comes back from its originals.

        Args: tokens_to_remove: zero or negative, as in transformers.
        Raises: InputError: it is positive, or more tokens are to go than are held; CorruptedPageError. Nothing has changed.
        """
        self.prepare_crop(tokens_to_remove)()

    def prepare_crop(self, tokens_to_remove: int) -> Callable[[], None]:
        """Do everything of a crop that can fail; what is returned carries it out and cannot. Raises as `crop`."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands over a tensor, which would become the length
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): expected zero or a negative number, the tokens to remove from the end."
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return lambda: None
        self.settle()
        length = self.sequence_length + tokens_to_remove
        if length < 0:
            raise InputError(
                f"crop({tokens_to_remove}): layer {self.layer_idx} holds {self.sequence_length} tokens; cannot remove more."
            )
        target = self.finished_blocks(length)
        exact = self.exact if target == self.store.blocks else self._exact_of(length, target)

        def carry_out() -> None:
            self.forget()
            for buffer in exact:
                buffer.length += length - self.sequence_length if exact is self.exact else 0
            self.exact = exact
            self.store.truncate(target)
            assert self.shadow is not None
            self.shadow.truncate(target)
            self.hot.truncate(target)
            self.wanted = self.promoted = self.ahead = None
            self.sequence_length = length
            self.new_tokens = 0
            self.epoch += 1

        return carry_out

    def reset(self) -> None:
        """Forget all tokens and give their memory back; the layer can be used for another batch."""
        self.settle()
        self._clear()

    def _select_batch(self, index: Tensor) -> None:
        """Keep the batch rows in `index` (int64 `[n]`), in that order. Atomic."""
        if not self.is_initialized:
            return
        if index.dim() != 1 or len(index) == 0 or int(index.min()) < -self.batch or int(index.max()) >= self.batch:
            raise InputError(f"Batch indices {index.tolist()}: expected a non-empty list of rows within {self.batch}.")
        index = torch.where(index < 0, index + self.batch, index)
        if index.tolist() == list(range(self.batch)):
            return
        self.settle()
        assert self.shadow is not None
        shadow, store, hot = self.shadow.selected(index), self.store.selected(index), self.hot.selected(index)
        exact = (self.exact[0].selected(index), self.exact[1].selected(index))
        self.forget()
        self.shadow, self.store, self.hot, self.exact = shadow, store, hot, exact
        self.batch, self.wanted, self.promoted, self.ahead = len(index), None, None, None
        self.epoch += 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows for beam search. Args: beam_idx: int64 `[batch]`."""
        self._select_batch(beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if self.is_initialized:
            self._select_batch(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows in `indices`: int64 rows, or a bool mask over them."""
        indices = indices.cpu()
        if self.is_initialized and indices.dtype == torch.bool and indices.shape != (self.batch,):
            raise InputError(f"A bool mask {tuple(indices.shape)}: expected one entry for each of {self.batch} batch rows.")
        self._select_batch(indices.nonzero().flatten() if indices.dtype == torch.bool else indices.to(torch.int64))

    def offload(self) -> None:
        """Nothing: the originals are on the host already."""

    def prefetch(self) -> None:
        """Fetch what the next step is likely to promote: the originals of the blocks promoted last, into the hot slots.

        Where the device refills slots by itself this only starts, and nobody waits but the next step's kernels.

        Raises: CorruptedPageError: a page's checksum does not match.
        """
        if self.promoted is not None and self.shadow is not None:
            promoted, self.promoted = self.promoted, None
            self.hot.refill(promoted, self.shadow, self.cache.recorder.step)
        if self.wanted is None or self.shadow is None:
            return
        index, self.wanted = self.wanted, None
        pages = [self.shadow.read_pages(kind, *index) for kind in (KEYS, VALUES)]
        self.hot.insert(index, pages[0], pages[1], self.batch, self.heads, self.cache.recorder.step)

    @property
    def refills(self) -> bool:
        """Whether hot slots are refilled by the device itself: then steps note `promoted`, and else `wanted`."""
        return self.shadow is not None and self.shadow.signs and gathers(self.device)

    def flush(self) -> None:
        """Take the checksums of blocks whose copy to the host is done."""
        if self.shadow is not None:
            self.shadow.flush()

    def _adopt(self, cache: CertifiedQuantizedCache) -> None:
        """Belong to another cache: the one that was just copied."""
        self._owner = weakref.ref(cache)

    def nbytes(self) -> dict[str, int]:
        """Bytes by part, as allocated; `host_*` lie in host memory."""
        exact = sum(buffer.nbytes for buffer in self.exact)
        pages = self.shadow.nbytes if self.shadow is not None else 0
        stored = self.store.nbytes()
        if self.shadow is not None:
            stored["checksums"] += self.shadow.device_sums.nbytes
        return {**stored, "exact": exact, "hot": self.hot.nbytes, "host_originals": pages}

    def dense_nbytes(self) -> int:
        """Bytes that a dense cache of the same tokens holds, without any room."""
        if not self.is_initialized:
            return 0
        tokens = self.dense_tokens(self.get_seq_length())
        return self.batch * self.heads * tokens * sum(self.widths) * self.dtype.itemsize

    def held(self, length: int) -> int:
        """Tokens held after one prefill of `length`."""
        return length

    def dense_tokens(self, length: int) -> int:
        """Tokens that transformers' own layer holds of so many."""
        return length

    def __deepcopy__(self, memo: dict[int, Any]) -> CertifiedLayer:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            if name == "shadow" and value is not None:
                value = value.selected(torch.arange(self.batch))
            elif name == "_memo":
                value = BlockMemo()  # views are of the buffers that were copied
            elif name in ("ahead", "_lent"):
                value = None if name == "ahead" else []
            elif name not in ("_owner", "config", "cache"):
                value = copy.deepcopy(value, memo)
            new.__dict__[name] = value
        return new

    def __reduce__(self) -> Any:
        raise CachePicklingError("A certified layer cannot be pickled; copy the cache with `copy.deepcopy`.")

    def __repr__(self) -> str:
        return f"CertifiedLayer({self.layer_idx}, tokens={self.sequence_length}, quantised_blocks={self.store.blocks})"


def _words(key_states: Tensor, value_states: Tensor) -> str:
    return f"keys {tuple(key_states.shape)} {key_states.dtype}, values {tuple(value_states.shape)} {value_states.dtype}"
