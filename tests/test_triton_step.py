"""The Triton kernels of a step: sums against float64, certificate against bounds.py, bound against the oracle.

In Triton's interpreter, or on the device that CERTKV_TEST_DEVICE names.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from where import DEVICE

pytest.importorskip("triton")

import triton_twin
from triton_twin import discrepancies, inputs_of, started

from hf_certkv import bounds
from hf_certkv.certificate import StepRecord
from hf_certkv.errors import CorruptedPageError
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.kernels import triton_certify
from hf_certkv.kernels.triton_step import format_of, stored
from hf_certkv.ladder import Rung
from hf_certkv.verify.cases import Case, examine, fill, mask_of, new_cache, run, tensors

# Value bits and group, block, channels of keys and values, query heads a KV head, positions, mask.
SHAPES: list[tuple[int, int | None, int, int, int, int, int, str]] = [
    (4, None, 16, 64, 64, 1, 1, "none"),
    (4, 16, 32, 32, 32, 2, 1, "bool"),
    (4, 32, 64, 96, 64, 4, 1, "alibi"),
    (4, 0, 16, 80, 48, 3, 1, "none"),
    (4, 32, 16, 16, 128, 5, 2, "heads"),
    (4, 16, 16, 128, 32, 2, 5, "rows"),
    (8, None, 16, 64, 64, 1, 1, "none"),
    (8, 0, 128, 32, 16, 2, 1, "inf"),
    (8, 16, 64, 96, 48, 4, 1, "none"),
    (8, 32, 32, 128, 96, 1, 1, "-1e9"),
    (8, 0, 16, 64, 80, 8, 2, "padding"),
    (4, 64, 16, 64, 256, 3, 1, "window"),
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
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def case_of(number: int, regime: str | None = None, **settings: Any) -> Case:
    """A case of the tables above."""
    bits, group, block, channels, width, groups, positions, mask = SHAPES[number % len(SHAPES)]
    other: dict[str, Any] = dict(OTHERS[number % len(OTHERS)])
    batch, heads, dtype = 1 + number % 2, 1 + (number // 2) % 2, DTYPES[number % 3]
    tokens = block * (2 + number % 2) + positions + 5 + (block + 37 if "recent_window" in other else 0)
    regime = regime or REGIMES[number % len(REGIMES)]
    q, k, v = tensors(regime, dtype, tokens, channels, width, batch, positions, 100 + number, heads, groups)
    generator = torch.Generator().manual_seed(number)
    sinks = torch.randn(heads * groups, generator=generator).to(dtype) if other.pop("sinks", False) else None
    added = mask_of(mask, dtype, batch, positions, tokens, number, heads * groups)
    scale, softcap = other.pop("scale", None), other.pop("softcap", None)
    made = {"block_size": block, "value_bits": bits, "value_group": group, "kernel": "triton", "rtol": 0.3, **other, **settings}
    return Case(q, k, v, added, scale, softcap, sinks, made).to(torch.device(DEVICE))


@pytest.fixture(autouse=True)
def _on_the_device() -> Any:
    """Tensors that the twins make lie where the kernels run."""
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_sums_and_certificate(number: int) -> None:
    """After whatever was promoted: sums are within section 5 of float64's, bounds are those of bounds.py."""
    assert discrepancies(started(case_of(number))) == []


@pytest.mark.parametrize("number", [0, 1, 6, 7])
@pytest.mark.parametrize("regime", ["raw", "large", "subnormal"])
def test_the_certificate_of_odd_numbers(number: int, regime: str) -> None:
    if regime == "raw" and number % 3 == 1:
        regime = "large"  # float16 has no room for such numbers
    assert discrepancies(started(case_of(number, regime))) == []


