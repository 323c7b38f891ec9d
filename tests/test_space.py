"""The Space for the Hub: what it computes against `generate`, and its page in a real browser."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium
from huggingface_hub.repocard import metadata_load
from transformers import DynamicCache

import hf_certkv
from hf_certkv import CertifiedQuantizedCache, CertKVConfig, ConfigError, InputError
from hf_certkv.embedded import embedded_path, load_embedded

__all__ = ["chromium"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:.*certifies NOTHING")

HUB = Path(__file__).resolve().parents[1] / "examples" / "hub"
PROMPT = "It was a dark evening, and the old man sat by the fire. " * 22  # some 350 tokens: some of them are quantised


@pytest.fixture(scope="module")
def prose() -> Any:
    model, tokenizer = load_embedded("prose", dtype=torch.float32)
    return SimpleNamespace(model=model, inputs=dict(tokenizer(PROMPT, return_tensors="pt")), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def space() -> Iterator[Any]:
    """The Space's modules but the page, which alone needs gradio."""
    names = ("engine", "prompts", "render")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HUB / "space"))
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        for name in names:
            sys.modules.pop(name, None)


def finished(space: Any, **question: Any) -> Any:
    run = space.engine.Comparison(space.engine.Question(**question))
    assert [*run.steps()][-1] == max(len(lane.ids) for lane in run.lanes)
    return run


def oracle(run: Any, cache: Any) -> list[int]:
    """What transformers' `generate` writes when the prompt but its last token is in the cache."""
    with torch.inference_mode():
        run.model(input_ids=run.ids[:, :-1], past_key_values=cache)
    count = run.question.new_tokens
    written = run.model.generate(run.ids, past_key_values=cache, max_new_tokens=count, do_sample=False)
    return written[0, run.prompt_tokens :].tolist()


@pytest.mark.parametrize("value_format", ["K8 V4", "K8 V8"])
def test_the_answers_are_what_generate_writes(space: Any, value_format: str) -> None:
    run = finished(space, prompt=space.prompts.MOBY_DICK, value_format=value_format, rtol=0.03, new_tokens=12)
    config, bits = run.model.config, space.engine.FORMATS[value_format]
    certified = CertifiedQuantizedCache(config, rtol=0.03, value_bits=bits, kernel="reference")
    naive = CertifiedQuantizedCache(config, settings=CertKVConfig.naive(value_bits=bits, kernel="reference"))
    for lane, cache in zip(run.lanes, (DynamicCache(config=config), naive, certified), strict=True):
        assert lane.ids == oracle(run, cache), lane.name
    dense, uncertified, proven = run.answers()
    assert dense.text == run.tokenizer.decode(run.lanes[0].ids)
    assert [answer.tokens for answer in (dense, uncertified, proven)] == [12] * 3
    for answer, cache in ((uncertified, naive), (proven, certified)):
        assert answer.bound == pytest.approx(cache.report().to_dict()["overall"]["relative"]["bound"]["max"], rel=1e-12)
        assert answer.device == cache.memory().device
    found = run.certificate()
    overall = certified.report().to_dict()["overall"]
    assert found.head_steps == overall["head_steps"] == 6 * 4 * 12
    assert found.share(*space.render.SHARES[0][2]) == overall["rung_share"]["fast"]
    assert found.memory == certified.memory()
    assert (found.layers.tolist(), found.heads.tolist()) == (np.repeat(range(6), 4).tolist(), [0, 1, 2, 3] * 6)


def test_where_answers_differ_is_marked(space: Any) -> None:
    run = finished(space, prompt=space.prompts.MOBY_DICK, new_tokens=32)
    dense, naive, certified = run.answers()
    assert certified.same == 32 and naive.same < 32  # as the page says of this example
    assert run.lanes[1].ids[: naive.same] == run.lanes[0].ids[: naive.same]
    assert run.lanes[1].ids[naive.same] != run.lanes[0].ids[naive.same]
    assert dense.text[: naive.agreed] == naive.text[: naive.agreed]
    page = space.render.answers(run)
    assert page.count("<mark>") == 1 and f"differs after {naive.same} of 32" in page and "as dense: all 32" in page
    for lane in run.lanes:
        lane.ids = run.tokenizer("a <b>bold</b> & x").input_ids
    assert "a &lt;b&gt;bold&lt;/b&gt; &amp; x" in space.render.answers(run)


