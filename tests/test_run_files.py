"""Run files are checked to the last value, and refused with the place of what is wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from example_run import DELETE, run_of, set_at

from hf_certkv import InputError
from hf_certkv.evaluation.runs import check_run, load_run

WRONG: list[tuple[str, Any, str]] = [
    ("format", "something", "certkv-run"),
    ("version", 2, "version 2"),
    ("version", True, "version true"),
    ("kind", "other", "kind"),
    ("caches", DELETE, "'caches'"),
    ("caches", [], "caches is []"),
    ("caches.2.name", "naive", "two are called"),
    ("caches.2.name", 5, "caches[2].name"),
    ("caches.2.settings.rtol", "0.02", "caches[2].settings.rtol"),
    ("caches.2.settings.rtol", -1, "caches[2].settings.rtol"),
    ("model", [], "model"),
    ("model.name", DELETE, "model has no 'name'"),
    ("environment", None, "environment"),
    ("complete", "yes", "complete"),
    ("task.metric.right_or_wrong", 1, "right_or_wrong"),
    ("items", {}, "items"),
    ("items.0.scores.naive.score", math.nan, "items[0].scores.naive.score"),
    ("items.0.scores", {"other": {"score": 1}}, "none of the caches"),
    ("items.0.context", 1.5, "items[0].context"),
    ("summary.naive.overall.score", "high", "summary.naive.overall.score"),
    ("summary.naive.overall.difference.low", [], "difference.low"),
    ("summary.other", {"overall": {"items": 0, "score": None, "difference": None}}, "none of the caches"),
    ("summary.naive.contexts", {"many": {}}, "whole number"),
    ("certificates.naive.certified", None, "certified"),
    ("certificates.naive.overall.rungs.fast", -1, "rungs.fast"),
    ("certificates.naive.overall.rungs.keys", DELETE, "'keys'"),
    ("certificates.naive.overall.relative.bound.max", math.nan, "bound.max"),
    ("certificates.naive.trace.bound_max.3.1", "x", "bound_max[3][1]"),
    ("certificates.naive.trace.bound_max.3", [0.1], "bound_max[3] has 1 columns"),
    ("certificates.naive.trace.bound_mean", [], "bound_mean has 0 rows"),
    ("certificates.naive.trace.bytes_moved", [1, 2], "bytes_moved has 2 columns"),
    ("certificates.naive.trace.rungs.fast", [], "rungs.fast has 0 columns"),
    ("certificates.naive.trace.columns", 10**9, "at most"),
    ("certificates.naive.histograms.bound", [[1.0]], "histograms.bound[0]"),
    ("memory.measured.naive.dense_bytes", 10**400, "dense_bytes"),
    ("memory.planned.naive.1024", 5, "memory.planned.naive.1024"),
    ("memory", None, "memory"),
    ("speed.naive.over_dense.median", math.inf, "over_dense.median"),
    ("seconds", "long", "seconds"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "named"), WRONG, ids=[f"{path}={str(value)[:12]}" for path, value, _ in WRONG])
def test_a_wrong_value_is_refused_with_its_place(path: str, value: Any, named: str, tmp_path: Path) -> None:
    run = run_of()
    set_at(run, path, value)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run))
    with pytest.raises(InputError, match=re.escape(named)) as caught:
        load_run(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content",
    [b"", b"no", b"[1, 2", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 9_999, b'{"format": 1' + b"0" * 5000 + b"}",
     b'{"format": "certkv-run", "format": "certkv-run"}', b'{"format": "\\ud800"}'],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_run_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(file))):
        load_run(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="cannot be read"):
            load_run(path)


def test_infinite_bounds_and_odd_names_are_allowed(tmp_path: Path) -> None:
    run = run_of()
    run["certificates"]["naive"]["overall"]["relative"]["candidate"]["max"] = math.inf
    run["certificates"]["naive"]["trace"]["candidate_max"][0][0] = math.inf
    run["environment"]["<b>"] = {"nested": [1, None, "x"]}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run))
    assert load_run(file) == run


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("certificates.naive.certified", True, "settings do not say"),
        ("certificates.certified.certified", False, "settings do not say"),
        ("certificates.certified.overall.head_steps", 7, "do not add up"),
        ("certificates.naive.overall.rungs.fast", 1, "do not add up"),
    ],
)
def test_a_certificate_that_contradicts_itself_is_refused(path: str, value: Any, words: str) -> None:
    run = run_of()
    set_at(run, path, value)
    with pytest.raises(InputError, match=words):
        check_run(run)


def test_an_uncertified_step_of_a_certified_cache_is_refused() -> None:
    run = run_of()
    rungs = run["certificates"]["certified"]["overall"]["rungs"]
    rungs["fast"], rungs["uncertified"] = rungs["fast"] - 1, 1
    with pytest.raises(InputError, match="uncertified head-steps"):
        check_run(run)
