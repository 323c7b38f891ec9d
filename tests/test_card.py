"""Model cards: the figures are those of the runs, nothing in a run can break them, and what was not measured gets none."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from card_run import run_file
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from hf_certkv import CertKVConfig, InputError
from hf_certkv.cli_card import card
from hf_certkv.evaluation.caches import CacheSpec, parse
from hf_certkv.evaluation.card import BEGIN, END, make_card, with_section
from hf_certkv.evaluation.card_command import cache_option
from hf_certkv.evaluation.card_escape import escaped, fenced
from hf_certkv.evaluation.page_text import NONE, upward
from hf_certkv.evaluation.summary import summary as summary_of

CARDS = Path(__file__).parent.parent / "model_cards"
HOSTILE = [
    "a|b", "`x`", "<script>alert(1)</script>", "--- \n---\nlicense: evil\n---", f"{END} x {BEGIN}", "[x](javascript:alert(1))",
    "![i](http://e.vil/p.png)", "http://e.vil @someone www.e.vil", "a: b # c", "'\"\\", "~~x~~ **y** __z__", "x" * 3000,
    "\u202eabc\u2028d\x85e", "- a\n- b", "&lt;b&gt;", "{{ jinja }} {% x %}", "\\|", "$(rm -rf ~)", "```\n# evil\n```",
    "!!python/object:os.system", "\t\0",
]  # fmt: skip
MINUS = "\N{MINUS SIGN}"
APP = typer.Typer()
APP.command()(card)


def saved(folder: Path, run: dict[str, Any], name: str = "run.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a card as rows of plain cells, by a Markdown parser that knows nothing of how it was written."""
    out: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            out.append([])
        elif token.type == "tr_open":
            out[-1].append([])
        elif token.type == "inline" and token.level >= 4 and out:
            children = token.children or []
            out[-1][-1].append("".join(child.content for child in children))
    return out


def number(cell: str) -> float:
    """A figure of a cell; percent as a share."""
    value = float(re.sub(r"[ %+,<>]", "", cell).replace(MINUS, "-"))
    return value / 100 if "%" in cell else value


def body(text: str) -> str:
    return ModelCard(text).text


def test_the_figures_are_those_of_the_run(tmp_path: Path) -> None:
    run = run_file()
    text = make_card([saved(tmp_path, run)])
    main, detail = tables(body(text))
    rows = {row[0].split(" (")[0]: row for row in main[1:]}
    assert set(rows) == {"dense", "naive", "certified"}
    for name, row in rows.items():
        overall = run["summary"][name]["overall"]
        assert number(row[1]) == pytest.approx(overall["perplexity"], rel=1e-4)
        if name != "dense":
            change = overall["perplexity_difference"]
            assert number(row[2]) == pytest.approx(change["mean"], abs=0.005)
            low, high = row[3].split(" to ")
            assert number(low) == pytest.approx(change["low"], abs=0.005)
            assert number(high) == pytest.approx(change["high"], abs=0.005)
            assert number(row[9]) == pytest.approx(3 / 8)
        assert number(row[10].split(" ")[0]) == run["speed"][name]["over_dense"]["median"]
    certified = rows["certified"]
    assert [number(cell) for cell in certified[4:7]] == pytest.approx([7000 / 9000, 1900 / 9000, 100 / 9000], abs=0.0005)
    assert certified[7] == "4.99 %"  # 0.0498123, rounded up
    assert number(certified[8]) == pytest.approx(0.0498123 / 3, rel=5e-3)
    assert rows["naive"][4:9] == [NONE] * 5 and "nothing certified" in rows["naive"][0]
    assert len(detail) == 1 + 6
    for row in detail[1:]:
        part = run["summary"][row[1].split(" (")[0]]["contexts"][row[0].removesuffix(" tokens").replace(",", "")]
        assert number(row[2]) == part["items"] == 4
        assert number(row[3]) == pytest.approx(part["perplexity"], rel=1e-4)
        assert number(row[7]) == pytest.approx(part["same_top"])
    assert "9,000 head-steps, 77.8 % on the fast path" in text and "400 of the outputs" in text
    for fact in ("Intel(R) Xeon(R)", "2.13.0+cpu", "c0ffee", "2026-1-2", "4,951,296", "ab" * 32):
        assert fact in text


