"""Device and host bytes by context and format, and the peak while prefilling, everything counted as allocated."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, LlamaConfig

from benchmarks.common import make_cache, save
from hf_certkv import CertKVConfig, shadow

LAYERS, HEADS, HEAD_DIM = 4, 8, 128
CONTEXTS = (4096, 8192, 16384, 32768)
WATCHED = 8192  # longest context at which every allocation is watched, which is slow
CONFIGS = {
    "K8 V4 (default)": CertKVConfig(),
    "K8 V8": CertKVConfig(value_bits=8, value_group=0, refine="off"),
    "K8 V4, no planes": CertKVConfig(refine="off"),
    "K8 V4, both planes on the device": CertKVConfig(refine="device"),
}


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that operations make and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, out)
        return out

    def ignore(self, tensor: Tensor) -> None:
        """Count nothing for this tensor's storage."""
        self._note(tensor, size=0)

    def _note(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes() if size is None else size
            weakref.finalize(storage, self.live.pop, key, None)
            self.peak = max(self.peak, sum(self.live.values()))


def fill(cache: Any, tokens: int, counter: LiveBytes | None = None) -> None:
    """Prefill random keys and values, layer by layer; they themselves are not counted."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        with _disable_current_modes():
            keys, values = (
                torch.randn(1, HEADS, tokens, HEAD_DIM, generator=generator, dtype=torch.bfloat16) for _ in range(2)
            )
        if counter is not None:
            counter.ignore(keys)
            counter.ignore(values)
        returned = cache.update(keys, values, layer)
        del keys, values, returned


def prefill(cache: Any, tokens: int) -> tuple[int, int]:
    """Fill a cache layer by layer. Returns the peak of live bytes that it caused and what is left at the end.

    Counted is everything that the cache makes: neither the keys and values that the model made, nor the host pages, which
    on a GPU machine are not device memory.
    """

    def allocate_uncounted(count: int, pinned: bool) -> Tensor:
        with _disable_current_modes():
            memory = allocate(count, pinned)
        counter.ignore(memory)
        return memory

    allocate = shadow.allocate_host
    with mock.patch.object(shadow, "allocate_host", allocate_uncounted), LiveBytes() as counter:
        fill(cache, tokens, counter)
        left = sum(counter.live.values())
    return counter.peak, left


def measure() -> None:
    """All contexts and formats; head size 128, batch 1, bf16."""
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        hidden_size=HEADS * HEAD_DIM,
    )
    result: dict[str, Any] = {"layers": LAYERS, "kv_heads": HEADS, "head_dim": HEAD_DIM, "runs": []}
    for tokens in CONTEXTS:
        dense_peak, _ = prefill(DynamicCache(config=config), tokens) if tokens <= WATCHED else (None, None)
        for name, settings in CONFIGS.items():
            cache = make_cache(config, settings)
            run: dict[str, Any] = {"name": name, "tokens": tokens}
            if dense_peak is None:
                fill(cache, tokens)
                run.update(cache.memory().to_dict())
            else:
                peak, left = prefill(cache, tokens)
                memory = cache.memory()
                run.update(memory.to_dict())
                run["live_bytes_after_prefill"] = left
                run["prefill_peak_above_cache_over_dense_layer"] = (peak - left) / (memory.dense / LAYERS)
                run["dynamic_cache_prefill_peak_over_dense"] = dense_peak / memory.dense
            result["runs"].append(run)
            save("memory", result)