@pytest.mark.parametrize("power", [-30, -12, 12, 30])
def test_the_certificate_at_any_size(power: int) -> None:
    """Values of any size, keys of the other: squares overflow and underflow."""
    case = case_of(0, "normal")
    size = 10.0**power
    assert discrepancies(started(replace(case, values=case.values * size))) == []
    assert discrepancies(started(replace(case, keys=case.keys / size, query=(case.query * size).float()))) == []


@pytest.mark.parametrize("refine", ["off", "device", "host"])
@pytest.mark.parametrize("number", [0, 1, 8])
def test_promotions(number: int, refine: str) -> None:
    """Blocks are raised until the tolerance is met, through planes where there are some; sums are those of raised blocks."""
    case = case_of(number, "normal", refine=refine, rtol=0.02, dense_head_share=1.0)
    device = started(case)
    assert discrepancies(device) == []
    key_level, value_level, _ = triton_twin.levels(device)
    assert bool((key_level > 0).any() | (value_level > 0).any())
    assert raised_as_the_reference(device)


def raised_as_the_reference(device: Any) -> bool:
    """Whether raised blocks have the sums that the reference gives them at their levels."""
    from hf_certkv.codecs import token_steps
    from hf_certkv.kernels import reference

    step, layer, made = device.step, device.layer, triton_twin.arrays(device)
    given = (step.scaled, *step.encoded, step.exact_keys, step.exact_values, step.block_bias, step.exact_bias)
    other = reference.decode_pass(*given, layer.key_codec, layer.value_codec, step.call.softcap)
    key_level, value_level, _ = triton_twin.levels(device)
    index = torch.nonzero((key_level > 0) | (value_level > 0), as_tuple=True)
    parts = []
    for kind, level in ((KEYS, key_level), (VALUES, value_level)):
        levels = level[index].view(-1, 1, 1)
        part = layer.shadow.read_pages(kind, *index).float()
        for at in range((layer.key_codec, layer.value_codec)[kind].levels):
            decoded = layer.store.decode(("keys", "values")[kind], at, index, layer.widths[kind])
            part = torch.where(levels == at, decoded, part)
        parts.append(part)
    steps = token_steps(step.encoded[1].scale[index])
    reference.redo_blocks(other, index, step.scaled, parts[0], parts[1], steps, step.block_bias, step.call.softcap)
    room = torch.expm1(8 * step.slack.amax()) + 1e-5
    rows, heads, blocks = index
    for which, theirs in ((4, other.total), (5, other.square), (2, other.sums[..., 2])):
        x, y = (part[rows, heads, :, blocks].double() for part in (made["sums"][..., which], theirs))
        if not bool(((x - y).abs() <= room * y.abs() + 1e-30).all()):
            return False
    return True


def test_a_choice_is_what_the_tolerance_needs() -> None:
    """No more is promoted than `ladder.choose` promotes, by more than a block; a wider tolerance takes no more."""
    counts = []
    for rtol in (0.01, 0.05, 0.3):
        _, record, _ = run(case_of(0, "normal", rtol=rtol, dense_head_share=1.0))
        other = run(case_of(0, "normal", rtol=rtol, dense_head_share=1.0, kernel="reference"))[1]
        mine, theirs = (int(r.key_blocks.sum() + r.value_blocks.sum()) for r in (record, other))
        assert mine <= theirs + 1
        counts.append(mine)
    assert counts == sorted(counts, reverse=True) and counts[0] > 0


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_bounds_hold_against_the_oracle(number: int) -> None:
    verdict = examine(case_of(number, rtol=(0.3, 0.02)[number % 2]))
    assert verdict.breaches == [] and verdict.head_steps > 0


@pytest.mark.parametrize("number", [0, 5, 7, 10])
def test_a_tolerance_that_no_promotion_meets_is_served_densely(number: int) -> None:
    """All heads on the dense rung: their outputs are those of exact attention, their bounds those of rounding."""
    case = case_of(number, "normal", rtol=1e-12)
    output, record, _ = run(case)
    assert (record.rung == int(Rung.DENSE_HEAD)).all() and record.kernel == "triton"
    assert record.bytes_moved > 0
    other, _, _ = run(replace(case, settings={**case.settings, "kernel": "reference"}))
    room = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.query.dtype]
    assert bool(((output - other).float().norm(dim=-1) <= room * other.float().norm(dim=-1) + 1e-6).all())


