"""Hooks on a model: outputs stay the same, chained with accelerate's own, and the modules are restored exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module
from conftest import assert_same_generation, build_model, generate, new_cache, prompt
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_certkv import CertifiedQuantizedCache, UnsupportedModelError, attach, detach
from hf_certkv.hooks import CertKVHook, decoder_layers

LENGTH, STEPS = 330, 8


def attributes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The instance attributes of every module, by identity of their values; bound methods by what they are bound to."""
    found = []
    for module in model.modules():
        own: dict[str, Any] = {}
        for name, value in vars(module).items():
            own[name] = tuple(value.items()) if isinstance(value, dict) else value
        found.append(own)
    return found


def assert_same_attributes(after: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Same modules, same attribute names, same objects behind them."""
    assert len(after) == len(before)
    for new, old in zip(after, before, strict=True):
        assert set(new) == set(old)
        for name, value in old.items():
            if isinstance(value, tuple):
                assert len(new[name]) == len(value), name
                assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(new[name], value, strict=True)), name
            else:
                assert new[name] is value or new[name] == value, name


class Counting(ModelHook):
    """Counts the calls of its module."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Before."""
        self.before += 1
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """After."""
        self.after += 1
        return output


def expected_output(rtol: float = 0.02) -> Any:
    """What the model gives without any hook."""
    model = build_model("llama")
    return generate(model, prompt(LENGTH), STEPS, new_cache(model, rtol=rtol))


@pytest.mark.parametrize("rtol", [0.0, 0.05])
def test_outputs_and_records_are_the_same(rtol: float) -> None:
    model = build_model("llama")
    plain = new_cache(model, rtol=rtol)
    expected = generate(model, prompt(LENGTH), STEPS, plain)
    cache = CertifiedQuantizedCache(model=model, rtol=rtol)
    assert all(isinstance(layer._hf_hook, CertKVHook) for layer in model.model.layers)
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected)
    assert cache.report().to_dict()["overall"] == plain.report().to_dict()["overall"]
    detach(cache)
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, new_cache(model, rtol=rtol)), expected)


def test_the_hooks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    cache = CertifiedQuantizedCache(model=model)
    calls: list[tuple[str, int]] = []
    for layer in cache.certified_layers:
        index = layer.layer_idx
        monkeypatch.setattr(layer, "flush", lambda i=index: calls.append(("flush", i)))
        monkeypatch.setattr(layer, "prefetch", lambda i=index: calls.append(("prefetch", i)))
    with torch.no_grad():
        model(prompt(LENGTH), past_key_values=cache, use_cache=True)
    # Before layer i: fetch for the next one. Its own `update` asks again, for when there are no hooks. Behind it: flush.
    assert calls == [(what, i) for at in (0, 1) for what, i in (("prefetch", 1 - at), ("prefetch", at), ("flush", at))]
    detach(cache)
    with torch.no_grad():
        model(prompt(1), past_key_values=cache, use_cache=True)
    assert calls[6:] == [("prefetch", 0), ("prefetch", 1)]


def test_another_cache_may_be_used_meanwhile() -> None:
    model = build_model("llama")
    cache = CertifiedQuantizedCache(model=model)
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, new_cache(model)), expected_output())
    assert cache.get_seq_length() == 0
    detach(cache)


def test_detach_restores_every_attribute() -> None:
    model = build_model("llama")
    before = attributes(model)
    cache = new_cache(model)
    attach(model, cache)
    generate(model, prompt(LENGTH), 2, cache)
    assert any("_hf_hook" in own for own in attributes(model))
    detach(cache)
    assert_same_attributes(attributes(model), before)
    assert cache.handles is None


def test_attach_and_detach_again() -> None:
    model = build_model("llama")
    before = attributes(model)
    cache = new_cache(model)
    for _ in range(3):
        attach(model, cache)
        detach(cache)
    detach(cache)  # nothing left to take off
    assert_same_attributes(attributes(model), before)


def test_attaching_twice_is_refused() -> None:
    model = build_model("llama")
    cache = CertifiedQuantizedCache(model=model)
    hooks = [layer._hf_hook for layer in model.model.layers]
    with pytest.raises(UnsupportedModelError, match="detach"):
        attach(model, cache)
    assert [layer._hf_hook for layer in model.model.layers] == hooks


