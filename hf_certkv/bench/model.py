"""The model behind the decode step and the prefill: a small Llama with random weights and the heads of a large one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

QUERY_HEADS, KV_HEADS = 32, 8
HIDDEN, INTERMEDIATE, VOCABULARY = 512, 1024, 256
DTYPE = torch.bfloat16


def model_config(head_dim: int, layers: int) -> LlamaConfig:
    """32 query heads, 8 KV heads of `head_dim` channels, hidden width 512: little besides attention and the cache."""
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
        vocab_size=VOCABULARY,
        max_position_embeddings=2**24,
        dtype=DTYPE,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build_model(head_dim: int, layers: int, device: torch.device, seed: int) -> Any:
    """The model in bfloat16, with transformers' default (SDPA) attention and seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(head_dim, layers))
    return model.to(device=device, dtype=DTYPE).eval()


def tokens(count: int, batch: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random token ids, int64 `[batch, count]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, count), generator=generator).to(device)
