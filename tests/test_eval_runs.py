"""Runs of `certkv eval`: scores against a pass without a cache, evidence that adds up, and sessions that are interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache as memoised
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_certkv.cli import app
from hf_certkv.embedded import load_embedded, set_margin
from hf_certkv.errors import InputError
from hf_certkv.evaluation.caches import parse_all
from hf_certkv.evaluation.checkpoint import Checkpoint, Progress
from hf_certkv.evaluation.divergence import Divergence
from hf_certkv.evaluation.evidence import Evidence
from hf_certkv.evaluation.needle import Needle
from hf_certkv.evaluation.perplexity import Perplexity
from hf_certkv.evaluation.run import Run, strict
from hf_certkv.evaluation.runs import check_run
from hf_certkv.evaluation.task import Outcome, forward, read
from hf_certkv.evaluation.texts import Source
from hf_certkv.evaluation.trace import Trace
from hf_certkv.ladder import Rung

BOOK = " ".join(f"It was the {n}th evening, and the old man told the child of ship number {n * n}." for n in range(400))
SOURCE = Source(text=BOOK, file="book.txt")


@memoised
def prose() -> tuple[Any, Any]:
    return load_embedded("prose", dtype=torch.float32)


def measured(task: Any, piece: str, *caches: str, audit: bool = False) -> Outcome:
    specs = parse_all(list(caches))
    makers = {spec.name: (lambda spec=spec: spec.make(task.model.config, audit)) for spec in specs}  # type: ignore[misc]
    return task.measure(piece, makers)


def likelihood(model: Any, ids: torch.Tensor, scored: int) -> float:
    """Mean negative log likelihood of the last tokens, by one pass without any cache."""
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -scored:]))


@pytest.mark.parametrize("score_last", [24, None])
def test_perplexity_is_that_of_a_pass_without_a_cache(score_last: int | None) -> None:
    model, tokenizer = prose()
    task = Perplexity(model, tokenizer, SOURCE, (300,), 2, score_last)
    scored = score_last or 299
    assert task.steps == scored and task.pieces() == ["300/0", "300/1"]
    outcome = measured(task, "300/1", "exact=certified:rtol=0", "naive")
    scores = outcome.rows[0].scores
    assert scores["dense"]["score"] == pytest.approx(likelihood(model, task.windows[300][1:2], scored), rel=1e-5)
    assert (
        scores["exact"] == scores["dense"] == {**scores["dense"], "kl": 0.0, "kl_max": 0.0, "same_top": 1.0, "tokens": scored}
    )
    assert 0 < scores["naive"]["kl"] < scores["naive"]["kl_max"]
    assert outcome.decode_ms is not None and set(outcome.decode_ms) == {"dense", "exact", "naive"}


def test_every_scored_token_is_decoded_through_the_cache_and_compared_with_the_dense_one() -> None:
    model, tokenizer = prose()
    task = Perplexity(model, tokenizer, SOURCE, (320,), 1, 20, chunk=100)
    outcome = measured(task, "320/0", "naive", "certified")
    for name in ("naive", "certified"):
        (run,) = outcome.runs[name]
        overall = run.cache.report().to_dict()["overall"]
        assert overall["head_steps"] == 20 * 6 * 4 and run.taken == 20 and run.cache.get_seq_length() == 319
    # KL by hand: another naive cache, the same tokens.
    ids, found = task.windows[320], []
    dense, naive = (spec.make(model.config) for spec in parse_all(["naive"]))
    for cache in (dense, naive):
        read(model, cache, ids[:, :299], chunk=100)
    for place in range(299, 319):
        logs = [forward(model, cache, ids[:, place : place + 1]).double().log_softmax(-1) for cache in (dense, naive)]
        found.append(float(torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum")))
    assert outcome.rows[0].scores["naive"]["kl"] == pytest.approx(np.mean(found), rel=1e-6)
    assert outcome.rows[0].scores["naive"]["kl_max"] == pytest.approx(max(found), rel=1e-6)


def test_sizes_that_do_not_fit() -> None:
    model, tokenizer = prose()
    with pytest.raises(InputError, match="--score-last 300"):
        Perplexity(model, tokenizer, SOURCE, (300,), 1, 300)
    with pytest.raises(InputError, match="--context 1"):
        Perplexity(model, tokenizer, SOURCE, (1,), 1, None)
    with pytest.raises(InputError, match="--items 0"):
        Perplexity(model, tokenizer, SOURCE, (300,), 0)
    with pytest.raises(InputError, match="--new-tokens 0"):
        Divergence(model, tokenizer, SOURCE, (300,), 1, 0)
    with pytest.raises(InputError, match="divisor"):
        Needle(model, tokenizer, (300,), depths=10, needles=3)
    with pytest.raises(InputError, match="--depths 0"):
        Needle(model, tokenizer, (300,), depths=0)


def test_the_retriever_finds_facts_at_every_depth_and_the_cache_is_read_once() -> None:
    model, tokenizer = load_embedded("retriever", dtype=torch.float32)
    task = Needle(model, tokenizer, (512,), depths=6, needles=3)
    assert task.pieces() == ["512/0/0", "512/0/1"] and task.steps == 3
    outcome = measured(task, "512/0/1", "naive", "exact=certified:rtol=0")
    assert [row.group["depth"] for row in outcome.rows] == [0.2, 0.6, 1.0]
    for row in outcome.rows:
        assert row.context == 512 and row.scores["dense"] == row.scores["exact"]
        assert row.scores["dense"]["score"] == row.scores["naive"]["score"] == 1.0
    for runs in outcome.runs.values():
        assert len(runs) == 1  # every question was taken out again
    assert outcome.runs["naive"][0].cache.report().to_dict()["overall"]["head_steps"] == 3 * 2 * 4
    again = measured(Needle(model, tokenizer, (512,), depths=6, needles=3), "512/0/1")
    assert [row.scores["dense"] for row in again.rows] == [row.scores["dense"] for row in outcome.rows]


def test_a_blunt_retriever_is_wrong_and_english_is_not_for_it() -> None:
    model, tokenizer = load_embedded("retriever", dtype=torch.float32)
    set_margin(model, 0.5)
    task = Needle(model, tokenizer, (512,), depths=2)
    assert task.settings()["margin"] == 0.5
    assert [row.scores["dense"]["score"] for piece in task.pieces() for row in measured(task, piece).rows] == [0.0, 0.0]
    with pytest.raises(InputError, match="no English"):
        Needle(model, tokenizer, (512,), depths=2, text=BOOK)


def test_a_cache_that_cannot_be_rewound_is_read_again_for_each_question() -> None:
    model, tokenizer = prose()
    task = Needle(model, tokenizer, (300,), depths=2, needles=2)
    makers = {"dense": lambda: _Sliding(config=model.config)}
    outcome = task.measure("300/0/0", makers)
    assert len(outcome.runs["dense"]) == 2 and outcome.runs["dense"][0].cache is not outcome.runs["dense"][1].cache
    plain = measured(task, "300/0/0")
    assert [row.scores["dense"]["text"] for row in outcome.rows] == [row.scores["dense"]["text"] for row in plain.rows]


def _Sliding(config: Any) -> Any:  # noqa: N802
    from transformers import DynamicCache

    class Cache(DynamicCache):
        @property
        def is_sliding(self) -> list[bool]:
            return [True] * len(self.layers)

        def crop(self, *_: Any) -> None:
            raise AssertionError("a sliding cache cannot be cropped")

    return Cache(config=config)


def test_divergence_counts_tokens_before_the_first_other_one() -> None:
    model, tokenizer = prose()
    task = Divergence(model, tokenizer, SOURCE, (280,), 1, new_tokens=12)
    scores = measured(task, "280/0", "exact=certified:rtol=0", "rough=naive:value_bits=4").rows[0].scores
    assert scores["dense"] == scores["exact"] and scores["dense"]["score"] == 12 and scores["dense"]["equal"] == 1
    texts = [scores[name]["text"] for name in ("dense", "rough")]
    assert (texts[0] == texts[1]) == (scores["rough"]["equal"] == 1.0)
    broken = task.measure("280/0", {"dense": _plain(task), "other": _forgetful(task)}).rows[0].scores["other"]
    assert broken["score"] < 12 and broken["equal"] == 0.0


def _plain(task: Any) -> Callable[[], Any]:
    return lambda: parse_all([])[0].make(task.model.config)


def _forgetful(task: Any) -> Callable[[], Any]:
    """Makes a cache whose values are all zero."""
    from transformers import DynamicCache

    class Forgetful(DynamicCache):
        def update(self, keys: Any, values: Any, *others: Any, **options: Any) -> Any:
            return super().update(keys, torch.zeros_like(values), *others, **options)

    return lambda: Forgetful(config=task.model.config)


def filled(task: Any, piece: str, audit: bool = False) -> Any:
    run = measured(task, piece, "certified", audit=audit).runs["certified"][0]
    run.cache.report()  # the last step counts now
    return run


def test_evidence_adds_up_and_survives_a_file() -> None:
    model, tokenizer = prose()
    task = Perplexity(model, tokenizer, SOURCE, (320,), 2, 12)
    runs = [filled(task, piece, audit=True) for piece in task.pieces()]
    settings = runs[0].cache.settings
    both, apart = Evidence(12), [Evidence(12), Evidence(12)]
    for run, part in zip(runs, apart, strict=True):
        both.add(run.cache, run.taken)
        part.add(run.cache, run.taken)
    apart[0].merge(Evidence.of(json.loads(json.dumps(apart[1].state()))))
    found = both.to_dict(settings)
    assert apart[0].to_dict(settings) == found
    assert Evidence.of(json.loads(json.dumps(both.state()))).to_dict(settings) == found
    reports = [run.cache.report().to_dict() for run in runs]
    for figure in ("head_steps", "bytes_moved", "promoted_key_blocks"):
        assert found["overall"][figure] == sum(report["overall"][figure] for report in reports)
    assert found["overall"]["relative"]["bound"]["max"] == max(r["overall"]["relative"]["bound"]["max"] for r in reports)
    assert found["memory"] == reports[0]["memory"] and found["steps"] == sum(report["steps"] for report in reports)
    for name in ("bound", "tightness"):
        assert sum(count for _, count in found["histograms"][name]) == found["overall"]["relative"][name]["count"] > 0
    assert "records" not in found


def assert_rounded_up(shown: float | None, exact: float | None) -> None:
    assert (shown is None) == (exact is None)
    if shown is not None and exact is not None:
        assert exact <= shown <= exact * (1 + 2e-5)


def test_a_trace_holds_the_largest_and_the_mean_of_each_head_and_step() -> None:
    model, tokenizer = prose()
    task = Perplexity(model, tokenizer, SOURCE, (320,), 1, 9)
    run = filled(task, "320/0")
    records = run.cache.recorder.records
    trace = Trace(9)
    trace.add(records, run.taken)
    trace.add(records, run.taken)
    shown = trace.to_dict()
    assert shown["columns"] == shown["steps"] == 9 and shown["items"] == [2] * 9
    assert shown["rows"] == [[layer, head] for layer in range(6) for head in range(4)]
    steps = sorted({record.step for record in records})
    for record in records:
        column = steps.index(record.step)
        for head in range(4):
            row = shown["rows"].index([record.layer, head])
            dense = record.rung[0, head, 0] in (Rung.DENSE_HEAD, Rung.DENSE_LAYER)
            bound, candidate = (figure[0, head, 0] / record.norm[0, head, 0] for figure in (record.bound, record.candidate))
            assert_rounded_up(shown["bound_max"][row][column], None if dense else bound)
            assert_rounded_up(shown["bound_mean"][row][column], None if dense else bound * (1 - 1e-15))
            assert_rounded_up(shown["candidate_max"][row][column], None if np.isnan(candidate) else candidate)
    assert sum(sum(counts) for counts in shown["rungs"].values()) == 2 * 9 * 24
    assert sum(shown["bytes_moved"]) == 2 * sum(record.bytes_moved for record in records)


def test_steps_before_the_first_record_and_many_steps_have_their_columns() -> None:
    model, tokenizer = prose()
    task = Perplexity(model, tokenizer, SOURCE, (275,), 1, None)  # up to 256 tokens nothing is quantised
    run = filled(task, "275/0")
    assert run.taken == 274
    records = run.cache.recorder.records
    trace = Trace(274)
    trace.add(records, 274)
    shown = trace.to_dict()
    assert shown["columns"] == 128 and shown["items"] == [1] * 128
    first = 274 - len({record.step for record in records})
    assert 256 <= first < 260  # up to 256 tokens a cache is not quantised
    known = [column for column in range(128) if shown["bound_max"][0][column] is not None]
    assert known == list(range(first * 128 // 274, 128))
    assert sum(shown["rungs"]["fast"]) == sum(int((record.rung == Rung.FAST).sum()) for record in records)


def run_of(tmp_path: Path, **options: Any) -> tuple[Run, Path]:
    model, tokenizer = prose()
    task = Perplexity(model, tokenizer, SOURCE, (300,), 4, 6)
    return Run(task, parse_all(["naive", "certified"]), "prose", **options), tmp_path / "run.json"


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in found.items() if key not in ("speed", "seconds", "processes")}


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal but for the last bits of sums, which depend on their order."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_alike(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_alike(mine, other)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-12) if isinstance(theirs, float) else theirs)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    run, out = run_of(tmp_path, audit=1)
    whole = run.execute(tmp_path / "other.json")
    check_run(whole)
    measure, seen = run.task.measure, []

    def stopping(piece: str, makers: Any) -> Outcome:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(piece)
        return measure(piece, makers)

    run.task.measure = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.execute(out)
    part = run.unfinished(out)
    assert part is not None and not part["complete"] and [row["id"] for row in part["items"]] == ["300/0", "300/1"]
    check_run(part)
    run.task.measure = lambda piece, makers: seen.append(piece) or measure(piece, makers)  # type: ignore[method-assign,func-returns-value]
    found = run.execute(out)
    assert seen == run.task.pieces()  # nothing twice
    assert comparable(found) == comparable(whole) and found["complete"]
    assert (
        len(found["speed"]["certified"]["decode_ms"]) == 6 and found["speed"]["dense"]["decode_ms"]["n"] == 3
    )  # one was audited
    run.clear(out)
    assert not list(tmp_path.glob("run.json*"))


def test_processes_share_the_work(tmp_path: Path) -> None:
    run, out = run_of(tmp_path)
    whole = run.execute(tmp_path / "other.json")
    checkpoint = Checkpoint(out, run.config_hash)
    # What two processes do one after the other: the first waits for no-one here, so its share is completed by hand.
    assert run.execute(out, process=1, processes=2) is None
    assert len(checkpoint.load().pieces) == 2
    mine = Progress()
    for piece in run.task.pieces()[0::2]:
        makers = {spec.name: (lambda spec=spec: spec.make(run.task.model.config)) for spec in run.specs}  # type: ignore[misc]
        mine.add(piece, run.task.measure(piece, makers), run.task.steps, timed=True)
    checkpoint.save(0, mine)
    assert_alike(comparable(run.result(checkpoint.load(), 2)), comparable(whole))


def test_parts_that_were_taken_up_elsewhere_do_not_count_twice(tmp_path: Path) -> None:
    run, out = run_of(tmp_path)
    run.execute(out)
    checkpoint = Checkpoint(out, run.config_hash)
    whole = checkpoint.load()
    checkpoint.path(1).write_bytes(checkpoint.path(0).read_bytes())
    checkpoint.path(2).write_text("{torn", encoding="utf-8")
    assert len(checkpoint.load().rows) == len(whole.rows) == 4
    assert comparable(run.result(checkpoint.load(), 1)) == comparable(run.result(whole, 1))
    other = Checkpoint(out, "another run's hash")
    assert not other.load().pieces
    checkpoint.consolidate(checkpoint.load())
    assert [path.name for path in tmp_path.glob("run.json*")] == [checkpoint.path(0).name]


def test_a_runs_hash_tells_runs_apart(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    same, _ = run_of(tmp_path)
    assert run.config_hash == same.config_hash
    others = [Run(run.task, parse_all(["naive"]), "prose"), Run(run.task, run.specs, "prose", seed=1)]
    model, tokenizer = prose()
    others.append(Run(Perplexity(model, tokenizer, SOURCE, (300,), 4, 7), run.specs, "prose"))
    others.append(Run(Perplexity(model, tokenizer, Source(text=BOOK + "!", file="book.txt"), (300,), 4, 6), run.specs, "prose"))
    hashes = {other.config_hash for other in (run, *others)}
    assert len(hashes) == 5


def test_what_is_no_number_is_none_and_infinity_stays() -> None:
    assert strict({"a": [1.0, float("inf"), (float("nan"), 2)]}) == {"a": [1.0, float("inf"), [None, 2]]}


def cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_measures_once_and_says_what_a_file_holds(tmp_path: Path) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "run.json"
    book.write_text(BOOK, encoding="utf-8")
    arguments = ["eval", "ppl", "-m", "prose", "--text", str(book), "--context", "300", "--items", "2", "--score-last", "5"]
    result = cli(*arguments, "--json", str(out))
    assert result.exit_code == 0, result.output
    run = json.loads(out.read_text(encoding="utf-8"))
    check_run(run)
    assert run["complete"] and [path.name for path in tmp_path.glob("run.json*")] == ["run.json"]
    for spec in run["caches"]:
        score = run["summary"][spec["name"]]["overall"]["score"]
        assert f"{score:.4f}" in result.stdout
        assert score == pytest.approx(np.mean([item["scores"][spec["name"]]["score"] for item in run["items"]]))
    before = out.stat().st_mtime_ns
    again = cli(*arguments, "--json", str(out))
    assert again.exit_code == 0 and "nothing to do" in again.stderr and out.stat().st_mtime_ns == before
    other = cli(*arguments, "--json", str(out), "--seed", "1")
    assert other.exit_code == 2 and "--overwrite" in other.stderr and out.stat().st_mtime_ns == before
    out.write_text("a letter", encoding="utf-8")
    letter = cli(*arguments, "--json", str(out))
    assert letter.exit_code == 2 and "no run" in letter.stderr and out.read_text(encoding="utf-8") == "a letter"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ppl", "-m", "prose"], "--text FILE"),
        (["ppl", "-m", "prose", "--text", "nowhere.txt"], "nowhere.txt"),
        (["needle", "-m", "prose", "--context", "many"], "--context many"),
        (["needle", "-m", "prose", "--cache", "fancy"], "'fancy'"),
        (["needle", "-m", "prose", "--margin", "5"], "--margin 5.0: only a retriever"),
        (["needle", "-m", "retriever", "--json", "no/such/folder/x.json"], "no folder"),
    ],
)
def test_misuse_is_one_line(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("eval", *arguments)
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_two_launched_processes_measure_what_one_does(tmp_path: Path) -> None:
    arguments = ["eval", "needle", "-m", "retriever", "--context", "300", "--depths", "4", "--audit", "0", "--json"]
    # Without a GPU, too: this is how accelerate starts several processes on one machine.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "hf_certkv"]
    command = [*launch, *arguments, str(tmp_path / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert cli(*arguments, str(tmp_path / "one.json")).exit_code == 0
    two, one = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("two", "one"))
    assert two["processes"] == 2 and two["complete"]
    assert_alike(comparable(two), comparable(one))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
