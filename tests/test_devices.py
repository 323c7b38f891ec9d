"""Models that accelerate dispatches: weights on disk or in host memory, fetched by hooks layer by layer.

No test machine has several accelerators: layers "on several devices" are simulated by layers whose weights lie in different
places, all computed on the CPU. The cache meets the same hooks, which move weights and tensors around each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import assert_same_generation, build_model, generate, prompt, served
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_certkv import CertifiedQuantizedCache, attach, detach

LENGTH, STEPS = 200, 8
SMALL: dict[str, Any] = {"block_size": 16, "recent_window": 8, "exact_below": 0}
CPU = torch.device("cpu")


def places(*layers: str) -> dict[str, str]:
    """A device map of a model whose decoder layers lie here and there."""
    names = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return {**names, **{f"model.layers.{i}": place for i, place in enumerate(layers)}}


def build() -> PreTrainedModel:
    """Three layers, so that one can lie between two others."""
    return build_model("llama80")


def in_memory(folder: Path) -> PreTrainedModel:
    """All weights with hooks, in host memory; the modules hold meta tensors."""
    return cpu_offload(build(), execution_device=CPU)


def on_disk(folder: Path) -> PreTrainedModel:
    """All weights on disk."""
    return disk_offload(build(), str(folder / "off"), execution_device=CPU)


def between(folder: Path) -> PreTrainedModel:
    """The middle layer on disk."""
    map_ = places("cpu", "disk", "cpu")
    return dispatch_model(build(), device_map=map_, main_device="cpu", offload_dir=str(folder / "off"))


def outside(folder: Path) -> PreTrainedModel:
    """The first and the last layer on disk, fetched with buffers."""
    map_ = places("disk", "cpu", "disk")
    return dispatch_model(build(), device_map=map_, main_device="cpu", offload_dir=str(folder / "off"), offload_buffers=True)


def from_disk(folder: Path) -> PreTrainedModel:
    """Loaded by transformers with a device map."""
    build().save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places("cpu", "disk", "cpu"), offload_folder=str(folder / "off"), dtype=torch.float32
    )


@pytest.mark.parametrize("how", ["plain", "attached"])
@pytest.mark.parametrize("rtol", [0.0, 0.02])
@pytest.mark.parametrize("prepare", [in_memory, on_disk, between, outside, from_disk])
def test_tokens_are_those_of_a_model_in_one_place(
    prepare: Callable[[Path], PreTrainedModel], rtol: float, how: str, tmp_path: Path
) -> None:
    """Same logits, same certificates, hot slots that are prefetched included; and again after a reset."""
    here = build()
    if prepare is from_disk:
        # Weights that lie in a mapped file begin at other addresses, and some processors then add in another order: what is
        # compared bit for bit is loaded in the same way, and close to the model that was saved.
        saved, here = here, from_disk(tmp_path)
        close = generate(saved, prompt(LENGTH), STEPS, DynamicCache(config=saved.config))
        found = generate(here, prompt(LENGTH), STEPS, DynamicCache(config=here.config))
        assert torch.equal(found.sequences, close.sequences)
        for mapped, built in zip(found.logits, close.logits, strict=True):
            torch.testing.assert_close(mapped, built, rtol=1e-5, atol=1e-5)
    ours = CertifiedQuantizedCache(here.config, rtol=rtol, hot_blocks=2, **SMALL)
    expected = generate(here, prompt(LENGTH), STEPS, ours)
    model = prepare(tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters()), "no weight is elsewhere"
    cache = CertifiedQuantizedCache(model.config, rtol=rtol, hot_blocks=2, **SMALL)
    if how == "attached":
        attach(model, cache)
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected)
    assert cache.report().to_dict()["overall"] == ours.report().to_dict()["overall"]
    assert all(layer.device == CPU and layer.store.blocks for layer in cache.certified_layers)
    cache.reset()
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected)
    detach(cache)
    if rtol == 0:
        dense = generate(model, prompt(LENGTH), STEPS, DynamicCache(config=model.config))
        assert_same_generation(expected, dense)
        assert served(cache)["dense_layer"] > 0