def test_right_or_wrong_scores_are_in_percent(tmp_path: Path) -> None:
    main, detail = tables(body(make_card([saved(tmp_path, run_file("needle"))])))
    naive = next(row for row in main if row[0].startswith("naive"))
    assert number(naive[1]) == 0.5 and naive[2] == f"{MINUS}50.0" and "percentage points" in main[0][2]
    assert naive[10] == NONE  # no times of this task
    row = next(row for row in detail if row[1].startswith("naive"))
    assert row[-3:] == ["0", "2", "0.50"]


def test_the_metadata_has_every_score_with_all_digits(tmp_path: Path) -> None:
    run, other = run_file(), run_file("needle")
    out = tmp_path / "CARD.md"
    out.write_text(make_card([saved(tmp_path, run), saved(tmp_path, other, "needle.json")]), encoding="utf-8")
    index = (metadata_load(out) or {})["model-index"]
    name, found = model_index_to_eval_results(index)
    assert name == "prose" and len(found) == 2 * 2 * 3
    assert eval_results_to_model_index(name, found) == index
    values = {(r.metric_type, r.dataset_config.split(",")[0 if r.metric_type == "accuracy" else 1].strip(), r.metric_config): r
              for r in found}  # fmt: skip
    for task, metric, key in ((run, "perplexity", "perplexity"), (other, "accuracy", "score")):
        for cache, summary in task["summary"].items():
            for context, part in summary["contexts"].items():
                result = values[metric, f"context {context}", f"{cache}, float32"]
                assert result.metric_value == part[key] and result.metric_args["items"] == 4
                change = part["perplexity_difference" if key == "perplexity" else "difference"]
                assert result.metric_args.get("difference_from_dense") == change
    assert ModelCard.load(out).data.pipeline_tag == "text-generation"
    certified = values["accuracy", "context 512", "certified, float32"]
    assert certified.metric_args["settings"] == {"rtol": 0.05, "value_bits": 8}


def test_a_base_keeps_its_text_and_metadata(tmp_path: Path) -> None:
    for name in ("prose.md", "retriever.md"):
        base = CARDS / name
        old, text = ModelCard.load(base), make_card([saved(tmp_path, run_file())], base)
        new = ModelCard(text)
        kept = old.text.split(BEGIN)[0].rstrip()
        assert kept and new.text.startswith(kept)
        index = ("model-index",)
        assert {k: v for k, v in new.data.to_dict().items() if k not in index} == {
            k: v for k, v in old.data.to_dict().items() if k not in index
        }


def test_the_same_runs_give_the_same_card(tmp_path: Path) -> None:
    runs = [saved(tmp_path, run_file()), saved(tmp_path, run_file("needle"), "needle.json")]
    card = tmp_path / "CARD.md"
    card.write_text("---\nlicense: mit\ntags: [b, a]\n---\n# Mine\n\nText.\n", encoding="utf-8")
    once = make_card(runs, card)
    card.write_text(once, encoding="utf-8")
    assert make_card(runs, card) == once
    assert once.count(BEGIN) == once.count(END) == 1 and "license: mit" in once and "# Mine\n\nText.\n" in once


def test_text_after_the_section_and_line_ends_stay(tmp_path: Path) -> None:
    base = tmp_path / "base.md"
    base.write_bytes(f"---\r\nlicense: mit\r\n---\r\n# A\r\n\r\n{BEGIN}replaced{END} tail\r\n\r\n## More\r\n".encode())
    text = make_card([saved(tmp_path, run_file())], base)
    assert "replaced" not in body(text) and text.endswith(f"{END} tail\r\n\r\n## More\r\n")
    assert "\n" not in text.replace("\r\n", "")


