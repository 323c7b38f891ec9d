"""What is recorded: complete, within the tolerance, mergeable, at constant memory, and without traces of failed steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BareCache, cache_state, generate, new_cache, prompt, random_states, shared_model
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_certkv.decode
import hf_certkv.shadow
from hf_certkv import CertifiedQuantizedCache, CertKVConfig, HostMemoryError
from hf_certkv.certificate import (
    METRICS,
    WAITING,
    Distribution,
    LayerSummary,
    Recorder,
    StepRecord,
    bin_edge,
    bin_of,
)
from hf_certkv.errors import CorruptedPageError
from hf_certkv.ladder import Rung

LENGTH, STEPS = 330, 12
HEADS, KV_HEADS = 4, 2


def run(kind: str = "llama", dtype: torch.dtype = torch.float32, batch: int = 1, **options: Any) -> Any:
    """A cache after a generation with records."""
    arguments = options.pop("arguments", {})
    model = shared_model(kind, dtype)
    cache = new_cache(model, **options)
    generate(model, prompt(LENGTH, batch), STEPS, cache, **arguments)
    cache.report()
    return cache


SETTINGS: list[dict[str, Any]] = [
    {},
    {"rtol": 0.0},
    {"rtol": 0.01},
    {"rtol": 0.5},
    {"rtol": 0.0, "atol": 0.05},
    {"scope": "layer"},
    {"scope": "layer", "rtol": 0.01},
    {"value_bits": 8, "refine": "off"},
    {"policy": "paper"},
    {"hot_blocks": 2, "rtol": 0.01},
    {"block_size": 16, "dense_head_share": 0.2, "dense_layer_share": 0.9},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_rungs_sum_to_head_steps(changes: dict[str, Any], batch: int) -> None:
    cache = run(batch=batch, audit=True, **changes)
    report = cache.report().to_dict()
    total = batch * HEADS * (STEPS - 1)
    for layer in report["layers"].values():
        assert sum(layer["rungs"].values()) == layer["head_steps"] == total
        assert layer["calls"] == STEPS - 1
        assert len(layer["heads"]) == HEADS
        for rung, count in layer["rungs"].items():
            assert sum(head["rungs"][rung] for head in layer["heads"]) == count
        for head in layer["heads"]:
            assert sum(head["rungs"].values()) == batch * (STEPS - 1)
            bounds = [head["relative"][name] for name in ("bound", "dense_bound")]
            assert sum(figures["count"] for figures in bounds if figures) == batch * (STEPS - 1)
            dense = head["rungs"]["dense_head"] + head["rungs"]["dense_layer"]
            assert (bounds[1]["count"] if bounds[1] else 0) == dense
    assert set(report["layers"]) == {"0", "1"}
    assert report["overall"]["head_steps"] == 2 * total
    assert sum(report["overall"]["rungs"].values()) == 2 * total
    assert math.isclose(sum(report["overall"]["rung_share"].values()), 1.0)
    for figure in ("promoted_key_blocks", "promoted_value_blocks", "bytes_moved", "calls"):
        assert report["overall"][figure] == sum(layer[figure] for layer in report["layers"].values())


@pytest.mark.parametrize("record", ["summary", "full"])
@pytest.mark.parametrize("changes", [{}, {"rtol": 0.0}, {"audit": True}], ids=str)
def test_to_dict_is_json(record: str, changes: dict[str, Any], tmp_path: Any) -> None:
    cache = run(record=record, **changes)
    data = cache.report().to_dict()
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text) == data
    assert ("records" in data) == (record == "full")
    cache.report().to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == data
    assert CertKVConfig.from_dict(data["settings"]) == cache.settings


def test_to_dict_is_json_before_anything_happened() -> None:
    cache = new_cache(shared_model("llama"))
    data = cache.report().to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["overall"]["head_steps"] == 0
    assert "certificate" in str(cache.report())


def test_to_dict_is_json_with_nan_in_the_values() -> None:
    states = random_states(400)
    states[1][0, 0, 100, 0] = math.nan
    bare = BareCache(record="full")
    bare.update(*states)
    F.scaled_dot_product_attention(torch.randn(1, 4, 1, 64), *bare.update(*random_states(1, seed=1)), enable_gqa=True)
    data = bare.cache.report().to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["overall"]["head_steps"] == 4


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("audit", [False, True])
def test_full_records_have_every_layer_and_step(batch: int, audit: bool) -> None:
    cache = run(record="full", batch=batch, audit=audit)
    records = cache.recorder.records
    assert [(record.step, record.layer) for record in records] == [
        (step, layer) for step in range(1, STEPS) for layer in range(2)
    ]
    for record in records:
        for name in ("rung", "candidate", "bound", "expected", "norm", "error"):
            assert getattr(record, name).shape == (batch, HEADS, 1), name
        for name in ("key_blocks", "value_blocks"):
            assert getattr(record, name).shape == (batch, KV_HEADS), name
        assert np.isfinite(record.bound).all() and (record.bound > 0).all() and (record.norm > 0).all()
        assert np.isfinite(record.error).all() == audit
        if audit:
            assert (record.error <= record.bound).all()
        dense = record.rung >= Rung.DENSE_HEAD
        fast = record.rung == Rung.FAST
        # Nothing was raised for the group: the fast path's bound is the returned one. Otherwise it met the tolerance at once.
        raised = (record.key_blocks + record.value_blocks).repeat(HEADS // KV_HEADS, axis=1)[..., None] > 0
        assert (record.bound[fast & ~raised] == record.candidate[fast & ~raised]).all()
        assert (record.candidate[fast] <= 0.02 * 1.05 * record.norm[fast]).all()
        assert raised[(record.rung == Rung.KEYS) | (record.rung == Rung.VALUES)].all()
        assert (record.expected[dense] == 0).all()
    listed = cache.report().to_dict()["records"]
    assert len(listed) == len(records)
    assert np.array(listed[3]["bound"]).shape == (batch, HEADS, 1)


def test_full_records_of_several_positions() -> None:
    ids = prompt(24, seed=3).repeat(1, LENGTH)[:, :LENGTH]
    model = shared_model("llama")
    cache = new_cache(model, record="full", audit=True)
    generate(model, ids, STEPS, cache, prompt_lookup_num_tokens=4)
    cache.report()
    widths = {record.rung.shape[2] for record in cache.recorder.records}
    assert max(widths) > 1
    for record in cache.recorder.records:
        assert record.bound.shape == record.norm.shape == record.rung.shape == (1, HEADS, record.rung.shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rtol", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("atol", [0.0, 0.01])
def test_every_head_keeps_its_tolerance(rtol: float, atol: float, dtype: torch.dtype) -> None:
    cache = run(record="full", scope="head", rtol=rtol, atol=atol, dtype=dtype, batch=2, audit=True)
    certified = 0
    for record in cache.recorder.records:
        chosen = record.rung < Rung.DENSE_HEAD
        certified += int(chosen.sum())
        assert (record.bound[chosen] <= atol + rtol * record.norm[chosen]).all()
        assert not (record.rung == Rung.UNCERTIFIED).any()
    assert certified > 0


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 4}], ids=str)
@pytest.mark.parametrize("rtol", [0.01, 0.05, 0.3])
def test_every_layer_keeps_its_shared_tolerance(rtol: float, arguments: dict[str, Any]) -> None:
    """Scope "layer": the heads of one row and position together; heads served densely count with what they returned."""
    cache = run(record="full", scope="layer", rtol=rtol, arguments=arguments, audit=True)
    checked = 0
    for record in cache.recorder.records:
        together = np.sqrt((record.bound**2).sum(axis=1))
        allowed = rtol * np.sqrt((record.norm**2).sum(axis=1))
        mixed = (record.rung < Rung.DENSE_HEAD).any(axis=1)
        checked += int(mixed.sum())
        assert (together[mixed] <= allowed[mixed]).all()

    assert checked > 0


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_small_heads_are_spared_by_a_shared_tolerance(scope: str) -> None:
    """Heads whose output is tiny need not meet a share of their own where the tolerance is shared."""
    keys, values = random_states(400)
    new = random_states(1, seed=1)
    for part in (values, new[1]):
        part[:, 0] *= 1e-3
    for part in (keys, new[0]):
        part[:, 0] = 0.0  # equal weights: the quantised blocks count
    bare = BareCache(scope=scope, rtol=0.05, record="full", audit=True)
    bare.update(keys, values)
    F.scaled_dot_product_attention(torch.randn(1, 4, 1, 64), *bare.update(*new), enable_gqa=True)
    bare.cache.report()
    (record,) = bare.cache.recorder.records
    own = record.bound <= 0.05 * record.norm
    assert own[0, :2].all() == (scope == "head")
    assert (record.rung[0, :2] == Rung.FAST).all() == (scope == "layer")
    assert (record.rung < Rung.DENSE_HEAD).all()
    assert np.sqrt((record.bound**2).sum()) <= 0.05 * np.sqrt((record.norm**2).sum())


def test_a_shared_tolerance_counts_what_is_returned() -> None:
    """One head's fast path has a large output of nothing but error; served densely it is zero, and lends no room."""
    keys, values = random_states(400)
    new_keys, new_values = random_states(1, seed=1)
    signs = torch.tensor([1.0, -1.0]).repeat(200)
    values[:, 0] = 1000 * values[:, 0, ::2].repeat_interleave(2, 1) * signs[None, :, None]
    keys[:, 0], new_keys[:, 0], new_values[:, 0] = 0.0, 0.0, 0.0
    bare = BareCache(scope="layer", record="full", audit=True, dense_head_share=0.0, dense_layer_share=1.0)
    bare.update(keys, values)
    handles = bare.update(new_keys, new_values)
    F.scaled_dot_product_attention(torch.randn(1, 4, 1, 64), *handles, enable_gqa=True)
    bare.cache.report()
    (record,) = bare.cache.recorder.records
    assert (record.norm[0, :2] < 1e-3).all() and (record.rung[0, :2] >= Rung.DENSE_HEAD).all()
    together, allowed = np.sqrt((record.bound**2).sum()), 0.05 * np.sqrt((record.norm**2).sum())
    assert together <= allowed or (record.rung >= Rung.DENSE_HEAD).all()