def test_true_errors_lie_under_bounds_under_the_tolerance(space: Any) -> None:
    run = finished(space, prompt=space.prompts.PRIDE_AND_PREJUDICE, rtol=0.05, new_tokens=12, audit=True)
    found = run.certificate()
    assert np.isfinite(found.bound).all() and np.isfinite(found.error).all()
    assert (found.error > 0).all() and (found.error <= found.bound).all() and (found.bound <= 0.05).all()
    page = space.render.certificate(run, done=True)
    assert f'data-bound="{found.bound.max():.6g}" data-tolerance="0.05" data-outputs="{found.head_steps}"' in page
    cells = re.findall(r'<path class="cell \w+" d="([^"]+)"', page)
    assert sum(path.count("M") for path in cells) == found.bound.size
    assert f"<dd>{100 * found.error.max():.3g} %</dd>" in page


def test_a_tolerance_of_nothing_is_dense(space: Any) -> None:
    """Sampled, so that the same random numbers are seen to be drawn for each cache, and drawn again with the same seed."""
    question = {"prompt": PROMPT, "rtol": 0.0, "new_tokens": 10, "temperature": 1.0, "seed": 5}
    run = finished(space, **question)
    assert run.lanes[2].ids == run.lanes[0].ids == finished(space, **question).lanes[0].ids
    assert run.lanes[0].ids != finished(space, **{**question, "seed": 6}).lanes[0].ids
    found = run.certificate()
    assert found.share(*space.render.SHARES[2][2]) == 1.0 and not np.isfinite(found.bound).any()
    assert "100 % recomputed densely" in space.render.certificate(run)


def test_the_hard_needle_is_lost_without_a_certificate(space: Any) -> None:
    example = space.prompts.examples()[-1]
    run = finished(space, prompt=example.prompt, model=example.model, new_tokens=1)
    dense, naive, certified = (answer.text for answer in run.answers())
    right = space.prompts.needle_question(4096, seed=1, needle=8)[1]
    assert dense == certified == right != naive
    assert space.engine.load("retriever")[0].config.retrieval_margin == 30  # the easy model is another one


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"prompt": " \n"}, ["empty"]),
        ({"prompt": "word " * 5000}, ["5,0", "4,096", "Shorten"]),
        ({"prompt": "x" * 200_001}, ["200,001 characters"]),
        ({"prompt": "a", "model": "gpt"}, ["'gpt'", "prose"]),
        ({"prompt": "a", "value_format": "K4"}, ["'K4'", "K8 V8"]),
        ({"prompt": "a", "rtol": -0.1}, ["rtol=-0.1"]),
        ({"prompt": "a", "new_tokens": 0}, ["tokens to write", "1 to 128"]),
        ({"prompt": "a", "new_tokens": 2.5}, ["2.5"]),
        ({"prompt": "a", "seed": None}, ["seed", "None"]),
        ({"prompt": "a", "temperature": float("nan")}, ["temperature", "nan"]),
    ],
)
def test_bad_questions_say_what_is_wrong(space: Any, question: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ConfigError, InputError)) as raised:
        space.engine.Comparison(space.engine.Question(**question))
    assert all([word in str(raised.value) for word in words]), raised.value


def test_a_prompt_too_short_is_said_to_be(space: Any) -> None:
    run = finished(space, prompt="The old man", new_tokens=4)
    assert "Up to 256 tokens are kept exactly" in run.notes()[0]
    assert run.certificate().head_steps == 0
    page = space.render.certificate(run, done=True)
    assert "Up to 256 tokens" in page and 'data-done="true"' in page
    other = space.engine.Comparison(space.engine.Question(prompt="plain English words", model="retriever"))
    assert any(["3 of 3 words are not in this model" in note for note in other.notes()])