def test_results_are_replaced_where_they_are_of_the_same_thing(tmp_path: Path) -> None:
    base = tmp_path / "base.md"
    foreign = {
        "task": {"type": "text-generation", "name": "Other"},
        "dataset": {"name": "Data", "type": "org/data"},
        "metrics": [{"type": "accuracy", "value": 0.25, "name": "Acc"}],
    }
    base.write_text("---\n" + json.dumps({"model-index": [{"name": "Its name", "results": [foreign]}]}) + "\n---\n# A\n")
    run = run_file("needle")
    base.write_text(make_card([saved(tmp_path, run)], base), encoding="utf-8")
    changed = copy.deepcopy(run)
    for item in changed["items"]:
        item["scores"]["certified"]["score"] = 0.0
    changed["summary"]["certified"] = summary_of("certified", changed["items"], "needle", True, 0)
    text = make_card([saved(tmp_path, changed)], base)
    data = ModelCard(text).data
    assert data.model_name == "Its name"
    scores = {(r.dataset_config, r.metric_config): r.metric_value for r in data.eval_results}
    assert len(data.eval_results) == 1 + 6 and scores[None, None] == 0.25
    assert scores["context 512, depths 4", "certified, float32"] == 0.0
    assert scores["context 512, depths 4", "dense, float32"] == 1.0


def refused(tmp_path: Path, run: dict[str, Any], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        make_card([saved(tmp_path, run)])
    for word in words:
        assert word in str(caught.value)


def test_what_was_not_measured_gets_no_card(tmp_path: Path) -> None:
    run = run_file()
    refused(tmp_path, {**run, "complete": False}, "not complete", "same `certkv eval`")
    refused(tmp_path, {**run, "items": []}, "no items")
    refused(tmp_path, {"format": "other"}, "not a run file")
    generated = {key: run[key] for key in ("format", "version", "model", "environment", "caches", "certificates", "memory")}
    refused(tmp_path, {**generated, "kind": "generate", "text": "x"}, "generate", "no scores")
    with pytest.raises(InputError, match="no run file"):
        make_card([])
    with pytest.raises(InputError, match="cannot be read"):
        make_card([tmp_path / "nowhere.json"])


def test_a_summary_that_is_not_that_of_the_items_is_refused(tmp_path: Path) -> None:
    run = run_file()
    better = copy.deepcopy(run)
    better["summary"]["certified"]["overall"]["score"] = 2.5
    refused(tmp_path, better, "'certified'", "overall.score")
    for where, part, value in (("contexts.512.perplexity", "perplexity", 1.01), ("contexts.512.kl", "kl", 0.0)):
        other = copy.deepcopy(run)
        other["summary"]["certified"]["contexts"]["512"][part] = value
        refused(tmp_path, other, "'certified'", where)
    fewer = copy.deepcopy(run)
    del fewer["items"][3]["scores"]["certified"]
    refused(tmp_path, fewer, "an item has no score", "'certified'")
    for where in ("summary", "certificates"):
        less = copy.deepcopy(run)
        del less[where]["certified"]
        refused(tmp_path, less, "'certified'", "only what was measured")


def test_runs_without_a_certified_cache_or_of_other_models_are_refused(tmp_path: Path) -> None:
    run = run_file()
    baseline = {**run, "caches": run["caches"][:2]}
    for key in ("summary", "certificates", "speed"):
        baseline[key] = {name: part for name, part in run[key].items() if name != "certified"}
    baseline["memory"] = {}
    baseline["items"] = [
        {**item, "scores": {n: s for n, s in item["scores"].items() if n != "certified"}} for item in run["items"]
    ]
    refused(tmp_path, baseline, "no", "certified cache")
    first = saved(tmp_path, run)
    for key, value in (("name", "other"), ("revision", "abc"), ("parameters", 7)):
        other = saved(tmp_path, {**run_file("needle"), "model": {**run["model"], key: value}}, "other.json")
        with pytest.raises(InputError, match=f"model's {key}"):
            make_card([first, other])
    with pytest.raises(InputError, match="two runs"):
        make_card([first, first])


def test_one_certified_cache_of_several(tmp_path: Path) -> None:
    run = run_file()
    run["caches"].append({"name": "wide", "settings": CertKVConfig(rtol=0.1).to_dict()})
    for item in run["items"]:
        item["scores"]["wide"] = item["scores"]["certified"]
    for key in ("summary", "certificates", "speed"):
        run[key]["wide"] = copy.deepcopy(run[key]["certified"])
    path = saved(tmp_path, run)
    assert "wide" in make_card([path])
    main, _ = tables(body(make_card([path], caches=["certified"])))
    assert [row[0].split(" (")[0] for row in main[1:]] == ["dense", "naive", "certified"]
    with pytest.raises(InputError, match=r"'naive'.*'certified', 'wide'"):
        make_card([path], caches=["naive"])


@pytest.mark.parametrize("evil", HOSTILE, ids=lambda text: ascii(text)[:24])
def test_hostile_names_stay_text(evil: str, tmp_path: Path) -> None:
    run = run_file("needle")
    for name in ("summary", "certificates"):
        run[name] = {evil if key == "certified" else key: part for key, part in run[name].items()}
    run["memory"] = {}
    run["caches"][2]["name"] = evil
    for item in run["items"]:
        item["scores"][evil] = item["scores"].pop("certified")
    run["model"] |= {"name": evil, "type": evil, "dtype": evil, evil: evil}
    run["environment"] |= {"cpu": evil, "commit": evil, evil: evil}
    run["task"]["settings"] |= {"text": evil, "more": evil, evil: [evil]}
    run["task"]["metric"] |= {"label": evil, "name": evil, "unit": evil}
    plain = run_file("needle")
    base = tmp_path / "base.md"
    base.write_text("---\nlicense: mit\n---\n# A\n")
    text, usual = make_card([saved(tmp_path, run)], base), make_card([saved(tmp_path, plain)], base)
    base.write_text(text, encoding="utf-8")
    assert make_card([saved(tmp_path, run)], base) == text
    data = ModelCard(text).data
    assert data.license == "mit" and len(data.eval_results) == 6
    assert [[len(row) for row in table] for table in tables(body(text))] == [
        [len(row) for row in table] for table in tables(body(usual))
    ]
    assert body(text).count(BEGIN) == body(text).count(END) == 1
    kinds = [token.type for token in MarkdownIt("gfm-like", {"linkify": False}).parse(body(text))]
    assert kinds.count("html_block") == 2  # the markers
    assert kinds.count("fence") == 1 and kinds.count("heading_open") == 5
    inline = [c for t in MarkdownIt("gfm-like", {"linkify": False}).parse(body(text)) for c in t.children or []]
    assert {child.type for child in inline} <= {
        "text",
        "text_special",
        "code_inline",
        "strong_open",
        "strong_close",
        "softbreak",
    }
    assert max(len(line) for line in body(text).splitlines() if line.startswith("|")) < 3000


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_escaped_text_reads_as_it_was(text: str) -> None:
    shown = "".join(sign if sign.isprintable() else " " for sign in text).strip()
    (_, inline, _), *rest = [MarkdownIt().parse(f"x {escaped(text)} x")]
    assert not rest and "".join(child.content for child in inline.children or []).split() == f"x {shown} x".split()


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="`~<!-> a\n", max_size=30))
def test_a_fence_holds_whatever_it_holds(text: str) -> None:
    (token,) = MarkdownIt().parse(fenced([text]))
    assert token.type == "fence" and "<!--" not in token.content and "-->" not in token.content