def records_of(seed: int, count: int, heads: int = 3) -> list[StepRecord]:
    """Made-up records, some figures missing, some zero, some not finite."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(count):
        shape = (int(rng.integers(1, 3)), heads, int(rng.integers(1, 4)))
        figures = {name: 10.0 ** rng.uniform(-6, 1, shape) for name in ("candidate", "bound", "expected", "norm", "error")}
        figures["candidate"][rng.random(shape) < 0.2] = np.nan
        figures["error"][rng.random(shape) < 0.5] = np.nan
        figures["expected"][rng.random(shape) < 0.2] = 0.0
        rung = rng.integers(0, len(Rung), shape)
        blocks = rng.integers(0, 5, (2, shape[0], 2))
        counts = {"key_blocks": blocks[0], "value_blocks": blocks[1], "bytes_moved": 7}
        made.append(StepRecord(step, 0, rung, **figures, **counts, kernel=str(rng.choice(["cpu", "reference", "none"]))))
    return made


def summary_of(records: list[StepRecord], heads: int = 3) -> LayerSummary:
    """All records added to one summary."""
    summary = LayerSummary(heads)
    for record in records:
        summary.add(record)
    return summary


@pytest.mark.parametrize("parts", [(5, 20), (0, 25), (1, 1), (13, 12), (8, 9, 8)])
def test_merging_is_adding_everything(parts: tuple[int, ...]) -> None:
    records = records_of(1, sum(parts))
    merged, start = LayerSummary(3), 0
    for count in parts:
        merged.merge(summary_of(records[start : start + count]))
        start += count
    whole = summary_of(records)
    assert (merged.rungs == whole.rungs).all()
    for name in METRICS:
        ours, theirs = merged.metrics[name], whole.metrics[name]
        assert (ours.count == theirs.count).all() and (ours.bins == theirs.bins).all()
        assert (ours.largest == theirs.largest).all()
        np.testing.assert_allclose(ours.total, theirs.total, rtol=1e-12)
    for name in ("key_blocks", "value_blocks", "bytes_moved", "calls", "kernels"):
        assert getattr(merged, name) == getattr(whole, name)
    assert whole.bytes_moved == 7 * sum(parts) and whole.calls == sum(parts)


def one_by_one(records: list[StepRecord], heads: int = 3) -> LayerSummary:
    """What a summary is, written down plainly: one record, metric and head after the other."""
    summary = LayerSummary(heads)
    for record in records:
        for name, values in record.relative().items():
            metric = summary.metrics[name]
            for head in range(heads):
                flat = values[:, head].ravel()
                known = ~np.isnan(flat)
                metric.count[head] += known.sum()
                metric.total[head] += np.where(known, flat, 0.0).sum()
                metric.largest[head] = max(metric.largest[head], flat[known].max(initial=0.0))
                for place in bin_of(flat[known]):
                    metric.bins[head, place] += 1
        for rung in Rung:
            summary.rungs[:, rung] += (record.rung == rung).sum(axis=(0, 2))
        summary.key_blocks += int(record.key_blocks.sum())
        summary.value_blocks += int(record.value_blocks.sum())
        summary.bytes_moved += record.bytes_moved
        summary.kernels[record.kernel] += 1
    return summary


KERNELS: list[tuple[str, dict[str, Any], str]] = [
    ("cpu", {}, "cpu"),
    ("cpu", {"audit": True}, "cpu"),
    ("cpu", {"value_group": 7}, "reference"),  # for which there is no compiled code
    ("reference", {}, "reference"),
    ("cpu", {"rtol": 0.0}, "none"),
]


@pytest.mark.parametrize(("kernel", "changes", "expected"), KERNELS, ids=str)
def test_which_kernel_ran(kernel: str, changes: dict[str, Any], expected: str) -> None:
    if kernel == "cpu":
        pytest.importorskip("numba")
    cache = run(**{"kernel": kernel, "rtol": 0.5, "record": "full", **changes})
    for one in (cache, copy.deepcopy(cache)):
        data = one.report().to_dict()
        assert data["overall"]["kernels"] == {expected: 2 * (STEPS - 1)}
        assert data["layers"]["1"]["kernels"] == {expected: STEPS - 1}
        assert {record["kernel"] for record in data["records"]} == {expected}
    shown = {"none": "none (dense at once)"}.get(expected, expected)
    assert f"calls by kernel: {shown} {2 * (STEPS - 1)}" in str(cache.report())


def assert_identical(ours: LayerSummary, theirs: LayerSummary) -> None:
    """The same figures, bit for bit."""
    assert (ours.rungs == theirs.rungs).all() and ours.rungs.dtype == theirs.rungs.dtype
    for name in METRICS:
        for part in ("count", "total", "largest", "bins"):
            a, b = getattr(ours.metrics[name], part), getattr(theirs.metrics[name], part)
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), (name, part)
    for name in ("key_blocks", "value_blocks", "bytes_moved", "calls", "kernels"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_records_that_wait_give_the_figures_of_one_by_one(count: int, alike: bool) -> None:
    """However many wait, whenever someone looks, and although steps fail in between."""
    rng = np.random.default_rng(count)
    records = records_of(count, count, heads=5)
    if alike:
        records = [record for record in records if record.rung.shape == records[0].rung.shape]
    quiet, asked = Recorder(full=False), Recorder(full=True)
    for recorder in (quiet, asked):
        for step, record in enumerate(records):
            recorder.add(dataclasses.replace(record, layer=step % 2))
            if rng.random() < 0.2:
                recorder.discard()
                recorder.add(dataclasses.replace(record, layer=step % 2))
            recorder.commit()
            recorder.step += int(rng.random() < 0.9)
            if recorder is asked and rng.random() < 0.1:
                assert sum(summary.calls for summary in recorder.layers.values()) == step + 1
                asked = recorder = copy.deepcopy(recorder)
    for recorder in (quiet, asked):
        assert max(len(waiting) for waiting in recorder._waiting.values()) < 2 * WAITING
        for layer, summary in recorder.layers.items():
            assert_identical(summary, one_by_one(records[layer::2], 5))
        assert not any(recorder._waiting.values())
    assert len(asked.records) == len(records) and quiet.records == []


def test_a_layer_whose_step_never_ends_does_not_keep_its_records() -> None:
    recorder, (record,) = Recorder(full=False), records_of(0, 1)
    recorder.step = 1  # not its turn
    for _ in range(5 * WAITING):
        recorder.add(record)
        recorder.commit()
        assert len(recorder._waiting[0]) < 2 * WAITING
    assert recorder.layers[0].calls == 5 * WAITING


def test_a_record_shares_no_memory_with_the_step() -> None:
    """What a step computed in may be used by the next one."""
    bare, steps = BareCache(record="full"), []
    bare.update(*random_states(400))
    original = hf_certkv.decode.step_record

    def kept(step: Any, error: torch.Tensor) -> StepRecord:
        steps.append((step, error))
        return original(step, error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_certkv.decode, "step_record", kept)
        F.scaled_dot_product_attention(torch.randn(1, 4, 1, 64), *bare.update(*random_states(1, seed=1)), enable_gqa=True)
    (record,) = bare.cache.recorder._pending
    before = record.to_dict()
    step, error = steps[0]
    for part in (step.bound, step.candidate, step.expected, step.norm, error, step.key_level, step.met_at_once, step.dense):
        part.fill_(1)
    assert record.to_dict() == before and set(before["rung"][0][0]) <= set(range(6))


def test_adding_does_not_change_what_is_merged_in() -> None:
    first, second = summary_of(records_of(1, 4)), summary_of(records_of(2, 4))
    kept = copy.deepcopy(second)
    first.merge(second)
    first.add(records_of(3, 1)[0])
    assert second.to_dict() == kept.to_dict()


@pytest.mark.parametrize("full", [True, False])
def test_recorders_add_up(full: bool) -> None:
    """Layers that both have, and layers of one of them; every record only where all are kept."""
    parts = [records_of(seed=seed, count=4) for seed in (1, 2)]
    recorders = [Recorder(full), Recorder(True)]
    for recorder, records in zip(recorders, parts, strict=True):
        for record in records:
            recorder.add(record)
        recorder.commit()
        recorder.materialised, recorder.exact_queries, recorder.repaired, recorder.step = {"matmul": 2}, 5, 1, 7
    only = dataclasses.replace(parts[1][0], layer=9)
    recorders[1].add(only)
    recorders[1].commit()
    theirs = copy.deepcopy(recorders[1].layers)
    recorders[0].merge(recorders[1])
    ours = recorders[0]
    assert ours.materialised == {"matmul": 4} and (ours.exact_queries, ours.repaired, ours.step) == (10, 2, 15)
    for layer in {record.layer for records in parts for record in records}:
        mine = [[record for record in records if record.layer == layer] for records in parts]
        expected = summary_of(mine[0])
        expected.merge(summary_of(mine[1]))
        assert_identical(ours.layers[layer], expected)
    assert_identical(ours.layers[9], summary_of([only]))
    ours.layers[9].merge(summary_of([only]))  # it is a copy: what was added stays as it was
    for layer, summary in theirs.items():
        assert_identical(recorders[1].layers[layer], summary)
    assert len(ours.records) == (9 if full else 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(1e-13, 9e5, allow_nan=False), min_size=1, max_size=60),
    st.sampled_from([("p50", 0.5), ("p90", 0.9), ("p99", 0.99)]),
)
def test_quantiles_are_above_the_true_ones_and_near(values: list[float], which: tuple[str, float]) -> None:
    """The smallest value with at least this share at or below it, and at most 16 % more."""
    distribution = Distribution(1)
    for value in values:
        distribution.add(np.array([[[value]]]))
    summary = distribution.summary()
    assert summary is not None
    name, share = which
    ordered = sorted(values)
    true = ordered[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    assert true <= summary[name] * (1 + 1e-12)
    assert summary[name] <= 1.16 * true
    assert summary["max"] == ordered[-1] and summary["count"] == len(values)
    assert math.isclose(float(summary["mean"]), sum(values) / len(values), rel_tol=1e-9)


def test_quantiles_of_real_records() -> None:
    cache = run(record="full", batch=2)
    for index, summary in cache.recorder.layers.items():
        records = [record for record in cache.recorder.records if record.layer == index]
        shares = np.concatenate([(record.bound / record.norm).ravel() for record in records])
        figures = summary.metrics["bound"].summary()
        assert figures is not None and figures["count"] == len(shares)
        assert figures["max"] == shares.max()
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            true = np.quantile(shares, share, method="inverted_cdf")
            assert true <= figures[name] <= 1.16 * true


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(1e-13, 9e5))
def test_a_value_lies_in_its_bin(value: float) -> None:
    place = int(bin_of(np.array(value)))
    assert bin_edge(place - 1) <= value * (1 + 1e-12) and value <= bin_edge(place) * (1 + 1e-12)


def test_what_is_not_a_number_is_told_apart() -> None:
    distribution = Distribution(1)
    distribution.add(np.array([[[math.nan, math.nan]]]))
    assert distribution.summary() is None
    distribution.add(np.array([[[0.0, 1.0, 2.0]]]))
    summary = distribution.summary()
    assert summary is not None and summary["count"] == 3 and summary["max"] == 2.0


def recorder_size(cache: CertifiedQuantizedCache) -> int:
    """Bytes that the records take."""
    return len(pickle.dumps(cache.recorder))


def test_summaries_take_constant_memory() -> None:
    sizes = {}
    for record in ("summary", "full"):
        bare = BareCache(record=record)
        bare.update(*random_states(400))
        query, measured = torch.randn(1, 4, 1, 64), []
        for step in range(30):
            F.scaled_dot_product_attention(query, *bare.update(*random_states(1, seed=step)), enable_gqa=True)
            if step in (9, 29):
                bare.cache.report()
                measured.append(recorder_size(bare.cache))
        sizes[record] = measured
        assert (len(bare.cache.recorder.records) == 30) == (record == "full")
        assert bare.cache.report().to_dict()["overall"]["head_steps"] == 120
    assert abs(sizes["summary"][1] - sizes["summary"][0]) < 64
    assert sizes["full"][1] - sizes["full"][0] > 20 * 200


@pytest.mark.parametrize("record", ["summary", "full"])
def test_a_failed_step_leaves_no_record(record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 has attended and recorded when layer 1 fails: nothing of the step remains."""
    model, ids = shared_model("llama"), prompt(400)
    cache = new_cache(model, record=record, block_size=16)
    real, failures = hf_certkv.shadow.allocate_host, 0

    def refuse(count: int, pinned: bool) -> torch.Tensor:
        raise MemoryError("none left")

    with torch.no_grad():
        model(ids[:, :300], past_key_values=cache, use_cache=True)
        for i in range(300, 365):
            shadows = [layer.shadow for layer in cache.certified_layers]
            part = ids[:, i : i + 1]
            full = shadows[1].blocks == len(shadows[1].slabs) * shadows[1].rows_per_slab
            if full and cache.certified_layers[1].finished_blocks(i + 1) > shadows[1].blocks:
                before, held = cache.report().to_dict(), cache_state(cache)
                second = shadows[1]
                original = second._new_slab

                def failing(original: Any = original) -> Any:
                    monkeypatch.setattr(hf_certkv.shadow, "allocate_host", refuse)
                    try:
                        return original()
                    finally:
                        monkeypatch.setattr(hf_certkv.shadow, "allocate_host", real)

                monkeypatch.setattr(second, "_new_slab", failing)
                with pytest.raises(HostMemoryError):
                    model(part, past_key_values=cache, use_cache=True)
                monkeypatch.setattr(second, "_new_slab", original)
                failures += 1
                after = cache.report().to_dict()
                assert after["overall"] == before["overall"] and after["layers"] == before["layers"]
                assert after.get("records") == before.get("records")
                assert [state["length"] for state in cache_state(cache)] == [state["length"] for state in held] == [i, i]
            model(part, past_key_values=cache, use_cache=True)
    assert failures > 0
    assert cache.report().to_dict()["overall"]["head_steps"] == 65 * 2 * HEADS


