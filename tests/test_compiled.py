"""A compiled model around the cache: the same tokens, everything still certified."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_certified, build_model, generate, new_cache, prompt
from transformers import DynamicCache


@pytest.mark.parametrize("attention", ["sdpa", "certkv", "eager"])
def test_a_compiled_model_is_certified(attention: str) -> None:
    """The "eager" backend runs what the compiler traces without making machine code of it."""
    model, ids = build_model("llama", attention=attention), prompt(300)
    expected = generate(model, ids, 4, DynamicCache(config=model.config)).sequences
    exact, certified = new_cache(model, rtol=0.0), new_cache(model, audit=True)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    try:
        assert torch.equal(generate(model, ids, 4, exact).sequences, expected)
        assert torch.equal(generate(model, ids, 4, certified).sequences, expected)
    finally:
        torch._dynamo.reset()
    report = certified.report().to_dict()
    assert report["overall"]["head_steps"] == 2 * 3 * 4 and report["exact_head_steps"] == 0
    assert report["materialised_operations"] == {}
    assert_certified(certified)