@pytest.mark.parametrize("share", [0.0498123, 0.05, 0.01999999, 0.02, 1e-5, 3.21e-9, 0.9999, 1.0])
def test_bounds_never_look_smaller(share: float) -> None:
    shown = number(upward(share))
    assert share * (1 - 1e-12) <= shown <= share * 1.0101


def test_the_command_can_be_given_again(tmp_path: Path) -> None:
    """Its options exist, and its caches are those of the run."""
    from hf_certkv.cli_eval import app

    for task in ("ppl", "needle"):
        run = run_file(task)
        text = make_card([saved(tmp_path, run)])
        (line,) = re.findall(r"```bash\n(.*)\n```", text)
        words = shlex.split(line)
        assert words[:3] == ["certkv", "eval", task]
        command = typer.main.get_command(app).commands[task]  # type: ignore[attr-defined]
        given_options = command.make_context(task, words[3:]).params
        assert given_options["model"] == "prose" and given_options["context"] == "512,1024" and given_options["items"] == 4
        caches = [parse(option).to_dict() for option in given_options["cache"]]
        assert caches == run["caches"]


@pytest.mark.parametrize(
    "config",
    [CertKVConfig(), CertKVConfig(rtol=0.1, hot_blocks=3, scope="layer"), CertKVConfig.paper(), CertKVConfig.naive(atol=1e-4)],
    ids=["default", "changed", "paper", "naive"],
)
@pytest.mark.parametrize("name", ["certified", "mine", "paper's", "a b"])
def test_cache_options_make_the_same_cache(config: CertKVConfig, name: str) -> None:
    option = cache_option(name, config.to_dict())
    assert option is not None and parse(option) == CacheSpec(name, config)


