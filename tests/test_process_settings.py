"""What the process has set (precision, autocast, flushing of subnormals) must not matter to a bound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from hf_certkv.verify.cases import (
    Case,
    Verdict,
    examine,
    judge,
    run,
    tensors,
)


@contextlib.contextmanager
def process_setting(name: str) -> Iterator[None]:
    """A process-wide setting that makes arithmetic less exact; restored."""
    if name.startswith("autocast"):
        with torch.autocast("cpu", dtype=torch.bfloat16 if name.endswith("bfloat16") else torch.float16):
            yield
    elif name == "flush denormals":
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


SETTINGS = ("medium", "high", "autocast bfloat16", "autocast float16", "flush denormals")


def found_under(name: str, case: Case) -> Verdict:
    """Breaches when everything runs under a process-wide setting; the oracle runs without it."""
    with process_setting(name):
        output, record, cache = run(case)
    return judge(case, output, record, cache.settings)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rtol", [1e-5, 0.05, 1.0])
@pytest.mark.parametrize("channels", [16, 64])
def test_process_settings_do_not_break_a_bound(name: str, rtol: float, channels: int) -> None:
    """`rtol=1e-5` is served densely: that output has a bound too."""
    for seed, size in enumerate((1.0, 6.0, 30.0)):
        q, k, v = tensors("normal", torch.float32, 120, channels, channels, 1, 1, seed)
        found = found_under(name, Case(q * size, k, v, settings={"rtol": rtol})).breaches
        assert not found, found[:2]


@pytest.mark.parametrize("name", SETTINGS)
def test_process_settings_do_not_spoil_what_is_measured(name: str) -> None:
    """Equal values under equal weights: the value bound is attained, so a spectral number that is low by 0.1 % shows."""
    for seed in range(12):
        torch.manual_seed(seed)
        v = torch.randn(1, 2, 1, 128).expand(1, 2, 129, 128).clone()
        case = Case(torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 129, 8), v, settings={"atol": 1e3, "block_size": 64})
        verdict = found_under(name, case)
        assert not verdict.breaches, verdict.breaches[:2]
        assert verdict.share > 0.9


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("small", [2.0**-127, 2.0**-140, 2.0**-149])
@pytest.mark.parametrize("swap", [False, True])
def test_subnormal_queries_and_keys(flush: bool, small: float, swap: bool) -> None:
    """A subnormal factor times a large one is an ordinary score: losing the subnormal part must be in the bound."""
    q, k = torch.full((1, 4, 1, 16), small), torch.zeros(1, 2, 97, 16)
    k[:, :, -1] = 2.0**122
    if swap:
        q, k = torch.full((1, 4, 1, 16), 2.0**122), torch.zeros(1, 2, 97, 16)
        k[:, :, -1] = small
    v = torch.zeros(1, 2, 97, 16)
    v[:, :, -1] = 1.0
    case = Case(q, k, v, scale=1.0, settings={"rtol": 0.3})
    found = (found_under("flush denormals", case) if flush else examine(case)).breaches
    assert not found, found[:2]


def test_the_backend_precision_settings_are_honoured() -> None:
    """The per-backend precision switches are another way to lower float32 products: no crash, and no broken bound."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        q, k, v = tensors("normal", torch.float32, 120, 64, 64, 1, 1, 0)
        case = Case(q * 6, k, v, settings={"rtol": 0.05})
        output, record, cache = run(case)
    finally:
        matmul.fp32_precision = before
    found = judge(case, output, record, cache.settings).breaches
    assert not found, found[:2]