@pytest.mark.parametrize("first", [0, 1])
def test_two_caches_on_one_model(first: int) -> None:
    """Two caches attached to one model come off in either order."""
    model = build_model("llama")
    before = attributes(model)
    caches = [CertifiedQuantizedCache(model=model), CertifiedQuantizedCache(model=model)]
    expected = expected_output()
    for cache in caches:
        assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected)
    detach(caches[first])
    rest = caches[1 - first]
    for i, layer in enumerate(model.model.layers):
        hooks = layer._hf_hook.hooks if isinstance(layer._hf_hook, SequentialHook) else [layer._hf_hook]
        assert [(hook.cache is rest, hook.layer_idx) for hook in hooks] == [(True, i)]
    rest.reset()
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, rest), expected)
    detach(rest)
    assert_same_attributes(attributes(model), before)


@pytest.mark.parametrize("order", ["ours last", "ours first"])
def test_hooks_of_others_stay(order: str) -> None:
    model = build_model("llama")
    cache, counters = new_cache(model), [Counting(), Counting()]

    def add_counters() -> None:
        for layer, counter in zip(model.model.layers, counters, strict=True):
            add_hook_to_module(layer, counter, append=True)

    if order == "ours last":
        add_counters()
        before = attributes(model)
        attach(model, cache)
    else:
        attach(model, cache)
        add_counters()
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected_output())
    assert [(counter.before, counter.after) for counter in counters] == [(STEPS, STEPS)] * 2
    detach(cache)
    assert [layer._hf_hook for layer in model.model.layers] == counters
    if order == "ours last":
        assert_same_attributes(attributes(model), before)
    generate(model, prompt(20), 2)
    assert [(counter.before, counter.after) for counter in counters] == [(STEPS + 2, STEPS + 2)] * 2


def offloaded(path: Path) -> PreTrainedModel:
    """A model whose weights lie with accelerate's hooks."""
    return cpu_offload(build_model("llama"), execution_device=torch.device("cpu"))


def dispatched(path: Path) -> PreTrainedModel:
    """A model that accelerate dispatched to one device, hooks forced."""
    return dispatch_model(build_model("llama"), device_map={"": "cpu"}, force_hooks=True)


def split(path: Path) -> PreTrainedModel:
    """A model dispatched layer by layer, one of them offloaded to disk."""
    names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    names |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(build_model("llama"), device_map=names, main_device="cpu", offload_dir=str(path / "off"))


def loaded(path: Path) -> PreTrainedModel:
    """A model loaded from disk with a device map."""
    build_model("llama").save_pretrained(path / "model")
    return LlamaForCausalLM.from_pretrained(
        path / "model", device_map={"": "cpu"}, attn_implementation="sdpa", dtype=torch.float32
    )


@pytest.mark.parametrize("prepare", [offloaded, dispatched, split, loaded])
def test_behind_accelerates_own_hooks(prepare: Callable[[Path], PreTrainedModel], tmp_path: Path) -> None:
    model, expected = prepare(tmp_path), expected_output()
    before = attributes(model)
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, new_cache(model)), expected)
    cache = CertifiedQuantizedCache(model=model)
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected)
    detach(cache)
    after = attributes(model)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys() and old.get("_hf_hook") is new.get("_hf_hook")
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, new_cache(model)), expected)


@pytest.mark.parametrize("detached_first", [False, True])
def test_before_accelerates_own_hooks(detached_first: bool) -> None:
    """Attached first, offloaded afterwards: the weights still arrive, and detaching leaves accelerate's hooks."""
    expected = expected_output()
    model = build_model("llama")
    cache = CertifiedQuantizedCache(model=model)
    if detached_first:
        detach(cache)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, cache), expected)
    detach(cache)
    assert not any(isinstance(getattr(module, "_hf_hook", None), CertKVHook) for module in model.modules())
    assert_same_generation(generate(model, prompt(LENGTH), STEPS, new_cache(model)), expected)


def test_the_layers_are_found() -> None:
    for kind in ("llama", "gemma3", "gpt_oss"):
        model = build_model(kind, attention="eager")
        assert decoder_layers(model) is model.model.layers


def test_a_model_without_layers_is_refused() -> None:
    model = build_model("llama")
    model.model.layers = torch.nn.ModuleList([])
    with pytest.raises(UnsupportedModelError, match="without hooks"):
        CertifiedQuantizedCache(model=model)
