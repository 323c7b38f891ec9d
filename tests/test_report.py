"""`certkv report`: the page shows what a run file holds, and nothing else; without a network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from example_run import DELETE, generated_run, run_of, set_at
from PIL import Image
from typer.testing import CliRunner

from hf_certkv.cli_report import report
from hf_certkv.evaluation import page_data, page_text
from hf_certkv.evaluation.figures import draw_all
from hf_certkv.evaluation.page import page
from hf_certkv.evaluation.page_heat import ABOVE, BELOW, heat_map, palette
from hf_certkv.evaluation.runs import check_run

app = typer.Typer()
app.command()(report)
NASTY = "<script>alert(1)</script> $x_1$ \"' onmouseover=alert(2) {{ 7 * 7 }}"
VOID = {"meta", "link", "img", "br", "source", "circle", "line", "rect"}


def words(page_text: str) -> str:
    """What a reader sees, in one line."""
    without = re.sub(r"<(script|style|title)\b.*?</\1>", " ", page_text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", without)).split())


class Tags(HTMLParser):
    """Elements must be closed in their order. Attributes: found: tag and attributes of all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_headline_says_what_the_file_says() -> None:
    run = run_of()
    overall, found = run["certificates"]["certified"]["overall"], words(page([run]))
    rungs = overall["rungs"]
    dense = rungs["dense_head"] + rungs["dense_layer"]
    total = 6 * 4 * 6 * 40
    assert sum(rungs.values()) == total
    interval = run["summary"]["certified"]["overall"]["difference"]
    places = 1 - math.floor(math.log10(interval["high"] - interval["low"]))
    for value in interval.values():
        assert f"{value:+.{places}f}".replace("-", "\u2212") in found
    assert f"{math.ceil(1e5 * overall['relative']['bound']['max']) / 1e3:.3f} %" in found  # a bound is rounded up
    assert f"{100 * rungs['fast'] / total:.1f} %" in found
    assert f"{total - dense:,} returned an output proven to be within 2 % of its norm" in found
    assert f"{dense:,} were recomputed densely" in found
    assert "1.37" in found and "Not proved Anything about the text" in found
    measured = run["memory"]["measured"]["certified"]
    assert f"{measured['device_bytes'] / measured['dense_bytes']:.3f}" in found


@pytest.mark.parametrize("task", ["ppl", "needle", "ruler", "divergence"])
def test_every_cache_is_compared(task: str) -> None:
    run = run_of(task)
    check_run(run)
    text = page([run])
    found = words(text)
    Tags(text)
    share = run["task"]["metric"]["right_or_wrong"]
    for name in ("dense", "naive", "certified"):
        score = run["summary"][name]["overall"]["score"]
        assert (f"{100 * score:.1f} %" if share else page_text.short(score, 4)) in found
    assert ("McNemar p" in found) == share
    assert ("By task" in found) == (task == "ruler") and ("By depth and context" in found) == (task == "needle")
    assert "naive UNCERTIFIED" in found and "naive: UNCERTIFIED. Its bounds are logged, not enforced" in found


def test_needle_tables_hold_the_shares_of_items() -> None:
    run = run_of("needle")
    depths, contexts, cells = page_data.depth_grid(run, "naive")
    assert depths == [0.0, 0.25, 0.5] and contexts == [1024, 2048]
    for depth in depths:
        for context in contexts:
            scores = [
                item["scores"]["naive"]["score"] for item in run["items"]
                if item["context"] == context and item["group"]["depth"] == depth
            ]  # fmt: skip
            assert cells[depth, context] == page_data.Cell(len(scores), sum(scores))


def test_heat_maps_have_the_colour_of_their_side_of_the_tolerance() -> None:
    cache_view = page_data.caches_of(run_of())[2]
    scale = page_data.scale_of(cache_view)
    assert scale is not None and (scale.low, scale.middle) == (pytest.approx(0.0002), 0.02)
    assert scale.place(0.02) == (False, 1.0) and scale.place(0.002) == (False, pytest.approx(0.5))
    assert scale.place(0.0200001)[0] and scale.place(scale.top) == (True, 1.0) and scale.place(math.inf) == (True, 1.0)
    assert scale.place(0.0) == (False, 0.0)
    for theme in ("light", "dark"):
        colours = palette(theme)
        below, above = colours[1 : BELOW + 1], colours[BELOW + 1 : BELOW + ABOVE + 1]
        assert len(below) + len(above) + 1 == 256
        # Blue is more than red on one side, less on the other: no colour of one family is among the other.
        assert (below[:, 2] > below[:, 0]).all() and (above[:, 2] < above[:, 0]).all()


def test_heat_map_pictures_have_a_pixel_a_head_and_column() -> None:
    run = run_of()
    cache_view = page_data.caches_of(run)[2]
    trace = run["certificates"]["certified"]["trace"]
    trace["candidate_max"][5][7] = None
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", heat_map(cache_view, "candidate_max"))
    assert len(pictures) == 2
    for packed in pictures:
        with Image.open(io.BytesIO(base64.b64decode(packed))) as image:
            pixels = np.array(image.convert("RGBA")).astype(int)
        assert pixels.shape == (24, 40, 4)
        for row in range(24):
            for column in range(40):
                value, (red, _, blue, opaque) = trace["candidate_max"][row][column], pixels[row, column]
                assert (opaque == 0) == (value is None)
                assert value is None or (red > blue) == (value > 0.02)


