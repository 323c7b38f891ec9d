"""The scripts that are for a GPU, as dry runs on a CPU: that they run, count and check right. Nothing here asserts a time."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from transformers import DynamicCache

from benchmarks import gpu_attention, gpu_costs, gpu_decode, gpu_exp, gpu_long, gpu_tables
from benchmarks.gpu_common import DeviceTimer, Part, draw, filling, host_syncs, replay, served, settings, with_rtol
from benchmarks.gpu_model import InPlaceLayer, build, in_place, model_config, steps
from hf_certkv import CertifiedQuantizedCache, store
from hf_certkv.bench.traces import TRACES, make_trace, statistics_of
from hf_certkv.ladder import Rung

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "COMPILED", False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts of a dry run, as they lie in one file."""
    out = tmp_path_factory.mktemp("gpu")
    before, store.COMPILED = store.COMPILED, False
    try:
        for script in (gpu_attention, gpu_costs, gpu_decode, gpu_long):
            with pytest.raises(typer.Exit) as end:
                script.main(device="cpu", out=out, kernel="reference", rounds=2)
            assert end.value.exit_code == 0, script
    finally:
        store.COMPILED = before
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "profile.txt"]
    assert "scaled_dot_product" in (out / "profile.txt").read_text()
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    assert set(found["parts"]) == {"attention", "costs", "decode", "long"}
    return found


def test_attention_is_served_by_the_fast_path_within_its_bound(results: dict[str, Any]) -> None:
    rows = results["parts"]["attention"]["rows"]
    ours = [row for row in rows if row["system"].startswith("fast path")]
    assert [row["system"] for row in ours] == ["fast path K8 V4", "fast path K8 V8"]
    for row in ours:
        assert row["fast_share"] == 1 and row["kernels"].keys() == {"reference"} and 0 < row["error_over_bound"] <= 1
        assert row["error"]["max"] < 0.05
    dense = [row for row in rows if row["system"].startswith("dense")]
    assert len(dense) == len(gpu_attention.BACKENDS) * len(gpu_attention.FORMS)
    timed = [row for row in dense if "failed" not in row]
    fastest = [row for row in timed if row["fastest_dense"]]
    assert len(fastest) == 1 and fastest[0]["seconds"]["median"] == min(row["seconds"]["median"] for row in timed)
    for row in [*timed, *ours]:
        assert row["bytes_per_second"]["max"] == pytest.approx(row["bytes"] / row["seconds"]["min"])
    sizes = {row["system"].split(", ")[-1]: row["bytes"] for row in timed}
    assert sizes["grouped"] == sizes["packed"] == 2 * 8 * 512 * 128 * 2 and sizes["repeated"] == 4 * sizes["packed"]
    # A token and KV head: codes and what belongs to them; the exact tokens on top.
    assert 150 * 8 * 512 < ours[0]["bytes"] < ours[1]["bytes"] < 2 * 8 * 512 * 128 * 2


def test_every_form_of_dense_attention_is_the_same_attention() -> None:
    traces = [draw(80, CPU, seed=0, dtype=torch.float32)]
    outputs = [gpu_attention.dense_calls(traces, "math", form)[0]() for form in gpu_attention.FORMS]
    for output in outputs[1:]:
        assert torch.allclose(outputs[0], output, atol=1e-5)


def test_layers_in_rotation_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "l2_bytes", lambda device: 60 * 2**20)
    counts = {tokens: gpu_attention.layers_for(tokens, CPU) for tokens in (8192, 32768, 131072)}
    assert counts == {8192: 18, 32768: 5, 131072: 2}  # 218.9 bytes a token and head: 14.3 MB a layer of 8192 tokens


