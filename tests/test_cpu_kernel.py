"""The CPU kernel: sums against float64 and the reference, certificate against bounds.py, bound against the oracle."""

from __future__ import annotations

import math
import multiprocessing
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from cpu_twin import arrays, discrepancies, float64_sums, kernel_slack, of_the_reference, returned, started, value_slips

from hf_certkv import bounds
from hf_certkv.decode import DecodeStep
from hf_certkv.kernels import cpu, cpu_pass, micro_integers, scratch
from hf_certkv.precision import full_precision
from hf_certkv.verify import cpu_arithmetic
from hf_certkv.verify.cases import Case, examine, mask_of, run, tensors
from hf_certkv.verify.rounding import flushing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Value bits and group, block, channels of keys and values, query heads a KV head, positions, mask.
SHAPES: list[tuple[int, int | None, int, int, int, int, int, str]] = [
    (4, None, 16, 64, 64, 1, 1, "none"),
    (4, 16, 32, 32, 32, 2, 1, "bool"),
    (4, 32, 64, 96, 96, 4, 1, "alibi"),
    (4, 0, 128, 128, 128, 3, 1, "none"),
    (4, 48, 16, 16, 96, 5, 2, "heads"),
    (4, 64, 32, 256, 64, 1, 3, "causal"),
    (4, None, 16, 64, 256, 9, 1, "padding"),
    (4, 16, 16, 128, 32, 2, 5, "rows"),
    (8, None, 16, 64, 64, 1, 1, "none"),
    (8, 0, 32, 32, 16, 2, 1, "inf"),
    (8, 16, 64, 96, 48, 4, 1, "none"),
    (8, 32, 128, 128, 128, 3, 1, "-1e9"),
    (8, 48, 16, 16, 80, 9, 1, "alibi"),
    (8, 64, 32, 256, 112, 1, 4, "window"),
    (8, 0, 16, 64, 16, 8, 2, "none"),
    (8, 16, 16, 128, 256, 6, 1, "finfo.min"),
]
REGIMES = ("normal", "drifting", "outlier", "one-hot", "wild values", "lined values", "duplicates", "large", "huge query")
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 5.0},
    {"sinks": True},
    {"softcap": -2.0, "sinks": True},
    {"scale": -0.3},
    {"recent_window": 37, "sink_blocks": 1},
    {"scale": 0.0},
)


