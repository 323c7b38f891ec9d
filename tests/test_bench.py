"""`certkv bench`: what it measures and how it says so. Nothing here asserts a time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache
from typer.testing import CliRunner

from benchmarks import performance_tables, speed
from benchmarks.tables import load
from hf_certkv import CertifiedQuantizedCache, CertKVConfig, InputError
from hf_certkv.bench import attention_op, memory, run, stages, statistics, systems
from hf_certkv.bench.harness import MOST_CALLS, Timer
from hf_certkv.bench.model import build_model, model_config
from hf_certkv.bench.options import BenchOptions
from hf_certkv.bench.plots import QUESTIONS, draw_all
from hf_certkv.bench.report import document, sections, speed_block, unavailable
from hf_certkv.bench.systems import DYNAMIC, all_systems, by_format
from hf_certkv.bench.traces import TRACES, errors, exact_attention, make_trace, statistics_of
from hf_certkv.cache import storage_bytes
from hf_certkv.cli import app

CPU = torch.device("cpu")
PLACE = {"context": 1024, "head_dim": 64, "batch": 1, "layers": 1}


class FakeClock:
    """Seconds that pass only when something says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def candidates(clock: FakeClock, log: list[str], **seconds: float) -> dict[str, Any]:
    def make(name: str, cost: float) -> Any:
        def call() -> None:
            log.append(name)
            clock.now += cost

        return call

    return {name: make(name, cost) for name, cost in seconds.items()}


def test_timer_warms_up_then_interleaves_in_an_order_of_its_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        clock, log = FakeClock(), []
        timer = Timer(rounds=20, warmup=2, seed=seed, clock=clock)
        samples = timer.run(candidates(clock, log, a=1.0, b=2.0, c=3.0))
        assert log[:6] == ["a", "b", "c"] * 2  # warm-up, untimed
        rounds = [log[6 + 3 * i : 9 + 3 * i] for i in range(20)]
        assert all(sorted(names) == ["a", "b", "c"] for names in rounds)  # each has its turn in every round
        assert len({tuple(names) for names in rounds}) > 1  # not always in the same order
        assert samples.seconds == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [3.0] * 20}
        orders.append(log)
    assert orders[0] == orders[1] != orders[2]


def test_timer_repeats_short_calls_only_where_it_may() -> None:
    for repeatable, short in ((True, MOST_CALLS), (False, 1)):
        clock, log = FakeClock(), []
        samples = Timer(rounds=1, warmup=1, clock=clock).run(candidates(clock, log, a=2.0**-20, b=1.0), repeatable)
        assert log.count("a") == 1 + short and log.count("b") == 2
        assert samples.seconds == {"a": [2.0**-20], "b": [1.0]}


def test_timer_waits_for_the_device_before_and_after_a_sample() -> None:
    clock, log = FakeClock(), []

    def synchronize() -> None:
        clock.now += 5.0 if log and log[-1] == "a" else 0.0  # what was queued takes its time only now
        log.append("wait")

    samples = Timer(rounds=1, warmup=0, clock=clock, synchronize=synchronize).run(candidates(clock, log, a=1.0))
    assert log == ["wait", "a", "wait"] and samples.seconds == {"a": [6.0]}


def test_timer_leaves_out_a_peer_that_fails_and_raises_what_is_ours() -> None:
    clock, log = FakeClock(), []
    calls = candidates(clock, log, good=1.0)
    turns = iter([None, None])

    def failing() -> None:
        if next(turns, StopIteration) is StopIteration:
            raise RuntimeError("no\nkernel")

    samples = Timer(rounds=3, warmup=1, clock=clock).run({**calls, "bad": failing}, tolerated=["bad"])
    assert samples.failed == {"bad": "RuntimeError: no kernel"}
    assert list(samples.seconds) == ["good"] and len(samples.seconds["good"]) == 3
    with pytest.raises(RuntimeError, match="kernel"):
        Timer(rounds=1, clock=clock).run({"bad": failing})

    def ours() -> None:
        raise InputError("ours")

    with pytest.raises(InputError, match="ours"):
        Timer(rounds=1, clock=clock).run({"bad": ours}, tolerated=["bad"])


