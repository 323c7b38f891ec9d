"""A Llama of 8B shape with random weights made on the device, and caches filled as if it had read a long prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from benchmarks.gpu_common import draw, filling, settle
from hf_certkv import CertifiedQuantizedCache
from hf_certkv.bench.memory import counted

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "head_dim": 128}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
LAYERS = 32
TINY = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "head_dim": 64}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROOM = 256  # tokens that may follow those that a cache is filled with
DTYPE = torch.bfloat16


def model_config(device: torch.device, layers: int) -> LlamaConfig:
    """The shape of an 8B Llama with so many layers; of a tiny one for a dry run."""
    shape = {**SHAPE, **HEADS} if device.type == "cuda" else {**TINY, **TINY_HEADS}
    return LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        max_position_embeddings=2**24,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=DTYPE,
    )


def build(config: LlamaConfig, device: torch.device, seed: int = 0) -> Any:
    """The model in bfloat16 with transformers' default (SDPA) attention."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device=device, dtype=DTYPE).eval()


class InPlaceLayer(DynamicLayer):
    """Dense keys and values with room to grow: a step writes one token, where DynamicLayer copies all that it holds."""

    length = 0
    room: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; return views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, tokens, _ = key_states.shape
            self.room = tuple(  # type: ignore[assignment]
                part.new_empty(batch, heads, tokens + ROOM, part.shape[-1]) for part in (key_states, value_states)
            )
        last = self.length + key_states.shape[2]
        for room, part in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : last] = part
        self.length = last
        self.keys, self.values = (room[:, :, :last] for room in self.room)
        return self.keys, self.values


def in_place(config: LlamaConfig) -> DynamicCache:
    """A dense cache of such layers."""
    cache = DynamicCache(config=config)
    cache.layers = [InPlaceLayer() for _ in cache.layers]
    return cache


def fill_layer(cache: Any, layer: int, tokens: int, config: LlamaConfig, device: torch.device) -> None:
    """Put a layer's random keys and values into a cache; the same for every cache."""
    heads, queries = config.num_key_value_heads, config.num_attention_heads
    trace = draw(tokens, device, seed=layer, heads=heads, query_heads=queries, channels=config.head_dim)
    cache.update(trace.keys, trace.values, layer)
    del trace
    if isinstance(cache, CertifiedQuantizedCache):
        settle(cache, device)


def fill(cache: Any, tokens: int, config: LlamaConfig, device: torch.device) -> dict[str, int | None]:
    """Fill all layers. Returns what the device allocated for it, and what the cache counts."""
    before = allocated(device)
    with filling():
        for layer in range(config.num_hidden_layers):
            fill_layer(cache, layer, tokens, config, device)
    after = allocated(device)
    grown = None if before is None or after is None else after - before
    return {"allocated_bytes": grown, **counted(cache)}


def allocated(device: torch.device) -> int | None:
    """Bytes of live tensors on the device, when all is done that was queued; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated(device))


def steps(model: Any, cache: Any, seed: int = 0) -> Callable[[], Tensor]:
    """Each call feeds one more random token."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def call() -> Tensor:
        ids = torch.randint(3, model.config.vocab_size, (1, 1), generator=generator, device=model.device)
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits

    return call


def device_profile(call: Callable[[], object], device: torch.device, rows: int = 40) -> tuple[float | None, int, str]:
    """One call under torch's profiler: seconds that kernels took, how many there were, and the table."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    averages = found.key_averages()
    kernels = [event for event in averages if "CUDA" in str(getattr(event, "device_type", ""))]
    busy = sum(float(getattr(event, "self_device_time_total", 0.0)) for event in kernels) / 1e6
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=rows, max_name_column_width=90)
    return (busy if kernels else None), sum(int(event.count) for event in kernels), str(table)