def test_exact_calls_count_when_their_step_is_over() -> None:
    """A call of more tokens than are certified has no record; its head-steps are counted, unless its step fails."""
    bare = BareCache(certify_queries=4, record="full")
    bare.update(*random_states(400))
    recorder = bare.cache.recorder
    F.scaled_dot_product_attention(torch.randn(1, HEADS, 8, 64), *bare.update(*random_states(8, seed=1)), enable_gqa=True)
    assert recorder.exact_queries == 0
    assert bare.cache.report().to_dict()["exact_head_steps"] == recorder.exact_queries == HEADS * 8
    F.scaled_dot_product_attention(torch.randn(1, HEADS, 6, 64), *bare.update(*random_states(6, seed=2)), enable_gqa=True)
    recorder.discard()
    assert bare.cache.report().to_dict()["exact_head_steps"] == HEADS * 8
    assert recorder.records == [] and recorder.layers == {}


class Late:
    """A record that is with a device until `arrive`; `damaged`: what the step met."""

    def __init__(self, record: StepRecord, damaged: bool = False) -> None:
        self.layer, self.record, self.damaged, self.there, self.waited = record.layer, record, damaged, False, 0

    def done(self) -> bool:
        return self.there

    def require_sound(self) -> None:
        if self.damaged:
            raise CorruptedPageError("a page")

    def fetch(self) -> StepRecord:
        self.waited += not self.there
        return self.record