def test_a_cache_that_no_option_makes_is_written_out(tmp_path: Path) -> None:
    assert cache_option("org/repo:x", CertKVConfig().to_dict()) is None
    assert cache_option("c", {"frobnicate": 1}) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("---\na: [\n---\n", "no model card"),
        ("---\n- a\n---\n", "no model card"),
        ("---\nmodel-index: 3\n---\n", "no model card"),
        ("---\nmodel-index: [{name: a, results: []}, {name: b, results: []}]\n---\n", "several models"),
        (f"# A\n{BEGIN}\n", "one of each"),
        (f"# A\n{END}\n{BEGIN}\n", "one of each"),
        (f"{BEGIN}{END}{BEGIN}{END}", "one of each"),
    ],
)
def test_a_base_that_is_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    base = tmp_path / "base.md"
    base.write_text(text)
    with pytest.raises(InputError, match=words):
        make_card([saved(tmp_path, run_file())], base)
    base.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no model card"):
        make_card([saved(tmp_path, run_file())], base)
    with pytest.raises(InputError, match="no such file"):
        make_card([saved(tmp_path, run_file())], tmp_path / "nowhere.md")


def test_a_section_goes_to_the_end_where_there_was_none() -> None:
    assert with_section("# A\n\n\n", "new\n") == f"# A\n\n{BEGIN}\n\nnew\n\n{END}\n"


def test_the_command_line(tmp_path: Path) -> None:
    run, out = saved(tmp_path, run_file()), tmp_path / "CARD.md"
    runner = CliRunner()
    result = runner.invoke(APP, [str(run), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    first = out.read_text(encoding="utf-8")
    assert first == make_card([run])
    again = runner.invoke(APP, [str(run), "--out", str(out)])
    assert again.exit_code == 2 and "--base" in again.stderr and out.read_text(encoding="utf-8") == first
    assert runner.invoke(APP, [str(run), "--out", str(out), "--base", str(out), "--cache", "certified"]).exit_code == 0
    assert out.read_text(encoding="utf-8") == first
    for arguments, word in (
        ([str(run), "--out", str(tmp_path / "no" / "CARD.md")], "cannot be written"),
        ([str(run), "--out", str(tmp_path / "x.md"), "--cache", "nope"], "'nope'"),
        ([str(tmp_path / "none.json"), "--out", str(tmp_path / "x.md")], "none.json"),
        ([str(run), "--out", str(tmp_path / "x.md"), "--base", str(tmp_path / "none.md")], "no such file"),
    ):
        failed = runner.invoke(APP, arguments)
        assert failed.exit_code == 2 and word in failed.stderr and failed.stderr.startswith("error: ")
        assert len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x.md").exists()


def test_a_path_of_this_machine_is_not_published(tmp_path: Path) -> None:
    run = run_file()
    run["model"]["name"] = "/home/someone/models/llama"
    text = make_card([saved(tmp_path, run)])
    assert "someone" not in text and "--model path/to/llama" in text and ModelCard(text).data.model_name == "llama"


@pytest.mark.parametrize(
    "path", sorted(path for path in CARDS.glob("*.md") if path.name != "README.md"), ids=lambda path: path.stem
)
def test_the_committed_cards_parse(path: Path) -> None:
    found = ModelCard.load(path)
    assert found.data.license == "apache-2.0" and found.data.library_name == "transformers" and found.data.pipeline_tag
    assert found.text.count(BEGIN) == found.text.count(END) <= 1
    results = found.data.eval_results or []
    assert bool(results) == (BEGIN in found.text)
    for result in results:
        assert isinstance(result.metric_value, float) and math.isfinite(result.metric_value)
    assert tables(found.text) or path.stem == "prose"
