"""Construction and settings: what is out of range or unsupported is refused, with a reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
from conftest import (
    shared_model,
)
from transformers import LlamaConfig, T5Config

from hf_certkv import (
    CertifiedQuantizedCache,
    CertKVConfig,
    CertKVError,
    ConfigError,
    CorruptedPageError,
    GradientError,
    HostMemoryError,
    InputError,
    UnsupportedModelError,
)


class TestConstruction:
    """What the constructor refuses, and how."""

    def test_encoder_decoder(self) -> None:
        with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
            CertifiedQuantizedCache(T5Config())

    @pytest.mark.parametrize(
        "config", [None, "llama", 3, {"num_hidden_layers": 2}, pytest.param(object(), id="object")], ids=str
    )
    def test_no_config(self, config: Any) -> None:
        with pytest.raises(UnsupportedModelError, match=r"model\.config"):
            CertifiedQuantizedCache(config)

    def test_unknown_setting(self) -> None:
        with pytest.raises(ConfigError, match="rtoll"):
            CertifiedQuantizedCache(LlamaConfig(), rtoll=0.1)

    @pytest.mark.parametrize("settings", [0.05, {"rtol": 0.1}, "paper", CertKVConfig])
    def test_settings_of_another_type(self, settings: Any) -> None:
        with pytest.raises(ConfigError, match="CertKVConfig"):
            CertifiedQuantizedCache(LlamaConfig(), settings=settings)

    def test_settings_and_changes_are_joined(self) -> None:
        cache = CertifiedQuantizedCache(LlamaConfig(), settings=CertKVConfig(atol=0.5), rtol=0.1)
        assert cache.settings == CertKVConfig(rtol=0.1, atol=0.5)

    def test_the_model_may_stand_for_its_config(self) -> None:
        model = shared_model("llama")
        cache = CertifiedQuantizedCache(model)
        assert len(cache.certified_layers) == 2 and cache.handles is None

    def test_naive_says_that_it_certifies_nothing(self) -> None:
        with pytest.warns(UserWarning, match="certifies NOTHING"):
            CertifiedQuantizedCache(LlamaConfig(), settings=CertKVConfig.naive())

    def test_no_layers(self) -> None:
        with pytest.raises(UnsupportedModelError):
            CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=0))


OUT_OF_RANGE: dict[str, list[Any]] = {
    "rtol": [-0.1, math.nan, math.inf, "0.1", None, True],
    "atol": [-1e-9, math.nan, math.inf, "0", None, False],
    "scope": ["heads", "", None, 0],
    "policy": ["greedy", None, 1],
    "block_size": [0, 8, 48, 65, 256, -64, "64", None, 64.5, True],
    "value_bits": [0, 2, 3, 16, "4", None],
    "value_group": [-1, 1, 2.5, "32", True],
    "refine": ["gpu", None, True],
    "sink_blocks": [-1, 0.5, None, True],
    "recent_window": [-1, 0.5, None, "64"],
    "hot_blocks": [-1, 1.5],
    "exact_below": [-1, 1.5, None],
    "certify_queries": [0, -1, 1.5, None],
    "max_rounds": [0, -1, 1.5, None],
    "dense_head_share": [-0.1, 1.1, math.nan, None, "1"],
    "dense_layer_share": [-0.1, 1.1, math.nan, None, "1"],
    "record": ["all", None, True],
    "kernel": ["gpu", None, True],
    "audit": [1, 0, "yes", None],
    "certify_sliding": [1, 0, "yes", None],
    "seed": [0.5, "0", None, True],
    "paper_tau_cov": [-0.1, 1.1, math.nan, None],
    "paper_k_min": [-1, 0.5, None, 129],
    "paper_k_max": [0, -1, 1, 0.5, None],
    "paper_v_tol": [-0.1, math.nan, math.inf, None],
    "paper_rank_depth": [-1, 0.5, None],
    "paper_canary": [1, None, "no"],
    "paper_explore": [-0.1, 1.1, math.nan, None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values], ids=str
)
def test_every_setting_out_of_range_is_refused(name: str, value: Any) -> None:
    for build in (
        lambda: CertKVConfig(**{name: value}),
        lambda: CertKVConfig().replace(**{name: value}),
        lambda: CertKVConfig.from_dict({name: value}),
        lambda: CertifiedQuantizedCache(LlamaConfig(), **{name: value}),
    ):
        with pytest.raises(ConfigError, match="paper_k_m" if name.startswith("paper_k") else name):
            build()


def test_every_setting_is_covered() -> None:
    assert set(OUT_OF_RANGE) == set(CertKVConfig().to_dict())


def test_errors_have_one_base_and_a_builtin_one() -> None:
    for error, builtin in [
        (ConfigError, ValueError),
        (InputError, ValueError),
        (UnsupportedModelError, ValueError),
        (HostMemoryError, MemoryError),
        (CorruptedPageError, RuntimeError),
        (GradientError, RuntimeError),
    ]:
        assert issubclass(error, CertKVError) and issubclass(error, builtin)