def test_some_heads_dense_leave_the_others_alone() -> None:
    """A KV head whose values are wild goes to the dense rung; the outputs of the other are what they were."""
    case = case_of(2, "normal", rtol=0.3, dense_head_share=0.0)
    keys = case.keys.clone()
    keys[:, 1] *= 30
    _, before, _ = run(case)
    output, record, _ = run(replace(case, keys=keys))
    groups = case.query.shape[1] // 2
    assert (record.rung[:, groups:] == int(Rung.DENSE_HEAD)).all()
    assert (record.rung[:, :groups] == before.rung[:, :groups]).all()
    same, _, _ = run(case)
    assert torch.equal(output[:, :groups], same[:, :groups])


def test_naive_promotes_nothing_and_says_so() -> None:
    case = case_of(0, "normal", policy="naive")
    output, record, _ = run(case)
    assert (record.rung == int(Rung.UNCERTIFIED)).all()
    assert record.key_blocks.sum() == record.value_blocks.sum() == record.bytes_moved == 0
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_a_number_is_never_certified(where: str, number: float) -> None:
    case = case_of(0, "normal")
    parts = {"query": case.query.clone(), "key": case.keys.clone(), "value": case.values.clone()}
    parts[where][0, 0, 0 if where == "query" else 20, 3] = number
    output, record, _ = run(replace(case, query=parts["query"], keys=parts["key"], values=parts["value"]))
    touched = np.isin(record.rung, [int(Rung.DENSE_HEAD)])
    assert touched[0, 0].all()
    if where != "key" or math.isnan(number):  # a key of infinite size may just weigh nothing
        assert not bool(torch.isfinite(output[0, 0]).all())


@pytest.mark.parametrize("kind", [KEYS, VALUES])
def test_a_damaged_page_is_told_and_gives_nothing(kind: int) -> None:
    """Outputs that needed it are NaN, and the error comes when the record is looked at."""
    case = case_of(0, "normal", rtol=1e-12)
    cache = new_cache(case)
    handles = fill(cache, case)
    (layer,) = cache.certified_layers
    assert layer.shadow is not None
    layer.shadow.flush()
    layer.shadow.slabs[0].pages[kind][1, 0, 0].view(torch.int32)[0, 0] ^= 1 << 7
    from hf_certkv.attention import AttentionCall, attend

    output = attend(AttentionCall(case.query, *handles, case.mask, scale=case.scale, enable_gqa=True))
    assert bool(output[0, 0].isnan().all())
    with pytest.raises(CorruptedPageError, match=r"block 1 .*no longer match their checksum"):
        cache.recorder.commit()


def test_a_record_says_what_the_reference_says() -> None:
    """Shapes, norms and bounds of the right size, in the right places; figures of audit beside them."""
    for number in (2, 4, 10):
        settings = {"audit": True, "rtol": 0.3}
        _, mine, _ = run(case_of(number, "normal", **settings))
        case = case_of(number, "normal", **settings)
        _, theirs, _ = run(replace(case, settings={**case.settings, "kernel": "reference"}))
        assert isinstance(mine, StepRecord) and mine.kernel == "triton" and theirs.kernel == "reference"
        assert mine.bound.shape == theirs.bound.shape and mine.key_blocks.shape == theirs.key_blocks.shape
        both = (mine.rung == int(Rung.FAST)) & (theirs.rung == int(Rung.FAST))
        assert both.any()
        assert np.allclose(mine.norm[both], theirs.norm[both], rtol=1e-2)
        assert (mine.bound[both] < 2 * theirs.bound[both] + 1e-6).all() and (mine.bound[both] > 0.5 * theirs.bound[both]).all()
        assert np.isfinite(mine.error[both]).all() and (mine.error[both] <= mine.bound[both]).all()


