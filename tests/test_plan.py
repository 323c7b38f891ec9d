"""The plan says, to the byte, what a cache holds after one prefill."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from hf_certkv import CertifiedQuantizedCache, CertKVConfig, InputError, UnsupportedModelError
from hf_certkv.plan import layer_sizes, plan_bytes, plan_memory, uncounted_layers

HEADS = 2
REFINE: list[Any] = ["off", "host", "device"]


def llama(head_dim: int, **changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 2,
        "head_dim": head_dim,
        "vocab_size": 16,
        "intermediate_size": 16,
    }
    return LlamaConfig(**{**sizes, **changes})


def filled(
    config: PreTrainedConfig, context: int, dtype: torch.dtype, settings: CertKVConfig, batch: int = 1
) -> CertifiedQuantizedCache:
    cache = CertifiedQuantizedCache(config, settings=settings)
    append(cache, config, context, dtype, batch)
    return cache


def append(cache: Any, config: PreTrainedConfig, tokens: int, dtype: torch.dtype, batch: int = 1) -> None:
    for index in range(len(cache.layers)):
        heads, widths = layer_sizes(config, index)
        keys, values = (torch.randn(batch, heads, tokens, width).to(dtype) for width in widths)
        cache.update(keys, values, index)


def assert_equal_to_the_byte(config: PreTrainedConfig, context: int, dtype: torch.dtype, settings: CertKVConfig) -> None:
    planned, held = plan_memory(config, context, 1, dtype, settings), filled(config, context, dtype, settings).memory()
    assert {name: size for name, size in planned.parts.items() if size} == {
        name: size for name, size in held.parts.items() if size
    }
    assert (planned.device, planned.host, planned.dense) == (held.device, held.host, held.dense)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("context", [1, 256, 300, 4096])
@pytest.mark.parametrize("refine", REFINE)
def test_equals_memory_to_the_byte(head_dim: int, context: int, refine: Any) -> None:
    # Formats and dtypes take turns, so that each meets each refinement mode and head size.
    value_bits = (4, 8)[(head_dim // 32 + REFINE.index(refine) + context) % 2]
    dtype = (torch.bfloat16, torch.float32)[(head_dim // 32 + context) % 2]
    assert_equal_to_the_byte(llama(head_dim), context, dtype, CertKVConfig(refine=refine, value_bits=value_bits))


@pytest.mark.parametrize(
    ("refine", "value_bits", "dtype"), list(itertools.product(REFINE, (4, 8), (torch.bfloat16, torch.float32)))
)
def test_equals_memory_for_every_format_at_5000_tokens(refine: Any, value_bits: int, dtype: torch.dtype) -> None:
    config = llama(64, num_hidden_layers=1)
    assert_equal_to_the_byte(config, 5000, dtype, CertKVConfig(refine=refine, value_bits=value_bits))


@pytest.mark.filterwarnings("ignore:.*certifies NOTHING")
@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 16},
        {"block_size": 128, "sink_blocks": 0},
        {"recent_window": 0},
        {"recent_window": 500, "sink_blocks": 3},
        {"value_group": 0},
        {"value_group": 28},
        {"exact_below": 2000},
        {"policy": "naive"},
    ],
    ids=str,
)
def test_follows_every_setting_that_changes_sizes(changes: dict[str, Any]) -> None:
    assert_equal_to_the_byte(llama(80, num_hidden_layers=1), 1500, torch.float16, CertKVConfig(**changes))


def test_paper_preset_and_short_last_group() -> None:
    assert_equal_to_the_byte(llama(66, num_hidden_layers=1), 700, torch.float32, CertKVConfig.paper())


def test_counts_batch_rows() -> None:
    config, settings = llama(64), CertKVConfig()
    held = filled(config, 700, torch.bfloat16, settings, batch=3).memory()
    planned = plan_memory(config, 700, 3, torch.bfloat16, settings)
    assert (planned.device, planned.host, planned.dense) == (held.device, held.host, held.dense)


def test_sliding_layers_are_counted_as_transformers_stores_them() -> None:
    config = Gemma3TextConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=3, vocab_size=16,
        intermediate_size=16, sliding_window=128, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    assert_equal_to_the_byte(config, 900, torch.bfloat16, CertKVConfig())
    # A window is a view of the prompt's 900 tokens at 256 bytes, which stay alive until the next token; and eight bytes in
    # which transformers keeps the window's size.
    assert plan_bytes(config, 900, 1, torch.bfloat16, CertKVConfig())["exact_layers"] == 2 * (900 * 256 + 8)


def test_dense_is_what_a_dynamic_cache_holds() -> None:
    config, cache = llama(64), DynamicCache()
    for index in range(2):
        cache.update(torch.zeros(1, HEADS, 1000, 64), torch.zeros(1, HEADS, 1000, 64), index)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan_memory(config, 1000, 1, torch.float32, CertKVConfig()).dense == held


@pytest.mark.parametrize("refine", REFINE)
def test_stays_within_3_percent_over_a_decode(refine: Any) -> None:
    config, settings = llama(64, num_hidden_layers=1), CertKVConfig(refine=refine)
    cache = filled(config, 4096, torch.bfloat16, settings)
    for step in range(300):
        append(cache, config, 1, torch.bfloat16)
        if step % 50 == 49:
            planned, held = plan_memory(config, 4097 + step, 1, torch.bfloat16, settings), cache.memory()
            assert planned.dense == held.dense
            assert planned.device == pytest.approx(held.device, rel=0.03)
            assert planned.host == pytest.approx(held.host, rel=0.03)


def test_hot_slots_are_counted_before_they_are_filled() -> None:
    config = llama(64, num_hidden_layers=1)
    with_slots, without = (plan_bytes(config, 4096, 1, torch.bfloat16, CertKVConfig(hot_blocks=n)) for n in (4, 0))
    # Per slot of each of the two heads: 64 tokens of 256 bytes, and which block it is and when it was last used.
    assert with_slots["hot"] - without["hot"] == HEADS * 4 * (64 * 256 + 16)


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (-5, 1), (100, 0), (2**40, 2)])
def test_refuses_what_is_no_size(context: int, batch: int) -> None:
    with pytest.raises(InputError, match=f"context={context}"):
        plan_bytes(llama(64), context, batch, torch.bfloat16, CertKVConfig())


def test_a_huge_context_is_only_arithmetic() -> None:
    memory = plan_memory(llama(128), 2**40, 1, torch.bfloat16, CertKVConfig())
    assert 0.3 < memory.ratio < 0.5
    assert memory.host > memory.dense


def test_refuses_a_config_that_does_not_size_its_cache() -> None:
    config = llama(64)
    config.kv_lora_rank = 16
    assert uncounted_layers(config) == {0: "DynamicLayer", 1: "DynamicLayer"}
    with pytest.raises(UnsupportedModelError, match="fill a cache"):
        plan_bytes(config, 1000, 1, torch.bfloat16, CertKVConfig())


@pytest.mark.parametrize("context", [5, 90, 200, 700])
def test_sliding_layers_that_are_certified(context: int) -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=32, vocab_size=16,
        sliding_window=100, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    settings = CertKVConfig(certify_sliding=True, block_size=16, recent_window=20, exact_below=0)
    assert_equal_to_the_byte(config, context, torch.float32, settings)
