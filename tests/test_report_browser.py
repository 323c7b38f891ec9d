"""The report in a real browser: quiet, alone, on a phone and in the dark, with scripts and without."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium, give_up
from example_run import example_run, generated_run

from hf_certkv.evaluation.page import page
from hf_certkv.evaluation.page_text import DASH

__all__ = ["chromium"]  # a fixture

LONG = "a-cache-with-a-name-that-does-not-end-" * 4


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three runs, one of them with a name that is far too long."""
    folder = tmp_path_factory.mktemp("report")
    long = generated_run(1)
    long["caches"][0]["name"], long["model"]["name"] = LONG, LONG
    long["certificates"], long["memory"] = {LONG: long["certificates"]["certified"]}, {}
    runs = [example_run("needle", items=10, steps=150), example_run("ppl", items=6, steps=40), long]
    (folder / "out.html").write_text(page(runs), encoding="utf-8")
    return folder / "out.html"


def shown(visit: Visit, panel: str, run: str = "run-1") -> list[Any]:
    """Caches or kinds of the panels that can be seen."""
    script = """([run, panel]) => [...document.querySelectorAll(`#${run} [data-panel=${panel}]`)]
        .filter((one) => one.offsetParent !== null).map((one) => one.dataset.kind ?? one.dataset.cache)"""
    found: list[Any] = visit.page.evaluate(script, [run, panel])
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_quiet_alone_and_fits(chromium: Any, written: Path, width: int, dark: bool) -> None:
    with Visit(chromium, written, width, dark) as visit:
        visit.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        assert visit.wider_than_the_screen == 0
        # Texts that are cut off: their box is narrower than they are, and does not scroll.
        texts = "p, h1, h2, h3, dd, dt, figcaption, li, summary, th, td"
        cut = visit.page.evaluate(
            """(texts) => [...document.querySelectorAll(texts)]
            .filter((one) => one.offsetParent !== null && !one.closest(".scroll")
                && (one.scrollWidth > one.clientWidth + 1 || one.getBoundingClientRect().right > innerWidth + 1)
                && getComputedStyle(one).display !== "inline").map((one) => one.textContent.trim().slice(0, 60))""",
            texts,
        )
        assert cut == []
        assert visit.complaints == [] and visit.requests == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_have_contrast(chromium: Any, written: Path, dark: bool) -> None:
    with Visit(chromium, written, 1280, dark) as visit:
        pairs = visit.page.evaluate("""() => {
            const back = (one) => { for (; one; one = one.parentElement) {
                const colour = getComputedStyle(one).backgroundColor;
                if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour; } return "rgb(255, 255, 255)"; };
            const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
            const found = new Set();
            while (walker.nextNode()) {
                const one = walker.currentNode.parentElement;
                if (!walker.currentNode.textContent.trim() || one.offsetParent === null || one.closest(".cell")) continue;
                found.add(JSON.stringify([getComputedStyle(one).color, back(one)]));
            }
            return [...found].map((one) => JSON.parse(one)); }""")
        assert len(pairs) > 3
        for ink, paper in pairs:
            lights = sorted((luminance(ink), luminance(paper)))
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (ink, paper)