def test_statistics() -> None:
    found = statistics.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "n": 5}
    with pytest.raises(ValueError, match="at least one"):
        statistics.summary([])
    assert statistics.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"] == 2.0
    sizes = [2048, 8192, 32768]
    assert statistics.exponent(sizes, [3e-9 * size**1.25 for size in sizes]) == pytest.approx(1.25, abs=1e-12)
    assert statistics.exponent([2048, 2048], [1.0, 2.0]) is None


@pytest.mark.parametrize("channels", [64, 128])
def test_traces_have_the_statistics_they_state(channels: int) -> None:
    tokens = 2048
    found = {name: statistics_of(make_trace(name, tokens, heads=2, query_heads=8, channels=channels)) for name in TRACES}
    diffuse, concentrated, outliers = (found[name] for name in TRACES)
    assert diffuse["effective_tokens"] > 0.8 * tokens and diffuse["top_share"] < 0.15
    assert concentrated["effective_tokens"] < 0.02 * tokens and 0.8 < concentrated["top_share"] <= 1.0
    assert 18 < outliers["key_channel_ratio"] < 24
    assert diffuse["key_channel_ratio"] < 1.2 and concentrated["key_channel_ratio"] < 1.2
    for one in found.values():
        assert 0.7 < one["value_mean_ratio"] < 1.3


def test_traces_are_seeded_and_refuse_what_they_cannot_be() -> None:
    first, same, other = (make_trace("diffuse", 64, heads=2, query_heads=4, channels=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.keys, same.keys) and torch.equal(first.query, same.query)
    assert not torch.equal(first.values, other.values)
    with pytest.raises(InputError, match="'even'"):
        make_trace("even", 64)
    with pytest.raises(InputError, match="at least 32"):
        make_trace("diffuse", 16)


def test_exact_attention_is_torchs_in_float64() -> None:
    trace = make_trace("outliers", 200, batch=2, heads=2, query_heads=6, channels=32)
    query, keys, values = (part.double() for part in (trace.query, trace.keys, trace.values))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert errors(expected, exact_attention(trace))["max"] < 1e-12


def test_systems_run_with_the_settings_they_record() -> None:
    found = {system.name: system for system in all_systems()}
    assert next(iter(found)) == DYNAMIC and len(found) == 13
    for backend in ("quanto", "hqq"):
        described = found[f"QuantizedCache {backend}"].settings
        assert described["nbits"] == 4 and described["residual_length"] == 128
    config = model_config(64, 1)
    for name, system in found.items():
        if system.kind == systems.OURS:
            assert system.make(config).settings == CertKVConfig.from_dict(system.settings), name
    assert {system.name for system in all_systems(quick=True)} < set(found)
    assert {system.name for system in by_format(list(found.values())) if system.kind == systems.OURS} == {
        "fast path K8 V4", "fast path K8 V8"
    }  # fmt: skip


def test_a_system_that_is_missing_or_broken_says_why() -> None:
    missing = systems.System("gone", systems.PEER, DynamicCache, ("no-such-package", "no_such_package.inner"))
    assert "no-such-package is not installed" in str(missing.unavailable(CPU))

    def broken(config: Any) -> Any:
        raise RuntimeError("needs a compiler")

    assert systems.System("broken", systems.PEER, broken).unavailable(CPU) == "RuntimeError: needs a compiler"
    assert missing.describe("why")["available"] is False
    assert all_systems()[0].unavailable(CPU) is None


def test_counted_bytes_look_into_wrapped_tensors() -> None:
    plain = torch.zeros(10, dtype=torch.float32)
    assert storage_bytes([plain, {"view": plain[:3]}, (torch.zeros(2, dtype=torch.int8), 5)]) == 42
    masked = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)], layout=torch.jagged)  # a tensor made of tensors
    assert storage_bytes(masked) >= 32


