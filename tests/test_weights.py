"""Weights of every kind: 8-bit and NF4 by bitsandbytes, bfloat16, float16, float32. What is cached is exact or certified."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_certified, assert_same_generation, build_model, generate, new_cache, prompt, served
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedModel

LENGTH, STEPS = 330, 16
SMALL: dict[str, Any] = {"block_size": 16, "recent_window": 8}
bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
WEIGHTS = [
    pytest.param("int8", marks=bitsandbytes),
    pytest.param("nf4", marks=bitsandbytes),
    pytest.param("nf4, float32", marks=bitsandbytes),
    "bfloat16",
    "float16",
    "float32",
]


def quantisation(weights: str) -> BitsAndBytesConfig | None:
    """How bitsandbytes is to keep them, if it is."""
    if weights == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if weights.startswith("nf4"):
        compute = torch.float32 if "float32" in weights else torch.bfloat16
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 on disk, whose weights are loaded in several ways."""
    path = tmp_path_factory.mktemp("weights")
    build_model("qwen3", intermediate_size=128).save_pretrained(path)  # NF4 wants whole blocks of 64 inputs
    return path


@cache
def load(folder: Path, weights: str) -> PreTrainedModel:
    """The model with weights of this kind; activations in bfloat16 unless the name says otherwise."""
    how = quantisation(weights)
    dtype = getattr(torch, weights.split()[-1]) if how is None or "float32" in weights else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"} if how else None, quantization_config=how, attn_implementation="sdpa"
    )
    assert how is None or any("bitsandbytes" in type(module).__module__ for module in model.modules())
    return model.eval()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_zero_tolerance_is_bit_identical(folder: Path, weights: str) -> None:
    model, ids = load(folder, weights), prompt(LENGTH)
    expected = generate(model, ids, STEPS, DynamicCache(config=model.config))
    own = new_cache(model, rtol=0.0, **SMALL)
    assert_same_generation(generate(model, ids, STEPS, own), expected)
    assert len(set(expected.sequences[0, LENGTH:].tolist())) > 1, "a constant continuation proves little"
    assert served(own)["dense_layer"] == 2 * (STEPS - 1) * 4
    assert all(layer.store.blocks for layer in own.certified_layers)


@pytest.mark.parametrize("rtol", [0.02, 0.05])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_bound_holds(folder: Path, weights: str, rtol: float) -> None:
    """Audited: a true error above its bound raises."""
    model = load(folder, weights)
    own = new_cache(model, rtol=rtol, audit=True, **SMALL)
    generate(model, prompt(LENGTH), STEPS, own)
    assert_certified(own)
    assert {layer.dtype for layer in own.certified_layers} == {model.dtype}
    figures = own.report().to_dict()["overall"]["relative"]
    assert figures["error"]["max"] <= figures["bound"]["max"] <= rtol