def case_of(number: int, dtype: torch.dtype = torch.float32, regime: str | None = None, **settings: Any) -> Case:
    """A case of the tables above."""
    bits, group, block, channels, width, groups, positions, mask = SHAPES[number % len(SHAPES)]
    other: dict[str, Any] = dict(OTHERS[number % len(OTHERS)])
    batch, heads = 1 + number % 2, 1 + (number // 2) % 2
    tokens = block * (2 + number % 2) + positions + 5 + (block + 37 if "recent_window" in other else 0)
    regime = regime or REGIMES[number % len(REGIMES)]
    q, k, v = tensors(regime, dtype, tokens, channels, width, batch, positions, 100 + number, heads, groups)
    generator = torch.Generator().manual_seed(number)
    sinks = torch.randn(heads * groups, generator=generator).to(dtype) if other.pop("sinks", False) else None
    added = mask_of(mask, dtype, batch, positions, tokens, number, heads * groups)
    scale, softcap = other.pop("scale", None), other.pop("softcap", None)
    made = {"block_size": block, "value_bits": bits, "value_group": group, "kernel": "cpu", "rtol": 0.3, **other, **settings}
    return Case(q, k, v, added, scale, softcap, sinks, made)


@pytest.fixture(autouse=True, params=[True, False], ids=["integers", "floats"])
def integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Codes multiplied as integers, where the processor can do that, and as float32."""
    if request.param and not micro_integers.supported():
        pytest.skip("this processor does not multiply bytes four at a time")
    monkeypatch.setattr(cpu, "INTEGERS", request.param)
    return bool(request.param)


CASES = [(number, DTYPES[number % 3]) for number in range(len(SHAPES))] + [(number, torch.float32) for number in (20, 25, 30)]


@pytest.mark.parametrize(("number", "dtype"), CASES)
def test_sums(number: int, dtype: torch.dtype) -> None:
    """Each sum is what section 5 lets it differ by from that of float64 scores, relative to the same maximum."""
    step = started(case_of(number, dtype))
    assert step.fused is not None
    made = arrays(step)
    slack = torch.maximum(kernel_slack(step, made), step.slack).amax() + 1e-30
    sums, output = float64_sums(step, made["maximum"])
    powers = torch.tensor([1, 2, 1, 2, 1, 2, 3, 4]).double()
    room = torch.expm1(2 * powers * slack) + 2 * bounds.gamma(step.layer.block + step.shape[3] + 64)
    off = (made["sums"] - sums).abs() - room * sums
    blocks = off[..., :-1, :]
    assert bool((blocks <= 1e-30).all()) and bool((off[..., -1, 4:] <= 1e-30).all())
    slips = value_slips(step, made).transpose(2, 3).unsqueeze(-1)
    size, off = float64_sums(replace_values(step), made["maximum"])[1], (made["output"] - output).abs()
    assert bool((off <= room[4] * size + 1e-30 + torch.cat([slips, 0 * slips[:, :, :1]], dim=2)).all())
    other = of_the_reference(step)
    assert bool(((made["maximum"] - other.maximum.double()).abs().nan_to_num() <= 2 * slack).all())
    for mine, theirs in ((made["sums"][..., 4], other.total), (made["sums"][..., 5], other.square)):
        assert bool(((mine - theirs).abs() <= torch.expm1(8 * slack) * mine + 1e-5 * mine).all())


def replace_values(step: DecodeStep) -> DecodeStep:
    """The same step with the sizes of the values in their place: what roundings are relative to."""
    step.__dict__["exact_values"] = step.exact_values.abs()
    codec = step.layer.value_codec

    class Sizes:
        bits, levels = codec.bits, codec.levels

        def decode(self, *given: Any) -> Tensor:
            return codec.decode(*given).abs()

    step.layer.value_codec = Sizes()  # type: ignore[assignment]
    return step


def assert_like_bounds(step: DecodeStep) -> None:
    """The kernel's certificate is that of bounds.py: to 1e-10."""
    assert [word for word in discrepancies(step) if not word.startswith("sum ")] == []


@pytest.mark.parametrize(("number", "dtype"), CASES)
def test_the_certificate_is_that_of_bounds(number: int, dtype: torch.dtype) -> None:
    for regime in (None, "raw" if dtype != torch.float16 else "large", "subnormal"):
        assert_like_bounds(started(case_of(number, dtype, regime)))


@pytest.mark.parametrize("power", [-30, -18, -9, 9, 18, 30])
def test_the_certificate_at_any_size(power: int) -> None:
    """Values of any size, keys of the other: squares overflow and underflow."""
    for number in (0, 1, 8, 11):
        case = case_of(number, torch.float32, "normal")
        size = 10.0**power
        assert_like_bounds(started(replace(case, values=case.values * size)))
        assert_like_bounds(started(replace(case, keys=case.keys / size, query=(case.query * size).float())))
        parts = case.values.clone()
        parts[:, :, ::2] *= size
        assert_like_bounds(started(replace(case, values=parts)))


@pytest.mark.parametrize(("number", "dtype"), CASES[::2])
def test_the_certificate_after_promotions(number: int, dtype: torch.dtype) -> None:
    step = started(case_of(number, dtype, "normal", refine="device", hot_blocks=2))
    generator = torch.Generator().manual_seed(number)
    for _ in range(3):
        raised = []
        for level, codec in ((step.key_level, step.layer.key_codec), (step.value_level, step.layer.value_codec)):
            more = torch.randint(0, 3, level.shape, generator=generator)
            raised.append(torch.maximum(level, torch.where((more == 1) & (codec.levels == 1), 0 * more, more)))
        with full_precision("cpu"):
            step.raise_to(*raised)
        assert_like_bounds(step)


@pytest.mark.parametrize(("number", "dtype"), CASES)
def test_the_output_is_rounded_as_torch_does(number: int, dtype: torch.dtype) -> None:
    step = started(case_of(number, dtype))
    assert step.fused is not None
    assert torch.equal(returned(step, arrays(step))[0].to(dtype), step.fused.result)


def test_16_bit_types_are_torchs_bit_for_bit() -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype, code in ((torch.float16, cpu_pass.FLOAT16), (torch.bfloat16, cpu_pass.BFLOAT16)):
        numbers = halves.view(dtype).float()
        numbers = numbers[numbers.isfinite()]
        around = [numbers, numbers * (1 + 2.0**-11), numbers * (1 + 2.0**-8), numbers * (1 - 2.0**-12), numbers + 2.0**-25]
        around += [torch.nextafter(around[2], x) for x in (torch.tensor(0.0), torch.tensor(math.inf))]
        special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-40, 65519.9, 65520.0, 3.4e38, 2.0**-25, 2.0**-133])
        given = torch.cat([*around, special])
        for flushed in (False, True):
            with flushing(flushed):
                found, norm = cpu_arithmetic.rounded(given.numpy(), code)
            assert np.array_equal(found, given.to(dtype).view(torch.int16).numpy().view(np.uint16))
            assert norm == math.inf
        wrong = cpu_arithmetic.rounded(torch.tensor([1.0, math.nan]).numpy(), code)
        assert math.isnan(wrong[1]) and torch.from_numpy(wrong[0].view(np.int16)).view(dtype).isnan().tolist() == [False, True]