@pytest.mark.parametrize("full", [False, True])
def test_records_of_a_device_are_fetched_when_somebody_asks(full: bool) -> None:
    """No step waits for them; figures and copies are those of records that came at once."""
    ours, theirs = Recorder(full), Recorder(full)
    late = [Late(record) for record in records_of(3, 5)]
    for held in late:
        ours.add(held)
        theirs.add(held.record)
        ours.commit()
        theirs.commit()
    assert not any(held.waited for held in late)
    assert len(ours.records) == (5 if full else 0)
    for layer, summary in ours.layers.items():
        assert_identical(summary, theirs.layers[layer])
    copied = copy.deepcopy(ours)
    assert [part.to_dict() for part in copied.records] == [part.to_dict() for part in ours.records]
    assert set(copied.layers) == set(theirs.layers)


def test_damage_that_a_device_met_is_told_by_a_later_step_or_a_report() -> None:
    """Once it is known, and once; a report waits for it."""
    recorder = Recorder(False)
    held = Late(records_of(3, 1)[0], damaged=True)
    recorder.add(held)
    recorder.commit()
    recorder.commit()
    held.there = True
    with pytest.raises(CorruptedPageError):
        recorder.commit()
    recorder.commit()
    recorder.add(Late(records_of(4, 1)[0], damaged=True))
    recorder.commit()
    with pytest.raises(CorruptedPageError):
        recorder.overall()
    assert recorder.overall().rungs.sum() > 0


