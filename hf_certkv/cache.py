"""`CertifiedQuantizedCache`: picks a layer for each layer of the model, keeps the records, undoes steps that fail."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from . import device_decode
from .certificate import Recorder
from .compiled import outside_graphs
from .config import CertKVConfig
from .configs import layer_config, query_groups
from .errors import (
    CachePicklingError,
    CacheStateError,
    ConfigError,
    MissingDependencyError,
    PeerFailedError,
    UnsupportedModelError,
)
from .interrupts import uninterrupted
from .kernels import cpu
from .layer_kinds import certified_kind
from .layers import CertifiedLayer
from .parallel import ranks_of
from .report import CertificateReport, MemoryReport
from .scrub import ScrubReport, scrub_layer
from .steps import JOURNAL, StepJournal


class CertifiedQuantizedCache(StepJournal, Cache):
    """A transformers cache with INT8 keys and INT4 or INT8 values whose attention outputs are certified or dense.

    Every full-attention layer is quantised, and sliding ones with `certify_sliding`; the originals lie in host memory. Per
    decode step and head the distance of the returned attention output from exact attention over the originals *of this run*
    is proven to be within `atol + rtol * ||output||_2`, or the head is recomputed densely (docs/certificate.md). Other
    layer types (linear attention, latents, ...) keep transformers' own exact layers. Not for use by two threads at a time.

    Args:
        config: the model's config (`model.config`), or the model itself.
        model: the model, to put prefetch hooks on it (hooks.py); `config` may then be left out.
        settings: a `CertKVConfig`, for everything at once.
        process_group: of the ranks that share the heads of each layer, where transformers did not split the model itself
            (parallel.py). Never that of data-parallel processes.
        **changes: single settings of `CertKVConfig`, e.g. `rtol=0.02`.

    Raises:
        ConfigError: a setting is unknown or out of range.
        UnsupportedModelError: the model has a cache layout that cannot be served.
        MissingDependencyError: `kernel="cpu"` without numba, `kernel="triton"` without triton.

    Example:
        >>> cache = CertifiedQuantizedCache(model.config, rtol=0.05)
        >>> out = model.generate(**inputs, past_key_values=cache)
        >>> print(cache.report())
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel | None = None,
        *,
        model: PreTrainedModel | None = None,
        settings: CertKVConfig | None = None,
        process_group: Any = None,
        **changes: Any,
    ) -> None:
        whole = config if isinstance(config, PreTrainedModel) else model
        if isinstance(config, PreTrainedModel):
            config = config.config
        if config is None and model is not None:
            config = model.config
        if not isinstance(config, PreTrainedConfig):
            raise UnsupportedModelError(
                f"expected the model's config (`CertifiedQuantizedCache(model.config)`), got {type(config).__name__}."
            )
        if settings is not None and not isinstance(settings, CertKVConfig):
            raise ConfigError(f"settings={settings!r}: expected a CertKVConfig.")
        self.settings = (settings or CertKVConfig()).replace(**changes)
        if self.settings.kernel == "cpu" and not cpu.installed():
            raise MissingDependencyError("kernel='cpu' needs numba: `pip install 'hf_certkv[cpu]'`, or leave kernel='auto'.")
        if self.settings.kernel == "triton" and not device_decode.installed():
            raise MissingDependencyError(
                "kernel='triton' needs triton: `pip install 'hf_certkv[gpu]'`, or leave kernel='auto'."
            )
        self.ranks = ranks_of(config, whole, process_group)
        self.recorder = Recorder(full=self.settings.record == "full")
        self._begin_journal()
        self._warned: set[str] = set()
        self.handles: Any = None
        super().__init__(layers=self._pick_layers(config))
        if not self.settings.certified:
            warnings.warn("CertKVConfig.naive() certifies NOTHING: it is a baseline for comparisons.", stacklevel=2)
        self._check_tolerance(config)
        if model is not None:
            from .hooks import attach  # hooks.py needs the cache's type: imported when used

            attach(model, self)

    def _pick_layers(self, config: PreTrainedConfig) -> list[Any]:
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(config).__name__} is an encoder-decoder model, whose cross-attention reads the cache directly. Use "
                "transformers' EncoderDecoderCache."
            )
        try:
            layers = DynamicCache(config=config).layers
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"transformers cannot lay out a cache for {type(config).__name__} ({type(error).__name__}: {error})."
            ) from error
        if not layers:
            raise UnsupportedModelError(f"{type(config).__name__} says nothing about its layers (num_hidden_layers).")
        # Multi-head latent attention calls itself full attention, but caches latents: it stays exact.
        latent = [getattr(layer_config(config, i), "kv_lora_rank", None) is not None for i in range(len(layers))]
        picked = [layer if latent[i] else certified_kind(layer, self.settings, i, self) for i, layer in enumerate(layers)]
        for i, layer in enumerate(picked):
            if isinstance(layer, CertifiedLayer):
                layer.groups = query_groups(config, i)
        if not any(isinstance(layer, CertifiedLayer) for layer in picked):
            warnings.warn(
                f"No layer of {type(config).__name__} is full attention over keys and values: all stay exact in transformers' "
                "own layers, and nothing is saved.",
                stacklevel=3,
            )
        return picked

    def _check_tolerance(self, config: PreTrainedConfig) -> None:
        dtype = getattr(config.get_text_config(decoder=True), "dtype", None)
        floor = {"torch.bfloat16": 2.0**-8, "torch.float16": 2.0**-11}.get(str(dtype), 2.0**-20)
        settings = self.settings
        if settings.certified and settings.atol == 0 and 0 < settings.rtol <= floor:
            warnings.warn(
                f"rtol={settings.rtol} is below what {dtype} itself rounds by ({floor:.2g}): every step will be dense.",
                stacklevel=3,
            )

    @outside_graphs
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[batch, kv_heads, new_tokens, channels]` to a layer; see `CertifiedLayer.update`.

        One call a layer makes a step, as in a model's forward pass; a layer that comes again begins the next one.

        Raises:
            InputError, GradientError, HostMemoryError: all layers are as they were before the step.
            CacheStateError: the layers of one step do not hold the same number of tokens.
            PeerFailedError: another rank of a tensor-parallel model failed; all layers are as they were before the step.
        """
        with self._one_thread():
            try:
                with self.ranks.together(wait=key_states.shape[-2:-1] != (1,)):
                    return self._update(key_states, value_states, layer_idx, *args, **kwargs)
            except PeerFailedError:  # nothing has failed here
                with uninterrupted():
                    self._undo_step()
                raise

    def _update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._broken is not None:
            raise CacheStateError(f"An earlier step failed and could not be undone: {self._broken}. Call `reset()`.")
        if layer_idx in self._journal:
            self._end_step()
        try:
            self._enter(layer_idx)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:
            with uninterrupted():
                self._undo_step()
            raise

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; written in place, so a step that fails after it cannot be undone."""
        self._irreversible = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; written in place, so a step that fails after it cannot be undone."""
        self._irreversible = True
        return super().update_recurrent_state(*args, **kwargs)

    def note_materialised(self, layer_idx: int, operation: str) -> None:
        """Count an operation that was served with exact originals, and say so once."""
        counts = self.recorder.materialised
        counts[operation] = counts.get(operation, 0) + 1
        if operation not in self._warned:
            self._warned.add(operation)
            warnings.warn(
                f"hf_certkv: `{operation}` on cached keys or values of layer {layer_idx} is computed on the exact originals: "
                "correct, but slower and not certified. attn_implementation='sdpa' (or 'certkv') uses the quantised cache.",
                stacklevel=2,
            )

    def note_exact(self, positions: int) -> None:
        """A call of attention with so many positions is computed exactly; for who counts."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens from every layer, exactly. Args: tokens_to_remove: zero or negative.

        Raises: InputError: more tokens than are held; CorruptedPageError: originals are needed and damaged. All layers are
            then as they were.
        """
        with self._all_or_nothing():
            carry_out = [layer.prepare_crop(tokens_to_remove) for layer in self.certified_layers]
            for layer in self.layers:
                if not isinstance(layer, CertifiedLayer) and getattr(layer, "is_initialized", True):
                    layer.crop(tokens_to_remove)
            with uninterrupted():
                for part in carry_out:
                    part()

    def scrub(self) -> ScrubReport:
        """Compare everything that is stored quantised, and every original, with its checksum; repair damaged blocks.

        Steps do this on their own only for what they promote and, with `audit=True`, for everything.

        Raises: CorruptedPageError: a page of originals is damaged; FaultyMemoryError: a block could not be repaired.
        """
        with self._one_thread():
            return sum((scrub_layer(layer) for layer in self.certified_layers), ScrubReport(0, 0, 0, 0, 0))

    def reset(self) -> None:
        """Forget all tokens; records stay."""
        with self._one_thread(), uninterrupted():
            self._close_step()
            super().reset()
            self._broken = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows of every layer for beam search; on an error all layers are as they were."""
        with self._all_or_nothing():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row of every layer; on an error all layers are as they were."""
        with self._all_or_nothing():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows of every layer; on an error all layers are as they were."""
        with self._all_or_nothing():
            super().batch_select_indices(indices)

    @property
    def is_compileable(self) -> bool:
        """False: steps branch on their certificates."""
        return False

    def report(self) -> CertificateReport:
        """What was returned so far: bounds, rungs, promotions, bytes. `print` it, or `.to_dict()`, `.to_json(path)`."""
        with uninterrupted():
            self.recorder.commit()
        return CertificateReport(self.settings, self.recorder, self.memory(), self._exact_layers())

    def memory(self) -> MemoryReport:
        """Device and host bytes by part, and what a dense cache of the same tokens holds."""
        parts: dict[str, int] = {}
        dense = 0
        for layer in self.layers:
            if isinstance(layer, CertifiedLayer):
                dense += layer.dense_nbytes()
                sizes = layer.nbytes()
            else:
                size = storage_bytes(vars(layer))
                dense += size
                sizes = {"exact_layers": size}
            for name, size in sizes.items():
                parts[name] = parts.get(name, 0) + size
        working = max((layer.working_bytes for layer in self.certified_layers), default=0)
        return MemoryReport(parts, dense, working)

    def _exact_layers(self) -> dict[int, str]:
        """Layers that keep transformers' own storage, and their type."""
        return {i: type(layer).__name__ for i, layer in enumerate(self.layers) if not isinstance(layer, CertifiedLayer)}

    def __deepcopy__(self, memo: dict[int, Any]) -> CertifiedQuantizedCache:
        new = object.__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            if name == "settings":
                new.__dict__[name] = value
            elif name == "handles":
                new.__dict__[name] = None  # hooks stay with the cache they were attached for
            elif name not in JOURNAL:  # what a step under way would undo belongs to this cache
                new.__dict__[name] = copy.deepcopy(value, memo)
        new._begin_journal()
        for layer in new.certified_layers:
            layer._adopt(new)
        new._end_step()
        return new

    def __reduce__(self) -> Any:
        raise CachePicklingError(
            "A CertifiedQuantizedCache cannot be pickled: it holds live buffers and host pages. Use `copy.deepcopy(cache)`."
        )

    def __repr__(self) -> str:
        return (
            f"CertifiedQuantizedCache(layers={len(self.layers)}, certified={len(self.certified_layers)}, "
            f"tokens={self._length()}, rtol={self.settings.rtol}, atol={self.settings.atol})"
        )

    def _length(self) -> int:
        lengths = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
        return max(lengths, default=0)


def storage_bytes(root: Any) -> int:
    """Bytes that the tensors in attributes, lists and dictionaries keep alive: whole storages, each counted once.

    Tensors that are made of tensors, as those of quantisation libraries are, count with their parts.
    """
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if hasattr(value, "__tensor_flatten__"):
                names, _ = value.__tensor_flatten__()
                for name in names:
                    visit(getattr(value, name))
                return
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for part in value:
                visit(part)
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)

    visit(root)
    return sum(storages.values())