@pytest.mark.parametrize("number", range(0, 16, 3))
def test_largest_norms_and_query_weights(number: int) -> None:
    for regime in ("normal", "subnormal", "raw"):
        step = started(case_of(number, torch.float32, regime))
        made = arrays(step)
        for mine, exact in (("key_norm", step.key_norm), ("value_norm", step.value_radius)):
            assert bool((made[mine] >= exact * (1 - 2.0**-29)).all() and (made[mine] <= exact * 1.001 + 1e-36).all())
        scale = step.encoded[0].scale.double().abs()
        l1, l2 = step.query.double().abs() @ scale.mT, (step.query.double().square() @ scale.square().mT).sqrt()
        up = 1 + (step.layer.widths[0] + 8) * 2.0**-23
        assert bool(((made["l1"] + step.layer.widths[0] * bounds.TINY) * up * made["top"] >= l1 * (1 - 1e-12)).all())
        root = step.layer.widths[0] ** 0.5 * 2.0**-60
        assert bool(((made["l2"].sqrt() + root) * up * made["top"] >= l2 * (1 - 1e-12)).all())


@pytest.mark.parametrize(("number", "dtype"), CASES)
def test_no_error_is_above_its_bound(number: int, dtype: torch.dtype) -> None:
    """Without slack, by the exact oracle: fast, with promotions, dense, under a layer's budget, with nothing enforced."""
    small = ("normal", "wild values", "lined values", "lined keys", "moderate bits")
    every: tuple[dict[str, Any], ...] = ({"rtol": 1.0}, {"rtol": 0.02}, {"policy": "naive"}, {"scope": "layer", "rtol": 0.1})
    for at, settings in enumerate(every):
        case = case_of(number, dtype, small[(number + at) % len(small)], **settings)
        verdict = examine(
            replace(case, query=case.query[:1], keys=case.keys[:1], values=case.values[:1], mask=first(case.mask))
        )
        assert verdict.breaches == []


def first(mask: Tensor | None) -> Tensor | None:
    """The mask of the first batch row."""
    return mask if mask is None or mask.dim() < 4 else mask[:1]


