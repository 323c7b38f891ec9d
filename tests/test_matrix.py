"""`certkv matrix`: one architecture of each kind in every mode; and that it would notice what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import hf_certkv.matrix.examine as matrix_examine
from hf_certkv import CertifiedQuantizedCache, attention, written_out
from hf_certkv.cli import app
from hf_certkv.layers import CertifiedLayer
from hf_certkv.matrix.examine import (
    ABSENT,
    CERTIFIED,
    CRASHED,
    EXACT,
    FAILURES,
    PARTLY,
    REFUSED,
    WRONG,
    Examined,
    Found,
    examine,
)
from hf_certkv.matrix.modes import MODES
from hf_certkv.matrix.run import kinds, summary
from hf_certkv.matrix.table import page
from hf_certkv.matrix.tiny import architectures, tiny_config, tiny_model

# Modes that differ in what they ask of a cache; all are tried by the whole matrix (docs/models.md).
FEW = ("greedy", "beam", "prompt lookup", "padded batch", "second turn")
KINDS = kinds()


def test_kinds_cover_every_kind_of_layer() -> None:
    assert set(KINDS) < set(architectures())
    classes = {type(layer).__name__ for kind in KINDS for layer in CertifiedQuantizedCache(tiny_config(kind)).layers}
    wanted = {"CertifiedLayer", "CertifiedHybridLayer", "DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"}
    assert wanted | {"LinearAttentionLayer", "DummyLayer"} <= classes


@pytest.mark.parametrize("model_type", KINDS)
def test_one_architecture_of_each_kind(model_type: str) -> None:
    found = examine(model_type, {name: MODES[name] for name in FEW})
    assert not found.failed
    wrong = {name: mode for name, mode in found.modes.items() if mode.status in FAILURES}
    assert not wrong
    if found.full and found.offered:
        assert CERTIFIED in {mode.status for mode in found.offered.values()}
    elif found.offered:
        assert {mode.status for mode in found.offered.values()} == {EXACT}


def only(model_type: str, mode: str) -> Found:
    return examine(model_type, {mode: MODES[mode]}).modes[mode]


def test_a_wrong_output_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda call: attend(call) * (1 + 1e-6))
    found = only("llama", "greedy")
    assert found.status == WRONG and "rtol=0" in found.reason


def test_other_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda call: -attend(call))
    assert only("llama", "greedy").status == WRONG


def test_a_bound_that_lies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_certkv.kernels import reference

    decode_pass = reference.decode_pass

    def shifted(*args: Any, **kwargs: Any) -> Any:
        found = decode_pass(*args, **kwargs)
        found.output.mul_(1.5)
        return found

    monkeypatch.setattr(reference, "decode_pass", shifted)
    assert only("llama", "greedy").status == WRONG


@pytest.fixture
def _rules_again() -> Iterator[None]:
    """The rules are looked up anew, within the test and after it."""
    written_out._rules.cache_clear()
    yield
    written_out._rules.cache_clear()


@pytest.mark.usefixtures("_rules_again")
@pytest.mark.parametrize("rule", ["_scale", "_add"])
@pytest.mark.parametrize("model_type", ["gptj", "bloom"])
def test_a_wrong_meaning_is_noticed(rule: str, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a scale, or a mask, is not taken for what it is, the bound is of another attention."""
    right = getattr(written_out, rule)

    def wrong(*args: Any) -> Any:
        found = right(*args)
        if found is None:
            return None
        meaning = found.node.meaning
        changed = {"factor": 5 * meaning.factor} if rule == "_scale" else {"bias": None}
        found.node = dataclasses.replace(found.node, meaning=dataclasses.replace(meaning, **changed))
        return found

    monkeypatch.setattr(written_out, rule, wrong)
    if (rule, model_type) == ("_scale", "bloom"):  # which scales within its product
        assert only(model_type, "padded batch").status == CERTIFIED
    else:
        assert only(model_type, "padded batch").status == WRONG


