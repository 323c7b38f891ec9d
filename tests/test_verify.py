"""`certkv verify`: the scorecard, its command, and that it fails when something is broken."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick_interpreter
import torch
from typer.testing import CliRunner

from hf_certkv import InputError, bounds, device_decode, shadow
from hf_certkv.cli import app
from hf_certkv.errors import MissingDependencyError
from hf_certkv.verify import bit_flips, cases, fuzz, kernel, planted_bugs, relations, scorecard
from hf_certkv.verify.faults_state import quiet
from hf_certkv.verify.parts import Clock, Part
from hf_certkv.verify.scorecard import NAMES, verify

WITNESS = Path(__file__).parents[1] / "benchmarks" / "witnesses" / "closest.safetensors"


quick_interpreter.install()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["verify", *arguments])


def test_a_short_run_passes_and_writes_what_it_printed(tmp_path: Path) -> None:
    out = tmp_path / "card.json"
    result = run("--minutes", "0", "--only", "fuzz", "--only", "relations", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "nothing was broken" in result.stdout
    card = json.loads(out.read_text())
    assert card["passed"] is True and set(card["parts"]) == {"fuzz", "relations"}
    assert card["machine"]["torch"] == torch.__version__
    for part in card["parts"].values():
        assert part["checked"] > 0 and part["failed"] == 0
        assert f"{part['checked']:,}" in result.stdout


def test_a_broken_bound_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = bounds.value_error
    monkeypatch.setattr(bounds, "value_error", lambda *given: original(*given) / 4)
    result = run("--minutes", "0", "--only", "search", "--save-to", str(tmp_path / "found"))
    assert result.exit_code == 1
    assert "SOMETHING WAS BROKEN" in result.stdout
    assert list((tmp_path / "found").glob("*.safetensors"))


def test_a_part_that_breaks_down_is_a_failure_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(clock: Clock, device: torch.device, seed: int) -> Part:
        raise ZeroDivisionError("of all things")

    entries = (scorecard.Entry("broken", 1.0, broken), scorecard.Entry("relations", 1.0, relations.run))
    monkeypatch.setattr(scorecard, "ENTRIES", entries)
    card = verify(0.0)
    assert not card.passed
    assert [part.passed for part in card.parts] == [False, True]
    assert "of all things" in card.parts[0].failures[0]


def test_a_part_that_checks_nothing_does_not_pass() -> None:
    assert not Part("empty", "nothing", "things").passed
    skipped = Part("skipped", "nothing", "things", skipped="no reason")
    assert not scorecard.Scorecard((skipped,), 0.0, "cpu", 0, 0.0).passed


def test_plants_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        number = 1

    class Derived(Base):
        other = 2

    patches = planted_bugs.Patches()
    for value in (5, 6):
        patches.setattr(Derived, "number", value)
        patches.setattr(Derived, "other", value)
    assert (Derived.number, Derived.other) == (6, 6)
    patches.undo()
    assert (Derived.number, Derived.other) == (1, 2) and "number" not in Derived.__dict__


def test_without_the_repository_planted_bugs_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planted_bugs, "TESTS", tmp_path)
    part = planted_bugs.run(Clock(0.0), torch.device("cpu"), 0)
    assert part.checked == 0 and "clone" in part.skipped


def test_a_survivor_fails_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = planted_bugs.load()
    assert registry is not None
    plant = next(iter(registry.PLANTS.values()))
    harmless = type(plant)("harmless", plant.where, "nothing at all", lambda patch: None, list)
    monkeypatch.setattr(registry, "PLANTS", {"harmless": harmless})
    monkeypatch.setattr(planted_bugs, "load", lambda: registry)
    part = planted_bugs.run(Clock(0.0), torch.device("cpu"), 0)
    assert part.failed == 1 and "nothing at all" in part.failures[0]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"only": ("fuz",)}, "fuzz"),
        ({"device": "tpu9"}, "device"),
        ({"minutes": -1.0}, "minutes"),
        ({"minutes": float("nan")}, "minutes"),
        ({"workers": 0}, "workers"),
        ({"head_steps": 0}, "head_steps"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_any_work(given: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        verify(**{"minutes": 0.0, **given})


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    missing = tmp_path / "no"
    for arguments in (("--only", "fuz"), ("--replay", str(missing)), ("--json", str(missing / "card.json"))):
        result = run("--minutes", "0", *arguments)
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")


def test_a_witness_is_replayed() -> None:
    result = run("--replay", str(WITNESS))
    assert result.exit_code == 0, result.output
    share = float(result.stdout.split("error / bound:")[1].split()[0])
    assert 0.9 < share <= 1


def test_names_are_those_of_the_parts() -> None:
    assert len(set(NAMES)) == len(NAMES) == 7


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hf_certkv.verify")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flint", None)
    result = run("--minutes", "0")
    assert result.exit_code == 2
    assert "hf_certkv[verify]" in result.stderr


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is settled before the start: a typed error says so, before any work."""
    pytest.importorskip("triton")
    pytest.importorskip("hf_certkv.kernels.triton_step")  # with which functions the kernels are made is settled by now
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        verify(0.0, kernel_name="triton")
    for arguments in (("--minutes", "0"), ("--replay", str(WITNESS))):
        result = run(*arguments, "--kernel", "triton")
        assert result.exit_code == 2 and "TRITON_INTERPRET=1" in result.stderr
    monkeypatch.setattr(device_decode, "installed", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"hf_certkv\[gpu\]"):
        verify(0.0, kernel_name="triton")