def test_columns_and_steps_agree_with_the_fold() -> None:
    for steps, columns in ((1, 1), (40, 40), (200, 128), (129, 128), (1000, 128)):
        trace = {"steps": steps, "columns": columns}
        column_of = np.arange(steps) * columns // steps
        for column in range(columns):
            inside = np.flatnonzero(column_of == column)
            assert page_data.steps_of(trace, column) == (inside[0] + 1, inside[-1] + 1)


def test_bytes_a_step_come_of_head_steps() -> None:
    trace = run_of()["certificates"]["certified"]["trace"]
    found = page_data.per_step(trace)
    assert found == [pytest.approx(moved / 6) for moved in trace["bytes_moved"]]  # six items made each step
    trace["rungs"] = {name: [0, *values[1:]] for name, values in trace["rungs"].items()}
    assert page_data.per_step(trace)[0] is None


def test_numbers_are_written_with_the_digits_they_deserve() -> None:
    assert [page_text.short(x) for x in (0.0, 0.37714, 12.345, 99.96, 1234.5, 1e-12, -0.5, math.inf, None)] == [
        "0", "0.377", "12.3", "100.0", "1,234", "1.00e\u221212", "\u22120.500", "∞", "\u2013"
    ]  # fmt: skip
    assert page_text.difference({"mean": -0.00276, "low": -0.011, "high": 0.0034}) == ("\u22120.003", "\u22120.011 to +0.003")
    assert page_text.difference({"mean": 0.0, "low": None, "high": None}) == ("0", "")
    assert page_text.part_of(1, 100_000) == "< 0.1 %" and page_text.part_of(99_999, 100_000) == "> 99.9 %"
    assert page_text.part_of(0, 5) == "0.0 %" and page_text.part_of(0, 0) == "\u2013"
    assert page_text.p_value(1e-9) == "< 0.001" and page_text.tokens(131072) == "128K" and page_text.tokens(1000) == "1,000"


def test_the_verdict_follows_the_interval_and_the_metric() -> None:
    run = run_of()
    for interval, lower_is_better, expected in (
        ((-1, 1), True, "no difference found"), ((0, 1), True, "no difference found"), ((1, 2), True, "worse than dense"),
        ((-2, -1), True, "better than dense"), ((1, 2), False, "better than dense"),
    ):  # fmt: skip
        run["task"]["metric"]["higher_is_better"] = not lower_is_better
        assert page_data.verdict(run, {"mean": 0, "low": interval[0], "high": interval[1]}) == expected
    assert page_data.verdict(run_of("divergence"), {"mean": -1, "low": -2, "high": -0.5}) == ""


def without(*paths: str) -> Callable[[dict[str, Any]], None]:
    def change(run: dict[str, Any]) -> None:
        for path in paths:
            set_at(run, path, DELETE)

    return change


def only_dense(run: dict[str, Any]) -> None:
    run["caches"], run["certificates"] = run["caches"][:1], {}
    for part in (run["summary"], run["speed"], *run["memory"].values(), *(item["scores"] for item in run["items"])):
        for name in ("naive", "certified"):
            del part[name]


def nothing_quantised(run: dict[str, Any]) -> None:
    for part in run["certificates"].values():
        overall, trace = part["overall"], part["trace"]
        overall |= {
            "head_steps": 0,
            "rungs": dict.fromkeys(overall["rungs"], 0),
            "relative": dict.fromkeys(overall["relative"]),
        }
        part |= {"layers": {}, "histograms": {name: [] for name in part["histograms"]}}
        columns = trace["columns"]
        trace |= {"rows": [], "bound_max": [], "bound_mean": [], "candidate_max": [], "bytes_moved": [0] * columns}
        trace["rungs"] = {name: [0] * columns for name in trace["rungs"]}


def interrupted(run: dict[str, Any]) -> None:
    run |= {"complete": False, "items": [], "summary": {}}


def no_trace(run: dict[str, Any]) -> None:
    for part in run["certificates"].values():
        del part["trace"], part["histograms"]


no_plan = without("memory.planned")


def absolute(run: dict[str, Any]) -> None:
    run["caches"][2]["settings"] |= {"atol": 0.5, "scope": "layer"}