def test_all_dense_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_examine, "SETTINGS", matrix_examine.SETTINGS.replace(rtol=1e-9))
    found = only("llama", "greedy")
    assert found.status == EXACT and found.dense == found.head_steps > 0


def test_every_second_call_is_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that share keys and values: there are more calls than updates."""
    certifiable, calls = attention.certifiable, []

    def refuse(call: Any) -> Any:
        calls.append(1)
        return certifiable(call) if len(calls) % 2 else None

    monkeypatch.setattr(attention, "certifiable", refuse)
    found = only("gemma3n_text", "greedy")
    assert found.status == PARTLY and 0.3 < found.share < 0.7


def test_a_crash_is_noticed_and_a_refusal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: CertifiedLayer, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("planted")

    monkeypatch.setattr(CertifiedLayer, "update", crash)
    found = only("llama", "greedy")
    assert found.status == CRASHED and found.reason == "KeyError: 'planted'"


def test_what_is_not_certified_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "certifiable", lambda call: None)
    found = only("llama", "greedy")
    assert found.status == EXACT and found.share == 0.0 and found.reason


def test_what_transformers_does_not_offer_is_told() -> None:
    found = only("bamba", "prompt lookup")
    assert found.status == ABSENT and "stateful" in found.reason


def test_a_refused_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_certkv import UnsupportedModelError

    def refuse(self: CertifiedQuantizedCache, config: Any) -> Any:
        raise UnsupportedModelError("planted")

    monkeypatch.setattr(CertifiedQuantizedCache, "_pick_layers", refuse)
    found = examine("llama")
    assert set(found.modes) == set(MODES) and {mode.status for mode in found.modes.values()} == {REFUSED}


def test_sums_count_what_they_say() -> None:
    made = [
        Examined("a", layers={"CertifiedLayer": 2}, modes={"x": Found(CERTIFIED, head_steps=5), "y": Found(ABSENT)}),
        Examined("b", layers={"CertifiedLayer": 2}, modes={"x": Found(CERTIFIED, head_steps=5, worst=0.5), "y": Found(EXACT)}),
        Examined("c", layers={"LinearAttentionLayer": 2}, modes={"x": Found(EXACT)}),
        Examined("d", layers={"CertifiedLayer": 1}, modes={"x": Found(WRONG, "w"), "y": Found(CRASHED, "z")}),
        Examined("e", failed="no"),
    ]
    sums = summary(made)
    assert (sums["architectures"], sums["built"], sums["with_full_attention"]) == (5, 4, 3)
    assert (sums["certified"], sums["partly_certified"], sums["head_steps"]) == (1, 1, 10)
    assert sums["worst_error_over_bound"] == 0.5 and sums["failures"] == ["d, x: WRONG: w", "d, y: CRASHED: z"]


def test_tiny_models_are_the_same_each_time() -> None:
    first, second = (tiny_model(tiny_config("gemma3_text")).state_dict() for _ in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert sum(part.numel() for part in first.values()) < 10_000_000


def test_the_command_writes_its_page(tmp_path: Path) -> None:
    out, markdown = tmp_path / "m.json", tmp_path / "m.md"
    arguments = ["matrix", "-m", "llama", "-m", "mamba", "--mode", "greedy", "--json", str(out), "--markdown", str(markdown)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert data["transformers"] == transformers.__version__ and data["summary"]["certified"] == 1
    text = markdown.read_text()
    assert "| llama | sdpa | 4 full |" in text and "| mamba |" in text
    assert page(data).splitlines()[0] == "# Models"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "lama"], "unknown model type 'lama'"),
        (["--mode", "fast"], "unknown mode 'fast'"),
        (["--quick", "-m", "llama"], "--quick chooses"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["matrix", *arguments])
    assert done.exit_code == 2 and words in done.stderr.replace("\n", " ")


def test_the_exit_code_tells_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend

    def off(call: Any) -> Tensor:
        return attend(call) + 1e-3

    monkeypatch.setattr(attention, "attend", off)
    done = CliRunner().invoke(app, ["matrix", "-m", "llama", "--mode", "greedy"])
    assert done.exit_code == 1 and "WRONG" in done.output