def test_too_little_memory_means_groups_and_then_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, dense = all_systems(), 1000
    everything = memory.needed(found, dense, 2.0)
    for free, groups in ((2 * everything, 1), (everything, 2), (0, 0)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
        made = memory.groups(found, dense, 2.0, CPU)
        assert len(made) == groups
        if groups == 2:
            assert all(group[0].name == DYNAMIC for group in made)
            assert [one.name for group in made for one in group[1:]] == [system.name for system in found[1:]]
            assert all(memory.needed(group, dense, 2.0) <= memory.USABLE * free for group in made)
    assert "GiB are free" in str(memory.too_large(2**40, CPU))
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert memory.groups(found, dense, 2.0, CPU) == [found] and memory.too_large(2**60, CPU) is None


def test_the_certificates_share_is_of_a_whole_call() -> None:
    assert stages.certificate_share(dict.fromkeys(("pass", "certificate", "record", "around"), 0.0)) is None
    assert stages.certificate_share({"pass": 2.5, "certificate": 0.5, "record": 0.5, "around": 0.5}) == 0.25
    trace = make_trace("diffuse", 1024, heads=2, query_heads=4, channels=64)
    cache = CertifiedQuantizedCache(model_config(64, 1), rtol=1e6)
    cache.update(trace.keys[..., :-1, :], trace.values[..., :-1, :], 0)
    keys, values = cache.update(trace.keys[..., -1:, :], trace.values[..., -1:, :], 0)
    seconds = stages.stage_seconds(lambda: scaled_dot_product_attention(trace.query, keys, values, enable_gqa=True), calls=2)
    assert list(seconds) == ["pass", "certificate", "record", "around"]
    assert seconds["pass"] > 0 and seconds["record"] > 0


def test_the_error_judged_is_of_the_call_whose_bound_is_read() -> None:
    trace = make_trace("diffuse", 1024, heads=2, query_heads=4, channels=64)
    cache = CertifiedQuantizedCache(model_config(64, 1), rtol=0.02)
    cache.update(trace.keys[..., :-1, :], trace.values[..., :-1, :], 0)
    keys, values = cache.update(trace.keys[..., -1:, :], trace.values[..., -1:, :], 0)
    before = cache.report().to_dict()["overall"]["head_steps"]

    def call() -> Any:
        return attention_op.attend(trace.query, keys, values, enable_gqa=True)

    output, share = attention_op.judge(cache, call, exact_attention(trace))
    assert output.shape == trace.query.shape and 0 < share <= 1
    assert cache.report().to_dict()["overall"]["head_steps"] == before + 4
    assert not cache.recorder.full and cache.recorder.records == []


def tiny(**changes: Any) -> BenchOptions:
    preset: dict[str, Any] = {
        "contexts": (320, 640), "head_dims": (64,), "batches": (1, 2), "prefills": (320,), "long": 512, "quality_context": 300,
        "audited_steps": 2, "rounds": 2, "what": ("attention", "decode", "prefill", "quality"), "layers": 1, "quick": True,
    }  # fmt: skip
    return BenchOptions(**{**preset, **changes})


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A tiny run of every system, one of which cannot be had and one of which fails on the way."""
    found = all_systems(quick=True)
    place = next(i for i, system in enumerate(found) if "hqq" in system.name)
    found[place] = dataclasses.replace(found[place], needs=("no-such-package", "no_such_package"))

    class Failing(DynamicCache):
        def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if key_states.shape[-2] == 640:
                raise RuntimeError("out of room")
            return super().update(key_states, *args, **kwargs)

    found.append(systems.System("short", systems.PEER, lambda config: DynamicCache(config=config), None, {}, 640, "is slow"))
    found.append(systems.System("failing", systems.PEER, lambda config: Failing(config=config)))
    threads = torch.get_num_threads()
    made = run.run(tiny(threads=1), systems=found)
    assert torch.get_num_threads() == threads
    return json.loads(json.dumps(made, allow_nan=False))


def test_a_run_says_where_with_what_and_how(result: dict[str, Any]) -> None:
    machine = result["machine"]
    assert machine["torch"] == torch.__version__ and machine["threads"] == 1 and "commit" in machine
    assert result["options"] == tiny(threads=1).to_dict()
    assert set(result["load"]) == set(result["seconds"]) == {"attention", "decode", "prefill", "quality"}
    assert set(result["parts"]) == {"attention", "layer", "decode", "prefill", "quality"}
    by_name = {one["name"]: one for one in result["systems"]}
    assert by_name["QuantizedCache hqq"]["available"] is False
    assert "no-such-package is not installed" in by_name["QuantizedCache hqq"]["reason"]
    assert by_name["fast path K8 V4"]["settings"]["rtol"] == systems.ANY_TOLERANCE
    assert all(one["seed"] == 0 and one["effective_tokens"] > 1 for one in result["traces"])
    assert {one["name"] for one in result["traces"]} == set(TRACES)


def test_every_part_has_a_row_for_every_system_and_shape(result: dict[str, Any]) -> None:
    available = {one["name"] for one in result["systems"] if one["available"]}
    for part in ("layer", "decode"):
        for context in (320, 640):
            for batch in (1, 2):
                names = [
                    row["system"] for row in result["parts"][part]["rows"]
                    if (row["context"], row["batch"]) == (context, batch) and row["trace"] == "diffuse"
                ]  # fmt: skip
                expected = available - ({"short"} if context * batch > 640 else set())
                assert set(names) == expected and len(names) == len(expected)
    left_out = [one for one in result["skipped"] if one["part"] == "decode"]
    assert [(one["system"], one["context"], one["batch"]) for one in left_out] == [("short", 640, 2)]
    assert left_out[0]["reason"] == "is slow (640 tokens at most on a CPU)"
    for part in result["parts"].values():
        for row in part["rows"]:
            if row["system"] == "failing" and row["context"] == 640:
                assert "out of room" in row["failed"] and "seconds" not in row
            else:
                assert row["seconds"]["n"] == 2 and 0 < row["seconds"]["q1"] <= row["seconds"]["median"]
    assert {row["model"] for row in result["parts"]["quality"]["rows"]} == {"prose", "retriever"}


def test_certified_rows_carry_share_bytes_bound_and_true_error(result: dict[str, Any]) -> None:
    certified = [row for row in result["parts"]["attention"]["rows"] if "fast_share" in row]
    assert {row["system"] for row in certified} == {"naive K8 V4", "fast path K8 V4", "rtol 0.05 K8 V4"}
    for row in certified:
        assert row["fast_share"] + row["raised_share"] + row["dense_share"] == pytest.approx(1.0)
        assert row["error"]["max"] > 0 and row["error_over_bound_max"] <= 1
        assert row["bytes_moved_per_call"] >= 0
        if not row["system"].startswith("rtol"):
            assert row["fast_share"] == 1.0 and row["bytes_moved_per_call"] == 0
    fastest = [row["system"] for row in result["parts"]["attention"]["rows"] if row.get("fastest_dense")]
    assert len(fastest) == 2 * len({(row["context"], row["batch"], row["trace"]) for row in certified})
    for row in result["parts"]["quality"]["rows"]:
        if row["system"].startswith(("rtol", "fast")):
            assert row["violations"] == 0 and row["audited_steps"] == 2 and row["audited_error"]["count"] > 0
    grown = {(one["system"], one["batch"]) for one in result["parts"]["decode"]["growth"]}
    assert ("fast path K8 V4", 1) in grown and (DYNAMIC, 2) in grown and ("failing", 1) not in grown


def test_tables_plots_and_the_readme_come_from_the_result(result: dict[str, Any], tmp_path: Path) -> None:
    measured = json.loads(json.dumps(result))
    measured["parts"]["memory"] = {"rows": [
        {"context": 640, "head_dim": 64, "batch": 1, "layers": 1, "system": DYNAMIC, "dense_bytes": 100, "predicted": None,
         "counted": {"device_bytes": 100, "host_bytes": 0}, "resident_bytes": 120, "peak_above_before_bytes": 200,
         "fill_seconds": 0.1, "step_seconds": 0.01},
        {"context": 640, "head_dim": 64, "batch": 1, "layers": 1, "system": "failing", "dense_bytes": 100, "predicted": None,
         "failed": "no memory"},
    ]}  # fmt: skip
    plots = draw_all(measured, tmp_path)
    assert set(plots) == {f"{name}.{ending}" for name in QUESTIONS for ending in ("png", "svg")}
    assert all((tmp_path / name).stat().st_size > 1000 for name in plots)
    page = document(measured, plots)
    for section in sections(measured):
        assert f"## {section.title}" in page and all(len(row) == len(section.header) for row in section.rows)
    assert "not measured: QuantizedCache hqq: no-such-package is not installed" in page
    assert "failed in decode at 640 tokens: failing: RuntimeError: out of room" in page
    assert "failed in memory at 640 tokens: failing: no memory" in unavailable(measured)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    speed.write_documents(measured, tmp_path / "page.md", tmp_path / "pictures", readme)
    text = readme.read_text()
    assert "old" not in text and speed_block(measured) in text and text.endswith("after\n")
    assert "pictures/decode.svg" in (tmp_path / "page.md").read_text() and (tmp_path / "pictures" / "decode.svg").exists()


def test_the_cost_model_is_filled_from_results(result: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(performance_tables.DOCUMENT.read_text())
    measured = json.loads(json.dumps(result))
    ours = ("bench", "bench_prefill")
    missing = performance_tables.write(page, lambda name: None if name in ours else load(name))
    assert [line.split(":")[0] for line in missing] == ["block growth", "block tolerance", "block prefill"]
    assert performance_tables.write(page, lambda name: measured if name in ours else load(name)) == []
    text = page.read_text()
    for name in performance_tables.BLOCKS:
        part = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
        assert part.startswith("| ") and part.count("\n") >= 3, name
    assert performance_tables.tolerance_table(measured) in text


def test_a_plot_without_data_is_not_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    empty = {**result, "parts": {"decode": {"rows": []}}}
    assert draw_all(empty, tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert sections(empty) == []


def test_the_model_is_the_same_for_the_same_seed() -> None:
    state = torch.get_rng_state()
    models = [build_model(64, 1, CPU, seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    first, same, other = (model.lm_head.weight for model in models)
    assert first.dtype == torch.bfloat16 and torch.equal(first, same) and not torch.equal(first, other)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    system = next(one for one in all_systems() if one.name == "fast path K8 V4")
    row, reason = memory.measure(system, PLACE, tiny())
    assert reason is None
    assert row["counted"] == row["predicted"] or row["counted"]["device_bytes"] == pytest.approx(
        row["predicted"]["device_bytes"], rel=0.05
    )
    if row["trimmed"] and row["resident_bytes"] is not None:  # nothing of note that is not counted
        assert abs(row["resident_bytes"] - sum(row["counted"].values())) < 2**25
    assert row["peak_above_before_bytes"] > 0 and row["step_seconds"] > 0


def test_a_process_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        return subprocess.CompletedProcess(args, 1, "", "Traceback\nMemoryError: no room\n")

    monkeypatch.setattr(memory.subprocess, "run", failing)
    row, _ = memory.measure(all_systems()[0], PLACE, tiny())
    assert row["failed"] == "MemoryError: no room" and row["dense_bytes"] == 2 * 8 * 1024 * 64 * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--what", "speed"], ["--what speed", "attention"]),
        (["--what", ","], ["--what"]),
        (["--contexts", "2048,many"], ["--contexts '2048,many'", "2048,8192"]),
        (["--contexts", "16"], ["--contexts 16", "256"]),
        (["--head-dim", "63"], ["--head-dim", "even"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--rounds", "0"], ["--rounds 0"]),
        (["--threads", "0"], ["--threads 0"]),
        (["--json", "no/folder/x.json"], ["no/folder"]),
        (["--out", "file/inside"], ["--out file/inside"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_misuse_is_one_line(arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    done = CliRunner().invoke(app, ["bench", *arguments])
    lines = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_line() -> None:
    done = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert done.exit_code == 2 and "no CUDA device" in done.stderr


def test_the_command_writes_json_page_and_plots(tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy.json"
    done = CliRunner().invoke(
        app, ["bench", "--quick", "--what", "prefill", "--contexts", "256,300", "--head-dim", "64", "--rounds", "1",
              "--threads", "1", "--out", str(out), "--json", str(copy)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"bench.json", "bench.md", "prefill.png", "prefill.svg"}
    written = json.loads((out / "bench.json").read_text())
    assert written == json.loads(copy.read_text())
    assert written["options"]["prefills"] == [256, 300] and list(written["parts"]) == ["prefill"]
    assert "Prefill" in done.stdout and DYNAMIC in done.stdout and "## Prefill" in (out / "bench.md").read_text()
