"""Failures at bad moments, and habits of callers: what a step leaves behind, and what an older result may become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, generate, new_cache, prompt
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig

from hf_certkv import CacheStateError, CertifiedQuantizedCache, GradientError, InputError
from hf_certkv.attention import eager_attention
from hf_certkv.store import GrowingBuffer

CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64)


def states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, 2, tokens, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2))  # type: ignore[return-value]


def contents(cache: CertifiedQuantizedCache) -> list[tuple[int, int, Tensor, Tensor]]:
    """Length, quantised blocks and originals of every layer."""
    return [
        (layer.sequence_length, layer.store.blocks, layer.materialise(0), layer.materialise(1))
        for layer in cache.certified_layers
    ]


def assert_same(after: list[Any], before: list[Any]) -> None:
    for new, old in zip(after, before, strict=True):
        assert new[:2] == old[:2] and torch.equal(new[2], old[2]) and torch.equal(new[3], old[3])


@pytest.mark.parametrize("held", [200, 383, 400])
@pytest.mark.parametrize("writes", range(4))
def test_an_interrupt_while_tokens_are_written_leaves_the_state_before(
    held: int, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the first, second, ... buffer that a step of two layers writes."""
    cache = CertifiedQuantizedCache(CONFIG)
    for layer_idx in range(2):
        cache.update(*states(held, layer_idx), layer_idx)
    before = contents(cache)
    write, served = GrowingBuffer.write, 0

    def interrupted(buffer: GrowingBuffer, entries: Tensor) -> None:
        nonlocal served
        if served == writes:
            raise KeyboardInterrupt
        served += 1
        write(buffer, entries)

    monkeypatch.setattr(GrowingBuffer, "write", interrupted)

    def step() -> None:
        for layer_idx in range(2):
            cache.update(*states(1, 7), layer_idx)

    with pytest.raises(KeyboardInterrupt):
        step()
    monkeypatch.undo()
    assert_same(contents(cache), before)
    step()
    assert [part[0] for part in contents(cache)] == [held + 1, held + 1]


def test_a_pass_that_ended_between_layers_is_noticed() -> None:
    model = build_model("llama")
    cache, ids = new_cache(model), prompt(330)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[0].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        hook.remove()
        with pytest.raises(CacheStateError, match="reset"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.reset()
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        assert torch.equal(logits, model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_of_the_process_does_not_matter(default: torch.dtype) -> None:
    model = build_model("llama")
    expected = generate(model, prompt(330), 6, new_cache(model, rtol=0.05))
    torch.set_default_dtype(default)
    try:
        actual = generate(model, prompt(330), 6, new_cache(model, rtol=0.05))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(actual.logits, expected.logits, strict=True))


@pytest.mark.parametrize("settings", [{}, {"hot_blocks": 4, "rtol": 0.01, "refine": "off"}], ids=str)
def test_inference_mode_may_come_and_go(settings: dict[str, Any]) -> None:
    cache = CertifiedQuantizedCache(CONFIG, **settings)
    query = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(3))
    for turn in range(130):
        with torch.inference_mode(turn % 2 == 0), torch.no_grad():
            for layer_idx in range(2):
                keys, values = cache.update(*states(330 if turn == 0 else 1, turn), layer_idx)
                F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    cache.crop(-100)
    cache.reorder_cache(torch.tensor([0]))
    assert cache.get_seq_length() == 330 + 129 - 100


def test_a_query_that_requires_a_gradient_is_refused_and_the_step_undone() -> None:
    cache = CertifiedQuantizedCache(CONFIG, rtol=0.05)
    cache.update(*states(400), 0)
    cache.update(*states(400), 1)
    before = contents(cache)
    keys, values = cache.update(*states(1, 5), 0)
    with pytest.raises(GradientError):
        F.scaled_dot_product_attention(torch.randn(1, 4, 1, 16, requires_grad=True), keys, values, enable_gqa=True)
    assert_same(contents(cache), before)


def test_what_was_returned_before_quantisation_is_nobodys_buffer() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    cache.update(*states(100), 0)
    keys, _ = cache.update(*states(1, 1), 0)
    kept = keys.clone()
    cache.crop(-1)
    cache.update(*states(1, 2), 0)
    assert torch.equal(keys, kept)
    held = cache.certified_layers[0].keys
    assert held is not None
    held.zero_()
    assert bool((cache.certified_layers[0].materialise(0) != 0).any())


def test_a_crop_by_a_tensor_leaves_lengths_that_are_numbers() -> None:
    cache = CertifiedQuantizedCache(CONFIG)
    for layer_idx in range(2):
        cache.update(*states(400), layer_idx)
    cache.crop(torch.tensor(-4))  # type: ignore[arg-type]
    for layer_idx in range(2):
        cache.update(*states(5, 1), layer_idx)
    assert [type(layer.sequence_length) for layer in cache.certified_layers] == [int, int]
    assert cache.get_seq_length() == 401 and type(cache.get_seq_length()) is int


def test_one_kv_head_that_sdpa_broadcasts_is_certified() -> None:
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, head_dim=16, hidden_size=64)
    cache = CertifiedQuantizedCache(config, rtol=0.5, audit=True, record="full")
    exact = [torch.randn(1, 1, 400, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    cache.update(*exact, 0)
    new = states(1, 4)
    new = (new[0][:, :1], new[1][:, :1])
    handles = cache.update(*new, 0)
    query = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(9))
    output = F.scaled_dot_product_attention(query, *handles)
    plain = [torch.cat([old, part], dim=2) for old, part in zip(exact, new, strict=True)]
    dense = F.scaled_dot_product_attention(query, *plain)
    cache.report()
    (record,) = cache.recorder.records
    assert record.rung.shape == (1, 4, 1) and (record.rung < 3).all()
    assert not torch.equal(output, dense) and torch.allclose(output, dense, atol=0.2)


def test_padding_rows_that_see_nothing_are_zero_with_a_softcap() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    output = eager_attention(query, key, key, mask, 0.3, 5.0, None)
    assert (output[:, :, 0] == 0).all() and torch.isfinite(output).all()
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    models = [Gemma2ForCausalLM._from_config(config, attn_implementation=name).eval() for name in ("certkv", "eager")]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(3, 64, (2, 20))
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    with torch.no_grad():
        logits = [model(ids, attention_mask=seen).logits[:, -1] for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_dropout_with_a_softcap_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, attention_dropout=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="certkv").train()
    with pytest.raises(InputError, match="dropout"):
        model(torch.randint(3, 64, (1, 8)))