def test_costs_are_of_what_was_promoted(results: dict[str, Any]) -> None:
    (found,) = results["parts"]["costs"]["contexts"]
    pinned, hot, heads = found["pinned"], found["hot"], found["dense_heads"]
    assert pinned["all_pages"] == 2 * 8 * ((512 - 64 - 64) // 64)
    for point in pinned["points"]:
        assert point["pages_share"] >= point["wanted"] and point["dense_share"] == 0
        assert (point["pages"] == 0) == (point["bytes_moved"] == 0)
        # Originals only, of 64 tokens and 128 channels: nothing is raised to a plane.
        assert point["bytes_moved"] == point["pages"] * 64 * 128 * 2
    assert pinned["points"][0]["pages"] == 0 and pinned["points"][-1]["pages"] > 0
    for point in hot["points"][1:]:
        assert point["hot_pages"] >= point["pages"] > 0 and point["promoted_beside_hot"] == 0
    assert [point["heads"] for point in heads["points"]] == [0, 1, 2, 4, 7]
    assert heads["whole_layer"]["dense_share"] == 1


def test_a_line_is_fitted_to_what_left_the_fast_path_only() -> None:
    def point(count: int, seconds: float) -> dict[str, Any]:
        return {"pages": count, "seconds": {"median": seconds}, "dense_seconds": {"median": 20.0}}

    points = [point(0, 1.0), point(2, 5.0 + 2 * 0.5), point(10, 5.0 + 10 * 0.5)]
    line = gpu_costs.fit(points, "pages")
    assert (line["each_seconds"], line["fixed_seconds"]) == pytest.approx((0.5, 5.0)) and line["worst_residual"] < 1e-9
    assert gpu_costs.break_even(points, line, whole=100) == pytest.approx(0.3)  # 5 + 0.5 * 30 = 20
    assert gpu_costs.break_even(points, {**line, "fixed_seconds": 21.0}, 100) is None
    assert gpu_costs.fit(points[:2], "pages")["each_seconds"] is None


def test_decode_and_long_rows_say_what_was_served(results: dict[str, Any]) -> None:
    rows = {row["system"]: row for row in results["parts"]["decode"]["rows"]}
    assert list(rows) == ["DynamicCache", "dense, in place", "fast path K8 V4"]
    ours = rows["fast path K8 V4"]
    assert ours["fast_share"] == 1 and ours["materialised"] == {} and ours["block_step_seconds"] > 0
    assert ours["memory"]["dense_bytes"] > ours["device_bytes"] > 0 and ours["host_bytes"] > 0
    wide = results["parts"]["long"]
    assert wide["layers"] == 2 and wide["stopped_by"] == "all layers" and wide["tokens"] == 1024
    besides = wide["besides_the_layers_seconds"]["median"]
    for row in wide["rows"]:
        one = (row["seconds"]["median"] - besides) / 2
        assert row["extrapolated"]["layers"] == 32 and row["extrapolated"]["seconds"] == pytest.approx(besides + 32 * one)


def test_the_cache_in_place_gives_what_the_dynamic_one_gives() -> None:
    config = model_config(CPU, 2)
    ours, theirs = in_place(config), DynamicCache(config=config)
    assert all(type(layer) is InPlaceLayer for layer in ours.layers)
    for count in (300, 1, 1, 3):
        for layer in range(2):
            states = torch.randn(1, 2, count, 64)
            found, expected = (cache.update(states, -states, layer) for cache in (ours, theirs))
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert ours.get_seq_length() == theirs.get_seq_length()
    # A step writes into the room that there is: what earlier steps returned stays where it is.
    assert found[0].data_ptr() == ours.layers[1].room[0].data_ptr()


def test_long_fill_ends_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config(CPU, 4)
    cache = CertifiedQuantizedCache(config, settings=settings("reference", rtol=1e6))
    count, why, _ = gpu_long.fill_some(cache, 512, config, CPU, seconds=0.0, layers=4, host=0)
    assert (count, why, len(cache.layers)) == (1, "time", 1)
    model = build(model_config(CPU, count), CPU)
    with torch.inference_mode():
        assert steps(model, cache)().isfinite().all() and steps(model, cache)().shape == (1, 1, model.config.vocab_size)
    assert cache.get_seq_length() == 514 and served(cache)["fast_share"] == 1
    cache = CertifiedQuantizedCache(config, settings=settings("reference"))
    free = iter((10, 10, 3))
    monkeypatch.setattr(gpu_long, "host_bytes", lambda: next(free))
    count, why, _ = gpu_long.fill_some(cache, 512, config, CPU, seconds=1e9, layers=4, host=5)
    assert (count, why, len(cache.layers)) == (3, "host memory", 3)


def test_drawn_on_the_device_as_the_diffuse_trace() -> None:
    ours, theirs = statistics_of(draw(2048, CPU, seed=1)), statistics_of(make_trace(TRACES[0], 2048, seed=1))
    for name in ("effective_tokens", "top_share", "key_channel_ratio", "value_mean_ratio"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.1), name
    again = draw(100, CPU, seed=3)
    assert torch.equal(again.keys, draw(100, CPU, seed=3).keys) and not torch.equal(again.keys, draw(100, CPU, seed=4).keys)


def test_another_tolerance_counts_at_once() -> None:
    held = gpu_attention.Held([draw(512, CPU, seed=0)], CPU, "reference")
    assert served(held.cache)["head_steps"] == 0
    exact = held.calls[0]()
    assert served(held.cache)["fast_share"] == 1
    with_rtol(held.cache, 1e-5)
    record = gpu_costs.record_of(held)
    assert ((record.rung == Rung.DENSE_HEAD) | (record.rung == Rung.DENSE_LAYER)).all()
    with_rtol(held.cache, 1e6)
    assert (gpu_costs.record_of(held).rung == Rung.FAST).all() and torch.equal(held.calls[0](), exact)


def test_blocks_filled_in_large_pieces_are_the_same_blocks() -> None:
    def codes(large: bool) -> Tensor:
        cache = CertifiedQuantizedCache(model_config(CPU, 1), settings=settings("reference"))
        trace = draw(700, CPU, seed=0, heads=2, query_heads=4, channels=64)
        if large:
            with filling():
                cache.update(trace.keys, trace.values, 0)
        else:
            cache.update(trace.keys, trace.values, 0)
        return cache.certified_layers[0].store.keys["codes"].view

    before = store.ENCODE_NUMBERS
    assert torch.equal(codes(True), codes(False)) and before == store.ENCODE_NUMBERS


def test_without_a_gpu_calls_are_plain() -> None:
    log: list[int] = []
    found = replay([lambda: log.append(1), lambda: log.append(2)], CPU)
    assert log == [] and found.way.startswith("plain calls") and found.outputs == []
    found.call()
    assert log == [1, 2] and host_syncs(lambda: log.append(3), CPU) is None


class FakeCuda:
    """What the timing uses of torch.cuda: a clock that the calls move on, and graphs that note what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waits: int = 0, capture: Exception | None = None) -> None:
        self.now, self.log, self.capturing, self.capture, self.waits = 0.0, [], False, capture, waits
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        class Stream:
            def __init__(self, device: Any = None) -> None: ...

            def wait_stream(self, other: Any) -> None: ...

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")

        @contextmanager
        def graph(made: Graph, capture_error_mode: str) -> Iterator[None]:
            fake.capturing = True
            try:
                yield
            finally:
                fake.capturing = False

        given = {
            "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "synchronize": lambda *args: None,
            "current_stream": Stream, "stream": lambda stream: nullcontext(), "_sleep": lambda cycles: self.log.append("sleep"),
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": self.debug,
        }  # fmt: skip
        for name, part in given.items():
            monkeypatch.setattr(torch.cuda, name, part, raising=False)
        self.debugging = False

    def debug(self, mode: str | int) -> None:
        self.debugging = mode == "warn"

    def call(self) -> Tensor:
        if self.capturing and self.capture is not None:
            raise self.capture
        for _ in range(self.waits if self.debugging else 0):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        self.now += 0.5
        self.log.append("capture" if self.capturing else "call")
        return torch.zeros(1)


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    found = replay([fake.call, fake.call], torch.device("cuda"))
    assert found.way == "graph" and len(found.outputs) == 2
    assert fake.log.count("capture") == 2 and fake.log[-1] == "replay"
    fake.log.clear()
    found.call()
    assert fake.log == ["replay"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"waits": 3}, "loop: 3.0 waits"),
        ({"capture": RuntimeError("not permitted")}, "loop: capture failed: RuntimeError: not permitted"),
    ],
)
def test_calls_that_wait_or_cannot_be_captured_are_looped(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], words: str
) -> None:
    fake, restored = FakeCuda(monkeypatch, **wrong), []
    found = replay([fake.call], torch.device("cuda"), lambda: restored.append(1))
    assert found.way.startswith(words) and found.outputs == [] and len(restored) == ("failed" in words)
    fake.log.clear()
    found.call()
    assert fake.log == ["call"]


def test_the_device_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    samples = DeviceTimer(torch.device("cuda"), rounds=3, warmup=1).run(
        {"a": fake.call, "b": lambda: (fake.call(), fake.call())}
    )
    assert samples.seconds == {"a": [0.5] * 3, "b": [1.0] * 3}
    # What is timed is queued while the device is busy with something else.
    assert all(
        before == "sleep" for before, at in zip(fake.log, fake.log[1:], strict=False) if at == "call" and before != "call"
    )


def test_a_problem_is_kept_and_the_other_parts_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Part("first", CPU, tmp_path, {"rows": [1.0, float("nan")]}).save()
    part = Part("second", CPU, tmp_path)
    with part.attempt("a context"):
        raise RuntimeError("out of\nmemory")
    part.check(True, "all is well")
    with pytest.raises(typer.Exit) as end:
        part.close()
    assert end.value.exit_code == 1 and "PROBLEM: a context: RuntimeError: out of memory" in capsys.readouterr().out
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["first"] == {"rows": [1.0, None], "problems": []}
    assert parts["second"]["problems"] == ["a context: RuntimeError: out of memory"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_no_gpu_is_said_at_once(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for script in (gpu_attention, gpu_costs, gpu_decode, gpu_long):
        with pytest.raises(typer.BadParameter, match="no CUDA device"):
            script.main(device="cuda", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_float32_of_the_domain_is_counted_once() -> None:
    total = gpu_exp.patterns()
    ends = (
        torch.tensor([gpu_exp.MINUS_ZERO - 2**32, gpu_exp.MINUS_ZERO - 2**32 + total - 1]).to(torch.int32).view(torch.float32)
    )
    assert ends.tolist() == [-0.0, -104.0] and torch.signbit(ends[0])
    seen: list[Tensor] = []

    def apply(which: int, x: Tensor) -> Tensor:
        seen.append(x)
        return torch.exp(x.double()).float().where(x >= -87.3365, torch.zeros(()))

    found = gpu_exp.single(apply, CPU, chunk=1000, stride=100_003)
    every = torch.cat(seen[:-1])
    assert found["patterns"] == len(every) == len(every.unique()) == -(-total // 100_003)
    assert bool((every[1:] < every[:-1]).all()) and found["over_unit"] <= 1.01 and found["wrong"] == 0


def test_wrong_exponentials_are_noticed() -> None:
    def off(which: int, x: Tensor) -> Tensor:
        exact = torch.exp(x.double()) if which < 2 else torch.expm1(x)
        return (exact * (1 + 2.0**-20)).to(x.dtype)

    def lost(which: int, x: Tensor) -> Tensor:
        return torch.exp(x).where(x > -3, torch.full((), torch.nan, dtype=x.dtype))

    single, double = gpu_exp.single(off, CPU, 1000, 100_003), gpu_exp.double(off, CPU, 1000, 2000)
    assert single["largest_relative_error"] > gpu_exp.MOST_SINGLE and single["largest_value"] > 1
    assert min(double[name]["largest_relative_error"] for name in ("exp64", "expm1_64")) > gpu_exp.MOST_DOUBLE
    assert gpu_exp.single(lost, CPU, 1000, 100_003)["wrong"] > 0
    assert not gpu_exp.double(lost, CPU, 1000, 2000)["exp64"]["largest_relative_error"] < 1


def test_exponentials_of_the_kernels_are_as_exact_as_the_certificate_says(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_exp",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]  # the interpreter's process
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]["exp"]
    assert found["exp32"]["over_unit"] <= 4 and found["exp32"]["exact_at_zero"] and found["problems"] == []
    assert max(found["float64"][name]["largest_relative_error"] for name in ("exp64", "expm1_64")) < 2.0**-46


def test_tables_state_figures_of_a_gpu_only(results: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in gpu_tables.BLOCKS))
    for found in (None, results):  # a dry run counts for nothing
        gpu_tables.write(page, found)
        text = page.read_text()
        assert "old" not in text and text.count(gpu_tables.NONE) == len(gpu_tables.BLOCKS)
    shown = {"device": "cuda", "gpu": "NVIDIA X", "gpu_bytes": 2**37, "multiprocessors": 132, "l2_bytes": 60 * 2**20}
    wide = {"points": 9, "exp64": {"largest_relative_error": 2e-16}, "expm1_64": {"largest_relative_error": 3e-16}}
    exp = {"exp32": {"patterns": 8, "of": 9, "over_unit": 1.25}, "float64": wide}
    machine = {**results["machine"], **shown, "commit": None}
    gpu_tables.write(page, {"machine": machine, "parts": {**results["parts"], "exp": exp}})
    text = page.read_text()
    assert gpu_tables.NONE not in text and gpu_tables.MISSING not in text
    for words in (
        "NVIDIA X: 128.0 GiB",
        "All checks passed",
        "| fast path K8 V4 |",
        "a KV head served densely",
        "does not take it",
    ):
        assert words in text, words
    gpu_tables.write(page, {"machine": {**results["machine"], **shown}, "parts": {"exp": {}, "long": {"rows": []}}})
    assert page.read_text().count(gpu_tables.MISSING) == len(gpu_tables.BLOCKS) - 1


def test_results_of_several_calls_are_put_together(tmp_path: Path) -> None:
    for name, parts in (("a", {"x": 1, "y": 1}), ("b", {"y": 2})):
        (tmp_path / name).write_text(json.dumps({"parts": parts, "machine": {"commit": "c", "date": name}}))
    (tmp_path / "other").write_text(json.dumps({"parts": {}, "machine": {"commit": "d"}}))
    found = gpu_tables.together([tmp_path / "a", tmp_path / "b"])
    assert found == {"parts": {"x": 1, "y": 2}, "machine": {"commit": "c", "date": "b"}}
    with pytest.raises(ValueError, match="expected one commit"):
        gpu_tables.together([tmp_path / "a", tmp_path / "other"])


@pytest.mark.parametrize(("failing", "status"), [("", 0), ("gpu_attention", 1)])
def test_one_part_that_fails_does_not_stop_the_others(tmp_path: Path, failing: str, status: int) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *benchmarks.{failing or "none"}*) exit 3;; esac\nexit 0\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(fake), "OUT": str(out), "DEVICE": "cpu", "BUDGET": "500"}
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status, done.stdout
    calls = (tmp_path / "calls").read_text()
    order = [
        "gpu_exp",
        "gpu_attention",
        "gpu_costs",
        "gpu_decode",
        "gpu_long",
        "benchmarks.device",
        "verify",
        "bench --device",
        "eval needle",
    ]
    places = [calls.index(name) for name in order]
    assert places == sorted(places)
    log = (out / "log.txt").read_text()
    assert log == done.stdout and log.count("\nok ") == 11 - status
    assert ("FAILED: attention" in log) == bool(failing) and ("FAILED attention: status 3" in log) == bool(failing)


def test_no_time_left_is_a_failure(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "DEVICE": "cpu", "BUDGET": "5", "PARTS": "exp costs"}
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and done.stdout.rstrip().endswith("FAILED: exp costs")
