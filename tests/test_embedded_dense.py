"""At zero tolerance the embedded models' logits are those of `DynamicCache`, bit for bit; and the audit of both holds."""

from __future__ import annotations

import pytest
import torch

from benchmarks.audit import run
from benchmarks.device import NEW_TOKENS, dense_tokens_equal
from hf_certkv import CertKVConfig
from hf_certkv.embedded import load_embedded, make_haystack


@pytest.mark.parametrize("name", ["prose", "retriever"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_tolerance_is_bit_identical_over_64_steps(name: str, dtype: torch.dtype) -> None:
    assert NEW_TOKENS == 64
    model, _ = load_embedded(name, dtype=dtype)
    assert dense_tokens_equal(model, make_haystack(None, 512, 8, seed=1).input_ids)


@pytest.mark.parametrize("name", ["prose", "retriever"])
@pytest.mark.parametrize("changes", [{}, {"refine": "off"}, {"refine": "device", "value_bits": 8, "block_size": 16}], ids=str)
def test_audited_traces_have_no_violation(name: str, changes: dict[str, object]) -> None:
    model, _ = load_embedded(name)
    hay = make_haystack(None, 768, 12, seed=2)
    keys = torch.tensor([[needle.key_id for needle in hay.needles]])
    result = run(model, hay.input_ids, keys, CertKVConfig(rtol=0.05, audit=True).replace(**changes))
    assert result["violations"] == 0
    assert result["head_steps"] == model.config.num_hidden_layers * model.config.num_attention_heads * 12
