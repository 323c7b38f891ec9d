"""What a cache will take: bytes by part, from a model's config alone. No weights, no keys; nothing large is allocated.

The sizes are those of a cache right after one prefill. They mirror what `store.py` and `shadow.py` allocate, and take the
number of quantised blocks and the size of a slab from the very classes that decide them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .cache import CertifiedQuantizedCache, storage_bytes
from .config import CertKVConfig
from .configs import layer_config
from .errors import InputError, UnsupportedModelError
from .hot_slots import hot_budget, map_room
from .kernels import cpu
from .layers import CertifiedLayer
from .report import MemoryReport
from .shadow import ShadowPages

LARGEST = 2**40  # tokens times batch rows: far beyond any memory, and far below where a 64-bit size overflows
HALF, FLOAT, LONG = 2, 4, 8  # bytes of a float16, a float32 and a 64-bit number


def plan_bytes(
    config: PreTrainedConfig,
    context: int,
    batch: int,
    dtype: torch.dtype,
    settings: CertKVConfig,
    device: torch.device | str = "cpu",
) -> dict[str, int]:
    """Bytes by part, named as in `MemoryReport.parts`, of a cache that holds `context` tokens after one prefill.

    Args:
        config: the model's config; context: tokens of each row; batch: rows; dtype: of the keys and values;
        settings: of the cache. Hot slots are counted as if all were allocated, which happens at the first promotion.
        device: where the cache is to lie: on CUDA there are hot slots unless `settings` has another number of them.

    Raises:
        InputError: `context` or `batch` is not a number of tokens or rows.
        UnsupportedModelError: the config does not say what a layer will hold.
    """
    return plan_memory(config, context, batch, dtype, settings, device).parts


def plan_memory(
    config: PreTrainedConfig,
    context: int,
    batch: int,
    dtype: torch.dtype,
    settings: CertKVConfig,
    device: torch.device | str = "cpu",
) -> MemoryReport:
    """As `plan_bytes`, together with what transformers' own cache takes for the same tokens."""
    if context < 1 or batch < 1 or context * batch > LARGEST:
        raise InputError(
            f"context={context}, batch={batch}: expected at least one token and one row, and at most 2^40 tokens in all."
        )
    parts: dict[str, int] = {}
    dense = counted = working = 0
    uncounted = uncounted_layers(config)
    for index, layer in enumerate(_layers(config, settings)):
        if index in uncounted:
            continue
        heads, widths = layer_sizes(config, index)
        if isinstance(layer, CertifiedLayer):
            layer.dtype = dtype
            held = layer.held(context)
            sizes = _certified(layer, held, batch, heads, widths, torch.device(device).type == "cuda")
            dense += batch * heads * layer.dense_tokens(context) * sum(widths) * dtype.itemsize
            working = max(working, _working(layer, config, index, held, batch, heads, widths))
        else:
            sizes = {"exact_layers": _exact(layer, context, batch, heads, widths, dtype)}
            dense += sizes["exact_layers"]
        counted += 1
        for name, size in sizes.items():
            parts[name] = parts.get(name, 0) + size
    if counted == 0:
        raise UnsupportedModelError(
            f"{type(config).__name__} does not say what its layers' caches hold; fill a cache and ask `cache.memory()`."
        )
    return MemoryReport(parts, dense, working)


def uncounted_layers(config: PreTrainedConfig) -> dict[int, str]:
    """Layers whose cache a config does not size (linear attention, latents): index and name of the layer's class.

    Layers that share another layer's cache hold nothing and are not among them.
    """
    latent = getattr(layer_config(config, 0), "kv_lora_rank", None) is not None
    known = (CertifiedLayer, DynamicLayer, DynamicSlidingWindowLayer)
    return {
        index: type(layer).__name__
        for index, layer in enumerate(_layers(config, CertKVConfig()))
        if latent or (type(layer) not in known and type(layer).__name__ != "DummyLayer")
    }


def layer_sizes(config: PreTrainedConfig, index: int) -> tuple[int, tuple[int, int]]:
    """KV heads of a layer, and the channels of its keys and of its values.

    Raises: UnsupportedModelError: the config does not say.
    """
    layer, found = layer_config(config, index), query_heads(config, index)
    heads = getattr(layer, "num_key_value_heads", None) or found
    width = getattr(layer, "head_dim", None)
    if width is None and isinstance(found, int):
        width = layer.hidden_size // found
    value_width = getattr(layer, "v_head_dim", None) or width
    sizes = [size for size in (heads, width, value_width) if isinstance(size, int) and size > 0]
    if len(sizes) < 3:
        raise UnsupportedModelError(
            f"{type(config).__name__} does not say how many heads and channels the cache of layer {index} has "
            f"(num_key_value_heads={heads!r}, head_dim={width!r}); fill a cache and ask `cache.memory()`."
        )
    return sizes[0], (sizes[1], sizes[2])