def test_hot_blocks_are_read_from_their_slots() -> None:
    """Originals in hot slots are used from the start: a step then promotes nothing, and its bound is what promotions gave."""
    case = case_of(0, "normal", rtol=0.02, hot_blocks=4, refine="off", dense_head_share=1.0)
    cache = new_cache(case)
    handles = fill(cache, case)
    (layer,) = cache.certified_layers
    from hf_certkv.attention import AttentionCall, attend

    call = AttentionCall(case.query, *handles, case.mask, scale=case.scale, enable_gqa=True)
    first = attend(call)
    cache.recorder.commit()
    assert layer.promoted is not None
    layer.prefetch()
    second = attend(call)
    cache.recorder.commit()
    before, after = cache.recorder.records
    assert before.bytes_moved > 0 and after.bytes_moved == 0
    assert (after.rung == int(Rung.FAST)).all()
    assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_step_can_be_captured_in_a_graph() -> None:
    """A replay with another query gives what a call gives, promotions and dense heads included."""
    from hf_certkv.attention import AttentionCall, attend

    for rtol in (0.3, 0.02, 1e-12):
        case = case_of(0, "normal", rtol=rtol)
        cache = new_cache(case)
        handles = fill(cache, case)
        query = case.query.clone()
        call = AttentionCall(query, *handles, case.mask, scale=case.scale, enable_gqa=True)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                attend(call)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend(call)
        other = case.query.flip(-1)
        query.copy_(other)
        graph.replay()
        assert torch.equal(captured, attend(AttentionCall(other, *handles, case.mask, scale=case.scale, enable_gqa=True)))


def test_what_the_kernels_leave_to_others() -> None:
    """Formats without code, and calls of other kinds: another kernel serves them, and the record says so."""
    odd = case_of(0, "normal", value_group=24)
    assert stored(inputs_of(odd).layer) is None
    assert run(odd)[1].kernel != "triton"
    assert run(case_of(0, "normal", scope="layer"))[1].kernel != "triton"
    assert run(case_of(0, "normal", policy="paper"))[1].kernel != "triton"


def test_every_format_of_a_power_of_two_has_code() -> None:
    from hf_certkv.codecs import ValueCodec

    for bits in (4, 8):
        for width in (64, 96, 128, 256):
            for group in (0, 16, 32):
                form = format_of(ValueCodec(bits, group, False), width, 64)
                assert form is not None
                # Sums of codes by digits are whole numbers below 2^24.
                assert 64 * 2 ** (form.digit - 1) * (15 if bits == 4 else 255) < 2**24
    form = format_of(ValueCodec(8, 0, False), 128, 128)
    assert form is not None and 128 * 2 ** (form.digit - 1) * 255 < 2**24


def test_bounds_are_those_of_the_rows() -> None:
    """A facts' budget is `ladder.head_budget`, and rows within it are not promoted."""
    device = started(case_of(5, "normal"))
    bound, norm, met = (device.row_figure(getattr(triton_certify, name)) for name in ("CANDIDATE", "NORM", "MET"))
    config = device.step.config
    if not bool(device.counts[:, 6].any()):  # nothing was promoted: norms are those that candidates were compared with
        budget = (config.atol + config.rtol * norm) * (1 - 2.0**-30)
        assert torch.equal(met > 0, bounds.meets(bound, budget))


def test_a_mask_that_hides_everything_gives_zero_or_dense() -> None:
    """A row that may attend to nothing: what the dense rung gives, never a certified number."""
    case = case_of(0, "normal")
    mask = torch.zeros(case.query.shape[0], 1, 1, case.keys.shape[2], dtype=torch.bool)
    output, record, _ = run(replace(case, mask=mask))
    assert isinstance(output, Tensor) and (record.rung == int(Rung.DENSE_HEAD)).all()