def test_a_further_model_comes_from_the_environment(space: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(embedded_path("prose"), tmp_path / "mine")
    monkeypatch.setenv("CERTKV_SPACE_MODEL", str(tmp_path / "mine"))
    assert space.engine.model_names()[-1] == str(tmp_path / "mine")
    assert finished(space, prompt="Once", model=str(tmp_path / "mine"), new_tokens=1).lanes[0].ids
    monkeypatch.setenv("CERTKV_SPACE_MODEL", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"CERTKV_SPACE_MODEL=.*none.* cannot be loaded"):
        space.engine.load(str(tmp_path / "none"))


def test_requests_at_the_same_time_do_not_meet(space: Any) -> None:
    """Two requests in threads, each step in any of them as gradio does it, give what one alone gives."""
    questions = [{"prompt": text, "new_tokens": 4} for text in (PROMPT, space.prompts.MOBY_DICK)]
    alone = [finished(space, **question) for question in questions]
    together = [space.engine.Comparison(space.engine.Question(**question)) for question in questions]
    steps = [run.steps() for run in together]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            list(pool.map(next, steps))
    for one, other in zip(alone, together, strict=True):
        assert [lane.ids for lane in one.lanes] == [lane.ids for lane in other.lanes]
        assert np.array_equal(one.certificate().bound, other.certificate().bound, equal_nan=True)


def test_the_hub_can_start_the_space() -> None:
    card: Any = metadata_load(HUB / "space" / "README.md")
    assert (card["sdk"], card["license"]) == ("gradio", "apache-2.0")
    assert (HUB / "space" / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60  # the Hub refuses longer ones
    asked = (HUB / "space" / "requirements.txt").read_text()
    assert f"hf_certkv>={hf_certkv.__version__}" in asked
    least, below = re.search(r"gradio>=(\d+)\.\d+,<(\d+)", asked).groups()  # type: ignore[union-attr]
    assert int(least) <= int(card["sdk_version"].split(".")[0]) < int(below)


# --- the Space: the page


@pytest.fixture(scope="module")
def address(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Space, copied elsewhere and served from there."""
    if importlib.util.find_spec("gradio") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("gradio is not installed: pip install 'hf_certkv[space]'")
    folder = tmp_path_factory.mktemp("hub") / "space"
    shutil.copytree(HUB / "space", folder, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log.txt"
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(HUB.parents[1])
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        where = f"http://127.0.0.1:{port}/"
        for _ in range(1200):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(where, timeout=10).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield where
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def open_page(chromium: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the Space; at the end, nothing may have been said on the console or asked of another machine."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def start(width: int, scheme: str) -> Any:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#compare")
        return page

    yield start
    for context in contexts:
        context.close()
    assert said == []
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def words(text: str) -> str:
    return " ".join(text.split())


def answer_texts(page: Any) -> list[str]:
    return [words(part.inner_text()) for part in page.query_selector_all("#answers .card .text")]


def test_the_page_compares_and_draws(open_page: Callable[..., Any], prose: Any) -> None:
    page = open_page(1280, "light")
    page.fill("#prompt textarea", PROMPT)
    page.fill("#rtol input[type=number]", "0.05")
    page.press("#rtol input[type=number]", "Tab")
    page.click("#compare")
    page.wait_for_selector('.certificate[data-done="true"] .plot', timeout=60_000)
    ids = prose.model.generate(**prose.inputs, max_new_tokens=48, do_sample=False)[0, prose.inputs["input_ids"].shape[1] :]
    texts = answer_texts(page)
    assert len(texts) == 3 and texts[0] == words(prose.tokenizer.decode(ids))
    proven = page.query_selector(".certificate")
    assert 0 < float(proven.get_attribute("data-bound")) <= float(proven.get_attribute("data-tolerance")) == 0.05
    assert proven.get_attribute("data-outputs") == str(6 * 4 * 48)
    assert "tolerance 5 %" in proven.inner_text()
    for part in (".bounds .dots.bound", ".heads .cell", ".rungs .bar i.fast", ".memory td i.certified"):
        box = page.locator(f"{part} >> nth=0").bounding_box()
        assert box and box["width"] > 3 and box["height"] > 3, part
    page.fill("#prompt textarea", "  ")
    page.click("#compare")
    page.get_by_text("The prompt is empty").wait_for(timeout=20_000)
    page.fill("#prompt textarea", "word " * 5000)
    page.click("#compare")
    page.get_by_text("Shorten the prompt").wait_for(timeout=20_000)
    page.fill("#prompt textarea", "The old man")
    page.click("#compare")
    page.get_by_text("Use a longer prompt or an example").first.wait_for(timeout=20_000)


def test_the_page_fits_a_phone_and_an_example_runs(open_page: Callable[..., Any]) -> None:
    page = open_page(390, "dark")
    page.get_by_text("A hard needle").click()
    page.get_by_text("More settings").click()
    page.locator("#audit input").check()
    page.wait_for_function("document.querySelector('#prompt textarea').value.length > 20000")
    page.click("#compare")
    page.wait_for_selector('.certificate[data-done="true"] .dots.error', timeout=60_000)
    dense, naive, certified = answer_texts(page)
    assert dense == certified != naive and dense.startswith("royal-helmet")
    assert "true error" in page.locator(".certificate").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", background)[:3]) < 100