def query_heads(config: PreTrainedConfig, index: int) -> int | None:
    """Query heads of a layer; None where the config does not say."""
    found = getattr(layer_config(config, index), "num_attention_heads", None)
    return found if isinstance(found, int) else None


def _layers(config: PreTrainedConfig, settings: CertKVConfig) -> list[Any]:
    """The empty layers that a cache would have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tolerances and uncertified baselines: nothing is computed here
        return CertifiedQuantizedCache(config, settings=settings).layers


def _certified(
    layer: CertifiedLayer, context: int, batch: int, heads: int, widths: tuple[int, int], cuda: bool
) -> dict[str, int]:
    """Bytes by part of one quantised layer. `layer` is empty and has its dtype set."""
    settings, block, item = layer.config, layer.block, layer.dtype.itemsize
    blocks, units = layer.finished_blocks(context), batch * heads
    token = units * sum(widths) * item
    if blocks == 0:
        return {"exact": context * token}
    sink = settings.sink_blocks * block
    # The tail is allocated with room for the recent window and one unfinished block.
    tail = max(context - sink - blocks * block, settings.recent_window + block)
    key_width, value_width = widths
    groups = -(-value_width // layer.value_codec.group_size(value_width))
    value_codes = value_width if settings.value_bits == 8 else _nibbles(value_width)
    planes = _nibbles(key_width) if settings.refine != "off" else 0
    planes += _nibbles(value_width) if layer.value_codec.levels == 2 else 0
    # A scale and an offset per key channel and block, and per token and value group.
    scales = 2 * HALF * (key_width + block * groups)
    # Three numbers a level and one a block, for keys and for values.
    # And the squared norm of each value.
    numbers = FLOAT * (3 * (layer.key_codec.levels + layer.value_codec.levels) + 2) + HALF * block
    pages = ShadowPages(layer.layer_idx, batch, heads, block, widths, layer.dtype, torch.device("cpu"))
    slabs = -(-blocks // pages.rows_per_slab)
    checksums = 2 * LONG * pages.rows_per_slab * units
    slots = settings.hot_blocks
    if slots is None:
        slots = hot_budget(context, block, widths, item) if cuda else 0
    hot = units * slots * (2 * LONG + block * sum(widths) * item)
    signed = cuda or settings.kernel == "triton"  # pages have checksums for kernels, too
    if cuda and slots:
        hot += units * 4 * map_room(blocks)
    return {
        "codes": units * blocks * block * (key_width + value_codes),
        "planes": units * blocks * block * planes if settings.refine == "device" else 0,
        "host_planes": units * blocks * block * planes if settings.refine == "host" else 0,
        "scales": units * blocks * scales,
        "numbers": units * blocks * numbers,
        "checksums": units * blocks * 2 * LONG * (2 if signed else 1),
        "exact": (sink + tail) * token,
        "hot": hot,
        "host_originals": slabs * (pages.slab_bytes + checksums),
    }


def _working(
    layer: CertifiedLayer,
    config: PreTrainedConfig,
    index: int,
    context: int,
    batch: int,
    heads: int,
    widths: tuple[int, int],
) -> int:
    """Bytes that the CPU kernel works in for one new token; 0 where plain torch computes, in what it frees again."""
    rows = (query_heads(config, index) or heads) // heads
    fits = cpu.fits(layer.value_codec, widths) and cpu.installed() and layer.config.kernel != "reference"
    blocks = layer.finished_blocks(context)
    return cpu.working_bytes(batch * heads, rows, blocks, *widths) if fits and blocks else 0


def _nibbles(channels: int) -> int:
    """Bytes of 4-bit codes of so many channels."""
    return (channels + 1) // 2


def _exact(layer: Any, context: int, batch: int, heads: int, widths: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of one of transformers' own layers: it is filled with tensors that have shapes and no storage."""
    if not isinstance(layer, DynamicLayer):
        return 0
    keys, values = (torch.empty(batch, heads, context, width, dtype=dtype, device="meta") for width in widths)
    layer.update(keys, values)
    return storage_bytes(vars(layer))