def luminance(colour: str) -> float:
    """Relative luminance by WCAG of `rgb(r, g, b)`."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_choices_switch_all_charts_of_a_run(chromium: Any, written: Path) -> None:
    with Visit(chromium, written) as visit:
        charts = ("heat", "rungs", "histograms", "memory")
        assert [shown(visit, chart) for chart in charts] == [["2"]] * 4
        assert shown(visit, "heat-kind") == ["bound_max"]
        visit.page.locator("#run-1 select[data-axis=cache]").nth(1).select_option("1")
        visit.page.locator("#run-1 select[data-axis=kind]").select_option("candidate_max")
        assert [shown(visit, chart) for chart in charts] == [["1"]] * 4
        assert shown(visit, "heat-kind") == ["candidate_max"]
        assert [shown(visit, chart, "run-2") for chart in charts] == [["2"]] * 4
        values = visit.page.evaluate("[...document.querySelectorAll('#run-1 select[data-axis=cache]')].map((one) => one.value)")
        assert values == ["1"] * 4
        assert "UNCERTIFIED" in visit.page.locator("#run-1 [data-panel=heat]:not(.off) figcaption").first.inner_text()
        assert visit.complaints == []


def test_the_heat_map_tells_its_figures(chromium: Any, written: Path) -> None:
    trace = example_run("needle", items=10, steps=150)["certificates"]["certified"]["trace"]
    with Visit(chromium, written) as visit:
        plot = visit.page.locator("#run-1 .heat-plot:visible")
        box = plot.bounding_box()
        assert box is not None
        row, column = 9, 77
        plot.scroll_into_view_if_needed()
        plot.hover(position={"x": (column + 0.5) * box["width"] / 128, "y": (row + 0.5) * box["height"] / 24})
        inside = [step + 1 for step in range(150) if step * 128 // 150 == column]
        steps = f"step {inside[0]}" if len(inside) == 1 else f"steps {inside[0]}{DASH}{inside[-1]}"
        expected = [f"layer 2, head 1, {steps}: "]
        for text, name in (("largest bound", "bound_max"), ("mean", "bound_mean"), ("fast path alone", "candidate_max")):
            expected.append(f"{text} {digits(100 * trace[name][row][column])} %")
        readout = visit.page.locator("#run-1 .readout:visible")
        assert readout.inner_text() == expected[0] + ", ".join(expected[1:])
        assert visit.page.locator("#tip").inner_text() == readout.inner_text()
        visit.page.keyboard.press("Escape")
        assert not visit.page.locator("#tip").is_visible()
        # And with the keyboard alone, from the first cell.
        plot = visit.page.locator("#run-2 .heat-plot:visible")
        plot.focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):
            visit.page.keyboard.press(key)
        assert visit.page.locator("#run-2 .readout:visible").inner_text().startswith("layer 0, head 1, step 2: ")
        assert visit.complaints == []


def digits(value: float) -> str:
    """Three digits, as JavaScript writes the number."""
    return f"{round(value, 2 - math.floor(math.log10(value))):.10f}".rstrip("0").rstrip(".")


def test_a_tap_on_a_mark_shows_its_figures(chromium: Any, written: Path) -> None:
    with Visit(chromium, written, 390, touch=True) as visit:
        mark = visit.page.locator("#run-1 [data-panel=rungs]:visible .hit").nth(40)
        mark.scroll_into_view_if_needed()
        mark.tap()
        tip = visit.page.locator("#tip")
        assert tip.is_visible() and "fast path" in tip.inner_text() and tip.inner_text().startswith("step")
        box = tip.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390
        visit.page.locator("h1").first.tap()
        assert not tip.is_visible()


def test_without_scripts_everything_is_there(chromium: Any, written: Path) -> None:
    with Visit(chromium, written, scripts=False) as visit:
        sizes = [image.bounding_box() for image in visit.page.locator("#run-1 .heat-plot img").all()]
        assert len(sizes) == 6 and all(box and box["width"] > 300 and box["height"] > 50 for box in sizes)
        assert visit.page.locator("select:visible").count() == 0
        drawn = visit.page.locator("#run-1 svg")
        assert drawn.count() > 15 and visit.page.locator("#run-1 svg:visible").count() == drawn.count()
        for name in ("naive", "certified"):
            assert visit.page.locator(f"#run-1 [data-panel=rungs]:visible >> text={name}").count()


def test_headings_labels_and_landmarks(chromium: Any, written: Path) -> None:
    with Visit(chromium, written) as visit:
        levels = visit.page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((one) => Number(one.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        unlabelled = visit.page.evaluate("""() => [...document.querySelectorAll("svg, img, select, [role=img], [tabindex='0']")]
            .filter((one) => !(one.getAttribute("aria-label") || one.getAttribute("alt"))).length""")
        assert unlabelled == 0
        assert visit.page.locator("main").count() == 1 and visit.page.locator("html").get_attribute("lang") == "en"
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate("document.activeElement.className") == "skip"


def test_without_a_browser_ci_fails_and_others_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"):
        give_up("no Chromium was found")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        give_up("no Chromium was found")