def test_with_triton_its_kernels_compute_and_all_is_put_back() -> None:
    """Whatever a cache's own setting is; elsewhere they are not asked, whatever that is."""
    pytest.importorskip("triton")
    case = triton_case()
    for wanted, used in (("reference", "reference"), ("triton", "triton")):
        for setting in ("reference", "triton"):
            with kernel.using(wanted):
                assert cases.run(replace(case, settings={**case.settings, "kernel": setting}))[1].kernel == used
    assert not (device_decode.FORCED or shadow.DEVICE_SUMS) and kernel.chosen() == "auto"
    card = verify(0.0, only=("fuzz",), kernel_name="triton", seed=2)
    assert card.passed and card.kernel == "triton", [part.failures for part in card.parts]
    assert card.parts[0].figures["head_steps_by"]["kernel"].get("triton", 0) > 0


def test_a_call_that_triton_was_to_compute_and_did_not_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with kernel.using("triton"):
        monkeypatch.setattr(device_decode, "supports", lambda layer, call: False)
        found = fuzz.told(0, 0, torch.device("cpu"))
    assert found.breaches and "computed by" in found.breaches[0]


def test_a_damaged_page_is_right_only_as_nan_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Triton kernels the error comes late: a step that is not told of, or gives numbers, fails the part."""
    pytest.importorskip("triton")
    with kernel.using("triton"), quiet():
        subject = bit_flips.Subject(bit_flips.FORMATS_OF_TRITON[0], torch.device("cpu"), 0, 1, heads=1, changes={"rtol": 1e-7})
        expected = subject.copy().step()
        page = bit_flips.PagePlace(0, False, 0, 0, 0, 77)
        monkeypatch.setattr(bit_flips, "random_page", lambda layer, rng: page)

        def failures() -> list[str]:
            part = Part("page", "", "")
            bit_flips._step_over_page(part, Counter(), subject, expected, np.random.default_rng(0))
            return part.failures

        assert failures() == []
        called = bit_flips.Subject.called
        monkeypatch.setattr(bit_flips.Subject, "called", lambda self: called(self).nan_to_num())
        assert "not NaN" in failures()[0]
        monkeypatch.setattr(bit_flips.Subject, "called", called)
        monkeypatch.setattr(bit_flips.Subject, "looked_at", lambda self: None)
        assert "another output" in failures()[0]


def triton_case() -> cases.Case:
    """One head over one block."""
    q, k, v = cases.tensors("normal", torch.float32, 17, 16, 16, 1, 1, 0, 1, 1)
    return cases.Case(q, k, v, settings={"rtol": 0.5})