def test_what_is_not_a_number_is_never_within_a_budget() -> None:
    for number in (0, 1, 8, 12):
        clean = case_of(number, torch.float32, "normal", rtol=1e290, atol=1e290)
        for wrong in (math.nan, math.inf, -math.inf):
            for name in ("query", "keys", "values", "sinks"):
                part = getattr(clean, name)
                if part is None:
                    continue
                for place in (0, part.numel() // 2, -1):
                    other = part.clone()
                    other.view(-1)[place] = wrong
                    step = started(replace(clean, mask=None, **{name: other}))
                    assert step.fused is not None
                    output = step.fused.result.double()
                    met = step.fused.row_figure(6).bool()
                    assert bool(torch.isfinite(output).all(dim=-1)[met].all()), (name, wrong)
                    hurt = torch.zeros_like(met)
                    if name in ("keys", "values"):
                        unit = (place % part.numel()) // (part[0, 0].numel())
                        hurt.view(-1, met.shape[2])[unit] = True
                    assert not bool((met & hurt).any()), (name, wrong, place)


def test_sizes_that_do_not_fill_vectors_are_left_to_the_reference() -> None:
    for channels, width, bits, group in ((24, 32, 4, None), (32, 48, 4, None), (32, 24, 8, 0), (32, 64, 4, 8), (40, 64, 8, 32)):
        q, k, v = tensors("normal", torch.float32, 40, channels, width, 1, 1, 3)
        settings = {"value_bits": bits, "value_group": group, "kernel": "cpu", "rtol": 0.3}
        step = started(Case(q, k, v, settings=settings))
        assert step.fused is None and examine(Case(q, k, v, settings=settings)).breaches == []
    case = case_of(0)
    for other in (replace(case, softcap=0.0), replace(case, settings={**case.settings, "kernel": "reference"})):
        assert started(other).fused is None


def test_buffers_of_unlike_room_are_left_to_the_reference() -> None:
    case = case_of(3, torch.float32, "normal")
    step = started(case)
    layer = step.layer
    layer.forget()
    layer.store.keys["scale"].room = 50
    layer.store.keys["scale"].reserve(layer.store.keys["scale"].view, 0)
    assert step.fused is not None and not cpu.supports(step)
    exact = layer.exact[1]
    exact.room = exact.length + 99
    exact.reserve(exact.view, 0)
    wide, room = layer.store.keys["scale"].data, layer.store.keys["codes"].data
    assert wide is not None and room is not None
    layer.store.keys["scale"].data = wide[:, :, : room.shape[2]].contiguous()
    layer.forget()
    with full_precision("cpu"):
        again = DecodeStep(layer, step.call)
        again.first_pass()
    assert again.fused is not None and torch.equal(again.output, step.output) and torch.equal(again.bound, step.bound)


def test_a_step_inside_a_step_has_arrays_of_its_own() -> None:
    outer = started(case_of(1))
    before = {name: part.clone() for name, part in arrays(outer).items()}
    inner = started(case_of(6))
    assert outer.fused is not None and inner.fused is not None and inner.fused.scratch is not outer.fused.scratch
    assert all(torch.equal(part, before[name]) for name, part in arrays(outer).items())
    assert_like_bounds(outer)
    del outer, inner
    third = started(case_of(6))
    assert third.fused is not None and scratch.scratch_bytes() == third.fused.scratch.nbytes > 0


def test_the_default_device_is_of_no_matter() -> None:
    step = started(case_of(0))
    assert step.fused is not None
    with torch.device("meta"):
        fused = cpu.FusedStep(step)
    fused.run()
    assert torch.equal(fused.result, step.fused.result)


def served(number: int) -> bytes:
    """What a call gives, by its bits."""
    output, record, _ = run(case_of(number, torch.float32, "normal"))
    return output.numpy().tobytes() + np.asarray(record.bound).tobytes()


def test_two_threads_and_more_workers_give_the_same_bits() -> None:
    wanted = {number: served(number) for number in (1, 4, 9)}
    found: list[bool] = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threads = [threading.Thread(target=lambda n=n: found.extend(served(n) == wanted[n] for _ in range(5))) for n in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [True] * 15


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_computes_the_same() -> None:
    wanted = served(4)
    context = multiprocessing.get_context("fork")
    given, taken = context.Pipe()
    child = context.Process(target=lambda: taken.send_bytes(served(4)))
    child.start()
    assert given.poll(60) and given.recv_bytes() == wanted
    child.join(10)


def test_flushed_subnormal_numbers() -> None:
    """The calling thread flushes, workers do not: bounds hold either way."""
    with flushing(True) as able:
        if not able:
            pytest.skip("this processor does not flush")
        for number in (0, 4, 9, 11):
            for regime in ("subnormal", "normal"):
                assert examine(case_of(number, torch.float32, regime, rtol=2.0)).breaches == []
