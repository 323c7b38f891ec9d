"""The parts of `certkv eval`: how caches are named, statistics, texts and haystacks, each against something independent."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from hf_certkv import CertifiedQuantizedCache, CertKVConfig, ConfigError
from hf_certkv.embedded import FILLER_IDS, load_embedded
from hf_certkv.errors import InputError
from hf_certkv.evaluation import haystacks
from hf_certkv.evaluation.caches import CacheSpec, parse, parse_all
from hf_certkv.evaluation.statistics import discordant, mean_difference, perplexity_difference
from hf_certkv.evaluation.texts import Source

BOOK = " ".join(f"It was the {n}th evening, and the old man told the child of ship number {n}." for n in range(300))


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("dense", "dense", None),
        ("naive", "naive", CertKVConfig.naive()),
        ("certified", "certified", CertKVConfig()),
        ("paper:rtol=0.1", "paper rtol=0.1", CertKVConfig.paper(rtol=0.1)),
        ("certified:rtol=0.05,value_bits=8", "certified rtol=0.05 value_bits=8", CertKVConfig(rtol=0.05, value_bits=8)),
        ("mine=certified:scope=layer", "mine", CertKVConfig(scope="layer")),
        ("K8 V8=naive:value_bits=8", "K8 V8", CertKVConfig.naive(value_bits=8)),
        ("a=certified:hot_blocks=None,paper_canary=False", "a", CertKVConfig(paper_canary=False)),
    ],
)
def test_caches_by_name(text: str, name: str, settings: CertKVConfig | None) -> None:
    assert parse(text) == CacheSpec(name, settings)


def test_a_saved_config_is_a_cache(tmp_path: Path) -> None:
    settings = CertKVConfig(rtol=0.07, block_size=32)
    settings.to_json(tmp_path / "mine.json")
    settings.save_pretrained(tmp_path / "folder")
    assert parse(f"x={tmp_path / 'mine.json'}") == CacheSpec("x", settings)
    assert parse(f"y={tmp_path / 'folder'}:rtol=0.5") == CacheSpec("y", settings.replace(rtol=0.5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected dense"),
        ("fancy", "'fancy'"),
        ("dense:rtol=1", "no settings"),
        ("certified:rtol", "'rtol' is no setting"),
        ("certified:tolerance=1", "'tolerance'"),
    ],
)
def test_a_cache_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(text)


def test_a_setting_out_of_range_is_the_configs_error() -> None:
    with pytest.raises(ConfigError, match="rtol"):
        parse("certified:rtol=-1")


def test_the_dense_cache_is_always_there_and_first() -> None:
    assert [spec.name for spec in parse_all([])] == ["dense", "naive", "certified"]
    assert [spec.name for spec in parse_all(["naive"])] == ["dense", "naive"]
    assert [spec.name for spec in parse_all(["paper", "dense"])] == ["dense", "paper"]
    with pytest.raises(InputError, match="two are called 'naive'"):
        parse_all(["naive", "naive"])
    with pytest.raises(InputError, match="one dense cache"):
        parse_all(["dense", "x=dense"])


def test_an_audited_cache_keeps_its_settings_and_every_record() -> None:
    model, _ = load_embedded("retriever")
    made = parse("certified:rtol=0.5").make(model.config, audit=True)
    assert isinstance(made, CertifiedQuantizedCache)
    assert made.settings == CertKVConfig(rtol=0.5, record="full", audit=True)
    assert isinstance(parse("dense").make(model.config), DynamicCache)


def test_mcnemar_by_hand() -> None:
    # One pair better and nine worse: 2 * (C(10,0) + C(10,1)) / 2^10.
    ours = [True] + [False] * 9 + [True] * 5
    dense = [False] + [True] * 9 + [True] * 5
    assert discordant(ours, dense) == {"better": 1, "worse": 9, "p": pytest.approx(2 * 11 / 1024)}
    assert discordant(dense, dense) == {"better": 0, "worse": 0, "p": 1.0}


def test_the_bootstrap_is_seeded_paired_and_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(7)
    dense = rng.normal(3.0, 10.0, 400)
    ours = dense + rng.normal(0.5, 1.0, 400)
    found = mean_difference(ours.tolist(), dense.tolist(), seed=1)
    assert found == mean_difference(ours.tolist(), dense.tolist(), seed=1)
    assert found != mean_difference(ours.tolist(), dense.tolist(), seed=2)
    assert found["mean"] == pytest.approx(float((ours - dense).mean()))
    # Pairing takes the large spread of the items out: what is left has a standard error of 1 / sqrt(400).
    width = 1.96 * float((ours - dense).std()) / math.sqrt(400)
    assert found["low"] == pytest.approx(found["mean"] - width, abs=0.01)
    assert found["high"] == pytest.approx(found["mean"] + width, abs=0.01)


def test_intervals_of_few_or_equal_differences() -> None:
    assert mean_difference([1.0], [3.0], 0) == {"mean": -2.0, "low": None, "high": None}
    assert mean_difference([2.0, 3.0], [1.5, 2.5], 0) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_perplexities_are_exponentials_of_mean_likelihoods() -> None:
    found = perplexity_difference([1.0, 2.0, 3.0], [1.0, 2.0, 2.4], 0)
    assert found["mean"] == pytest.approx(math.exp(2.0) - math.exp(1.8))
    assert found["low"] is not None and found["high"] is not None
    assert 0 <= found["low"] < found["mean"] < found["high"]


def test_windows_of_a_text_lie_in_it_and_not_over_each_other(tmp_path: Path) -> None:
    _, tokenizer = load_embedded("prose")
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    source = Source.of(path, None)
    ids = tokenizer(BOOK).input_ids
    windows = source.windows(tokenizer, 500, 5)
    assert windows.shape == (5, 500)
    starts = [next(s for s in range(len(ids)) if ids[s : s + 500] == window.tolist()) for window in windows]
    assert starts[0] == 0 and starts[-1] == len(ids) - 500
    assert all(b - a >= 500 for a, b in pairwise(starts))
    with pytest.raises(InputError, match="give a longer text"):
        source.windows(tokenizer, 500, len(ids) // 500 + 1)
    assert source.describe()["text"] == "book.txt" and len(source.describe()["text_sha256"]) == 64


def test_windows_begin_with_the_models_opening_token() -> None:
    _, tokenizer = load_embedded("prose")

    class WithOpening:
        bos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
            found = tokenizer(text, add_special_tokens=False)
            found["input_ids"] = [0] * add_special_tokens + found["input_ids"]
            return found

    windows = Source(text=BOOK, file="x").windows(WithOpening(), 100, 3)  # type: ignore[arg-type]
    assert windows.shape == (3, 100) and windows[:, 0].tolist() == [0, 0, 0]
    assert windows[0, 1:].tolist() == tokenizer(BOOK).input_ids[:99]


def test_a_data_set_gives_few_windows_of_each_text(tmp_path: Path) -> None:
    _, tokenizer = load_embedded("prose")
    texts = [BOOK, "Too short.", BOOK[5000:], BOOK]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"book": text}) + "\n" for text in texts), encoding="utf-8")
    source = Source.of(None, str(tmp_path), "test", "book")
    windows = source.windows(tokenizer, 200, 6)
    assert windows.shape == (6, 200)
    assert windows[0].tolist() == tokenizer(texts[0]).input_ids[:200]
    assert windows[4].tolist() == tokenizer(texts[2]).input_ids[:200]
    with pytest.raises(InputError, match="has 12 windows"):
        source.windows(tokenizer, 200, 50)
    with pytest.raises(InputError, match="no text column 'text'; there are book"):
        Source.of(None, str(tmp_path), "test").windows(tokenizer, 200, 1)
    with pytest.raises(InputError, match="cannot be read"):
        Source.of(None, str(tmp_path / "nowhere"), "test").windows(tokenizer, 200, 1)


def test_texts_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for text, words in (
        (tmp_path / "no.txt", "No such file"),
        (tmp_path / "empty.txt", "empty"),
        (tmp_path / "bytes.txt", "utf-8"),
    ):
        with pytest.raises(InputError, match=words):
            Source.of(text, None)
    for text, dataset in ((None, None), (tmp_path / "empty.txt", "pg19")):
        with pytest.raises(InputError, match="expected one of"):
            Source.of(text, dataset)
    assert Source.of(None, "pg19").describe() == {"dataset": "emozilla/pg19-test", "split": "test", "column": "text"}


def test_facts_in_words_stand_at_their_depths() -> None:
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    hidden = haystacks.words(513, depths, "0/a")
    assert hidden.ids.shape == (1, 513) and hidden.answer_tokens == 1
    ids = hidden.ids[0].tolist()
    for question, depth in zip(hidden.questions, depths, strict=True):
        key = int(question.ids)
        place = ids.index(key)
        assert ids.count(key) == 1 and abs((place - 1) / 510 - depth) < 0.01
        assert question.right([ids[place + 1]]) and not question.right([ids[place + 1] + 1]) and not question.right([])
    assert sum(token not in FILLER_IDS for token in ids) == 2 * len(depths)
    again, other = haystacks.words(513, depths, "0/a"), haystacks.words(513, depths, "0/b")
    assert torch.equal(again.ids, hidden.ids) and not torch.equal(other.ids, hidden.ids)


def test_facts_at_one_depth_do_not_write_over_each_other() -> None:
    hidden = haystacks.words(64, [0.5] * 15, "s")
    assert sum(token not in FILLER_IDS for token in hidden.ids[0].tolist()) == 30
    with pytest.raises(InputError, match="need at least"):
        haystacks.words(61, [0.5] * 15, "s")


@pytest.mark.parametrize("text", [None, BOOK])
def test_facts_in_english_stand_at_their_depths(text: str | None) -> None:
    _, tokenizer = load_embedded("prose")
    depths = [0.0, 0.3, 0.6, 1.0]
    hidden = haystacks.english(tokenizer, 900, depths, "1", text)
    assert 800 < hidden.ids.shape[1] <= 900
    whole = tokenizer.decode(hidden.ids[0])
    for question, depth in zip(hidden.questions, depths, strict=True):
        asked = tokenizer.decode(question.ids[0])
        place = asked.split("The secret number of ")[1].removesuffix(" is")
        fact = whole.index(f"The secret number of {place} is ")
        number = whole[fact:].split(" is ")[1][:6]
        assert abs(fact / len(whole) - depth) < 0.12
        for answer, right in ((f" {number}.", True), (f" {number}5.", False), (" 1, or " + number, False), ("", False)):
            assert question.right(tokenizer(answer).input_ids) is right
        assert hidden.answer_tokens >= len(tokenizer(f" {number}.").input_ids)


def test_haystacks_that_do_not_fit() -> None:
    _, tokenizer = load_embedded("prose")
    with pytest.raises(InputError, match="facts alone"):
        haystacks.english(tokenizer, 10, [0.5], "1", None)
    with pytest.raises(InputError, match="fewer than the"):
        haystacks.english(tokenizer, 2000, [0.5], "1", "A short story.")
    with pytest.raises(InputError, match="at most 25"):
        haystacks.english(tokenizer, 2000, [0.5] * 26, "1", None)
