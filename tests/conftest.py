"""Shared builders: small random models from configs, prompts, and the comparison with transformers' own DynamicCache."""

from __future__ import annotations

import where as _where  # noqa: F401  # isort: skip  # before anything imports triton
import signal
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_certkv import CertifiedQuantizedCache
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.layers import CertifiedLayer

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored; tests interrupt themselves

VOCAB = 128
PAD, EOS = 0, 1


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_config(kind: str) -> Any:
    """The config of a small model: two to four layers, grouped queries, no end-of-sequence token."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.12,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }
    if kind == "llama":
        return LlamaConfig(**common, head_dim=64)
    if kind == "llama80":
        return LlamaConfig(**{**common, "num_hidden_layers": 3}, head_dim=80)
    if kind == "qwen3":
        return Qwen3Config(**common, head_dim=96)
    if kind == "mistral":
        return MistralConfig(**common, head_dim=64, sliding_window=None)
    if kind == "mistral_sliding":
        return MistralConfig(**common, head_dim=64, sliding_window=96)
    if kind == "gemma3":
        types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        return Gemma3TextConfig(
            **{**common, "num_hidden_layers": 4},
            head_dim=64,
            sliding_window=96,
            layer_types=types,
            query_pre_attn_scalar=64,
        )
    if kind == "gemma2":
        return Gemma2Config(
            **common,
            head_dim=64,
            sliding_window=96,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=64,
            attn_logit_softcapping=5.0,
        )
    if kind == "gpt_oss":
        return GptOssConfig(
            **common,
            head_dim=64,
            sliding_window=96,
            layer_types=["sliding_attention", "full_attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    raise ValueError(kind)


_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "llama80": LlamaForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "mistral": MistralForCausalLM,
    "mistral_sliding": MistralForCausalLM,
    "gemma3": Gemma3ForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "gpt_oss": GptOssForCausalLM,
}


def build_model(
    kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A new random model in evaluation mode; equal arguments give equal weights. `changes` go into its config."""
    config = small_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = _CLASSES[kind](config).eval()
    if kind == "gpt_oss":  # its sink logits and expert biases start uninitialised or at zero: make both count
        for name, parameter in model.named_parameters():
            if name.endswith("sinks") or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    model = model.to(dtype)
    model.config.dtype = dtype
    return model


@cache
def shared_model(kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """As `build_model`, kept for the whole run: for tests that do not change the model."""
    return build_model(kind, dtype, attention, seed)


def prompt(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Random token ids `[batch, length]`, none of them special."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_cache(model: PreTrainedModel, **settings: Any) -> CertifiedQuantizedCache:
    """A certified cache for the model."""
    return CertifiedQuantizedCache(model.config, **settings)


class BareCache:
    """One certified layer in a cache of its own, fed with given keys and values."""

    def __init__(self, **settings: Any) -> None:
        self.cache = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1), **settings)
        (self.layer,) = self.cache.certified_layers

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[batch, kv_heads, tokens, channels]`."""
        return self.cache.update(keys, values, 0)


def random_states(
    tokens: int,
    batch: int = 1,
    heads: int = 2,
    widths: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random keys and values `[batch, heads, tokens, channels]`; the channels of keys differ in size and offset."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, widths[0], generator=generator)
    keys = keys * torch.linspace(0.3, 2.0, widths[0]) + torch.linspace(-1.0, 1.0, widths[0])
    values = torch.randn(batch, heads, tokens, widths[1], generator=generator)
    return keys.to(dtype), values.to(dtype)


def layer_state(layer: CertifiedLayer) -> dict[str, Any]:
    """Everything that a layer holds, used parts only: lengths, exact tokens, codes, scales, numbers, originals, checksums."""
    state: dict[str, Any] = {
        "initialised": layer.is_initialized,
        "length": layer.sequence_length,
        "blocks": layer.store.blocks,
        "sink_tokens": layer.sink_tokens,
    }
    if not layer.is_initialized:
        return state
    assert layer.shadow is not None
    state["batch"] = (layer.batch, layer.shadow.batch)
    for kind, name in ((KEYS, "keys"), (VALUES, "values")):
        buffer = layer.exact[kind]
        state[f"exact.{name}"] = buffer.view.clone() if buffer.length else 0
        state[f"originals.{name}"] = layer.materialise(kind).clone() if layer.sequence_length else 0
        shadow = layer.shadow
        pages = [shadow.slabs[row // shadow.rows_per_slab].pages[kind] for row in range(shadow.blocks)]
        sums = [shadow.slabs[row // shadow.rows_per_slab].sums[kind] for row in range(shadow.blocks)]
        places = [row % shadow.rows_per_slab for row in range(shadow.blocks)]
        state[f"pages.{name}"] = [page[place].clone() for page, place in zip(pages, places, strict=True)]
        state[f"sums.{name}"] = [part[place].tolist() for part, place in zip(sums, places, strict=True)]
        stored = layer.store.keys if kind == KEYS else layer.store.values
        for part, entries in stored.items():
            held = entries.data is not None and entries.length > 0
            state[f"store.{name}.{part}"] = entries.view.clone() if held else None
    return state


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    """Equality of nested states; tensors bit for bit (NaN equals NaN), dtype and shape included."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, where
        same = torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        assert same, where
    elif isinstance(expected, dict):
        assert set(actual) == set(expected), where
        for name in expected:
            assert_same(actual[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, part in enumerate(expected):
            assert_same(actual[i], part, f"{where}[{i}]")
    else:
        assert actual == expected, where


def cache_state(cache: CertifiedQuantizedCache) -> list[dict[str, Any]]:
    """The state of every layer, transformers' own included."""
    states = []
    for layer in cache.layers:
        if isinstance(layer, CertifiedLayer):
            states.append(layer_state(layer))
        else:
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(layer).items()}
            states.append({k: v for k, v in own.items() if isinstance(v, (Tensor, int, type(None)))})
    return states


def generate(model: PreTrainedModel, ids: Tensor, steps: int, cache: Any = None, **options: Any) -> Any:
    """`model.generate` with exactly `steps` new tokens, a mask of ones unless given, and all logits returned."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    if not options.get("do_sample"):
        options.setdefault("do_sample", False)
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=steps,
        min_new_tokens=steps,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
        **options,
    )


def assert_same_generation(actual: Any, expected: Any) -> None:
    """Same tokens, and logits equal bit for bit at every step."""
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits)
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert torch.equal(ours, theirs), f"logits differ at step {step}"


def served(cache: CertifiedQuantizedCache) -> dict[str, int]:
    """Head-steps by rung."""
    return cache.report().to_dict()["overall"]["rungs"]


def assert_certified(cache: CertifiedQuantizedCache, share: float = 0.0) -> None:
    """Some head-steps were certified without the dense rung, and nothing was served by materialising."""
    report = cache.report().to_dict()
    rungs = report["overall"]["rungs"]
    certified = rungs["fast"] + rungs["keys"] + rungs["values"]
    assert certified > share * report["overall"]["head_steps"] and certified > 0, rungs
    assert rungs["uncertified"] == 0
    assert report["materialised_operations"] == {}
