"""The committed runs of `certkv eval`, and that the documents say what is in them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmarks import quality, quality_tables
from benchmarks.tables import README
from hf_certkv.evaluation.caches import parse_all
from hf_certkv.evaluation.runs import load_run

RUNS = {name: load_run(path) for name in quality.RUNS if (path := quality.FOLDER / f"{name}.json").exists()}


def test_every_run_is_committed_and_whole() -> None:
    assert list(RUNS) == list(quality.RUNS)
    for name, run in RUNS.items():
        assert run["complete"], name
        wanted = [spec.to_dict() for spec in parse_all(quality.RUNS[name][1])]
        assert run["caches"] == wanted, name
        assert "uncommitted" not in run["environment"]["commit"], name


def test_the_documents_say_what_the_runs_hold() -> None:
    assert quality_tables.PAGE.read_text(encoding="utf-8") == quality_tables.page(RUNS)
    readme = README.read_text(encoding="utf-8")
    shown = re.search(r"<!-- quality -->\n(.*)\n<!-- /quality -->", readme, re.DOTALL)
    assert shown is not None and shown[1] == quality_tables.readme(RUNS, quality_tables.README_CACHES)


@pytest.mark.parametrize("name", RUNS)
def test_no_certified_output_was_above_its_tolerance(name: str) -> None:
    run = RUNS[name]
    for spec in run["caches"]:
        if spec["settings"] is None or spec["settings"]["policy"] == "naive":
            continue
        overall = run["certificates"][spec["name"]]["overall"]
        assert overall["head_steps"] > 0 and overall["rungs"]["uncertified"] == 0
        bound, tightness = overall["relative"]["bound"], overall["relative"]["tightness"]
        if bound is not None:  # all heads dense otherwise
            assert bound["max"] <= spec["settings"]["rtol"] * (1 + 1e-12)
        assert tightness is None or tightness["count"] > 0


@pytest.mark.parametrize(
    "name", ["prose_ppl_1024", "prose_ppl_2048", "prose_ppl_whole", "prose_ruler", "retriever_needle", "retriever_needle_hard"]
)
def test_the_default_is_not_worse_than_dense(name: str) -> None:
    sums = RUNS[name]["summary"][quality_tables.DEFAULT]["overall"]
    assert sums["difference"]["low"] <= 0 <= sums["difference"]["high"]
    assert sums["discordant"] is None or sums["discordant"]["p"] > 0.05


def test_a_table_by_hand() -> None:
    change = {"mean": 0.00012, "low": -0.00001, "high": 0.00031}
    assert quality_tables.interval(change) == "+0.0001 [-0.0001, +0.0004]"  # the ends are rounded outward
    assert quality_tables.interval({"mean": 0.5, "low": None, "high": None}, 1) == "+0.5"
    assert quality_tables.interval(None) == "-"
    assert quality_tables.interval({"mean": 0.0, "low": 0.0, "high": 0.0}, 2) == "+0.00 [+0.00, +0.00]"
    assert quality_tables.holds_zero(change) and not quality_tables.holds_zero({**change, "low": 0.00001})


def test_a_run_without_times_or_certificates_has_a_section() -> None:
    run: dict[str, Any] = json.loads(json.dumps(RUNS["retriever_needle"]))
    run["certificates"], run["speed"] = {}, {}
    text = quality_tables.section("retriever_needle", run)
    assert "| dense | - | - | - | - | 1.00 | - |" in text