def test_reports_are_snapshots() -> None:
    model = shared_model("llama")
    cache = new_cache(model, record="full")
    generate(model, prompt(LENGTH), 4, cache)
    report = cache.report()
    kept = copy.deepcopy(report.to_dict())
    with torch.no_grad():
        model(prompt(1), past_key_values=cache, use_cache=True)
    assert report.to_dict() == kept
    assert cache.report().to_dict()["overall"]["head_steps"] == kept["overall"]["head_steps"] + 2 * HEADS


def test_memory_is_counted() -> None:
    cache = run()
    memory = cache.report().to_dict()["memory"]
    tokens = LENGTH + STEPS - 1
    assert memory["dense_bytes"] == 2 * KV_HEADS * tokens * 128 * 4
    blocks = sum(layer.store.blocks for layer in cache.certified_layers)
    assert blocks == 2 * ((tokens - 128) // 64)
    assert memory["parts"]["codes"] >= blocks * KV_HEADS * 64 * (64 + 32)
    assert memory["host_bytes"] >= blocks * KV_HEADS * 64 * 128 * 4
    assert memory["device_bytes"] + memory["host_bytes"] == sum(memory["parts"].values())
    assert memory["device_bytes"] < memory["dense_bytes"]


def test_naive_records_say_uncertified() -> None:
    model = shared_model("llama")
    with pytest.warns(UserWarning, match="NOTHING"):
        cache = CertifiedQuantizedCache(model.config, settings=CertKVConfig.naive(record="full"))
    generate(model, prompt(LENGTH), STEPS, cache)
    report = cache.report().to_dict()
    assert report["certified"] is False
    assert report["overall"]["rungs"]["uncertified"] == report["overall"]["head_steps"] == 2 * HEADS * (STEPS - 1)
    assert "UNCERTIFIED" in str(cache.report())


@given(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=8), st.integers(0, 99))
def test_calls_with_other_numbers_of_heads_are_added(heads: list[int], seed: int) -> None:
    """As in layers that share keys and values: each head's figures are those of the calls that had it."""
    records = [records_of(seed + i, 1, count)[0] for i, count in enumerate(heads)]
    summary, alone = LayerSummary(heads[0]), []
    for count, record in zip(heads, records, strict=True):
        summary.add_any([record], count)
        alone.append(LayerSummary(count))
        alone[-1].add(record)
    assert summary.heads == max(heads) and summary.calls == len(heads)
    for head in range(max(heads)):
        parts = [part for part in alone if part.heads > head]
        assert np.array_equal(summary.rungs[head], sum(part.rungs[head] for part in parts))
        for name in METRICS:
            ours, theirs = summary.metrics[name], [part.metrics[name] for part in parts]
            assert ours.count[head] == sum(part.count[head] for part in theirs)
            assert ours.total[head] == pytest.approx(sum(part.total[head] for part in theirs), rel=1e-12)
            assert ours.largest[head] == max(part.largest[head] for part in theirs)
            assert np.array_equal(ours.bins[head], sum(part.bins[head] for part in theirs))
    assert summary.key_blocks == sum(part.key_blocks for part in alone)
    assert summary.bytes_moved == sum(part.bytes_moved for part in alone)