@pytest.mark.parametrize(
    ("change", "said", "not_said"),
    [
        (without("memory", "speed"), "Memory over dense", "Device memory over context"),
        (no_plan, "Memory over dense", "Device memory over context"),
        (only_dense, "nothing here was proved", "UNCERTIFIED"),
        (nothing_quantised, "Nothing was quantised in this run", "What served each head-step"),
        (interrupted, "INCOMPLETE RUN", "95 %"),
        (no_trace, "No trace of steps is in this file", "How tight"),
        (absolute, "2 % of its norm plus 0.5 (shared by the heads of a layer)", "INCOMPLETE"),
    ],
    ids=["no memory", "no plan", "dense", "nothing quantised", "interrupted", "no trace", "absolute"],
)
def test_missing_parts_leave_a_sensible_page(
    change: Callable[[dict[str, Any]], None], said: str, not_said: str, tmp_path: Path
) -> None:
    run = run_of()
    change(run)
    check_run(run)
    text = page([run])
    Tags(text)
    assert said in words(text) and not_said not in words(text)
    if change in (only_dense, nothing_quantised, no_trace):  # the others have all figures, which are drawn elsewhere
        draw_all([run], tmp_path)


def test_what_generate_writes_has_a_page(tmp_path: Path) -> None:
    run = generated_run()
    check_run(run)
    found = words(page([run]))
    assert "one generation" in found and "Once upon a time" in found and "960 returned an output proven" in found
    assert "bounds-bound-max-certified.png" in draw_all([run], tmp_path)


def test_everything_from_the_file_is_shown_as_text(tmp_path: Path) -> None:
    run = json.loads(json.dumps(run_of("ruler")).replace('"certified": {', f"{json.dumps(NASTY)}: {{"))
    run["caches"][2]["name"] = run["model"]["name"] = run["task"]["name"] = run["task"]["metric"]["label"] = NASTY
    run["task"]["metric"]["unit"] = run["environment"]["cpu"] = run["items"][0]["id"] = run["text"] = NASTY
    run["items"][0]["group"] = {NASTY: NASTY}
    run["summary"][NASTY]["tasks"] = {NASTY: run["summary"][NASTY]["overall"]}
    run["memory"]["planned"][NASTY]["1024"]["parts"] = {NASTY: 5}
    check_run(run)
    text = page([run, run])
    tags = Tags(text).found
    assert [tag for tag, _ in tags if tag == "script"] == ["script"]
    assert not [attributes for _, attributes in tags for name in attributes if name.startswith("on")]
    assert words(text).count(NASTY) > 20
    no_trace(run)
    slug = "script-alert-1-script-x-1-onmouseover-al"
    assert draw_all([run], tmp_path) == ["differences.png", "memory-naive.png", f"memory-{slug}.png"]


def test_one_file_that_asks_nobody() -> None:
    tags = Tags(page([run_of()])).found
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name)
    policy = next(attributes["content"] for _, attributes in tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


def test_several_runs_stand_in_one_page() -> None:
    runs = [run_of("ppl"), generated_run(), run_of("needle")]
    text = page(runs)
    ids = [attributes["id"] for _, attributes in Tags(text).found if "id" in attributes]
    assert len(ids) == len(set(ids)) and {"run-1", "run-2", "run-3"} <= set(ids)
    assert "3 runs All runs" in words(text)
    for place in (1, 2, 3):
        assert f'href="#run-{place}"' in text


def test_figures_for_print_are_sharp_and_have_steady_names(tmp_path: Path) -> None:
    names = draw_all([run_of("needle")], tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    expected = {f"{name}-certified.png" for name in (
        "bounds-bound-max", "bounds-bound-mean", "bounds-candidate-max", "bytes", "depths", "histograms", "memory", "rungs",
        "tightness")}  # fmt: skip
    assert expected | {"differences.png", "depths-dense.png"} <= set(names)
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert image.width == round(3.5 * 300) and image.info["dpi"] == pytest.approx((300, 300), abs=1)
            assert len(set(image.convert("L").tobytes())) > 1


def test_the_command_writes_both(tmp_path: Path) -> None:
    paths = []
    for place in range(2):
        run = run_of("needle")
        no_trace(run)
        paths.append(str(tmp_path / f"{place}.json"))
        Path(paths[-1]).write_text(json.dumps(run))
    result = CliRunner().invoke(app, [*paths, "--html", str(tmp_path / "out.html"), "--png", str(tmp_path / "a" / "figures")])
    assert result.exit_code == 0, result.stderr
    assert "2 runs" in words((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert (tmp_path / "a" / "figures" / "run-2-depths-naive.png").exists()
    assert "out.html" in result.stdout and "figures" in result.stdout
    first, second = (
        {path.name[6:]: path.read_bytes() for path in tmp_path.glob(f"a/figures/run-{place}-*")} for place in (1, 2)
    )
    assert first == second and len(first) == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{run}"], "--html"),
        (["{run}", "--html", "{folder}/none/out.html"], "no folder"),
        (["{run}", "{folder}/bad.json", "--html", "{folder}/out.html"], "bad.json"),
        (["{run}", "--png", "{run}/figures"], "--png"),
    ],
    ids=["nothing to write", "no folder", "bad file", "file as folder"],
)
def test_misuse_ends_in_one_line_and_leaves_nothing(arguments: list[str], named: str, tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    run.write_text(json.dumps(generated_run()))
    (tmp_path / "bad.json").write_text("{}")
    result = CliRunner().invoke(app, [part.format(run=run, folder=tmp_path) for part in arguments])
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "run.json"]
