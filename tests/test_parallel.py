"""Tensor- and data-parallel processes (gloo): the same tokens, rungs and totals as one process; nobody is left waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_generation, generate, prompt
from parallel_ranks import BARE_SETTINGS, KINDS, LENGTH, SETTINGS, SMALL, STEPS, bare_run, decoded, small_model

from hf_certkv import CertifiedQuantizedCache, gather_report
from hf_certkv.parallel import ALONE, ranks_of

MOST_SECONDS = 240
# Rungs that are surely among those of the heads: so ranks disagree.
SEEN: dict[str, set[str]] = {
    **{name: {"fast", "values"} for name in ("head", "head, reference", "full")},
    **{name: {"values", "dense_head"} for name in ("dense heads", "shared, strict")},
    "dense layers": {"dense_layer"},  # two of four heads are dense: the others follow
    "shared": {"values"},
    "hot": {"fast", "values"},
    "paper": {"keys", "values"},
    "naive": {"uncertified"},
}


def launch(scenario: str, processes: int, folder: Path) -> Any:
    """Run a scenario in processes of torchrun; what rank 0 found."""
    here = Path(__file__).resolve().parent / "parallel_ranks.py"
    torchrun(processes, str(here), scenario, str(folder))
    return torch.load(folder / f"{scenario}-{processes}.pt", weights_only=False)


def torchrun(processes: int, *command: str) -> str:
    """Run a Python file in processes of torchrun; what they print. They are ended if they wait for one another."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    started = subprocess.Popen(
        [*launcher, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = started.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGTERM)  # torchrun ends its processes, which are in sessions of their own
        said, _ = started.communicate(timeout=60)
        raise AssertionError(f"still waiting after {MOST_SECONDS} seconds: {said[-4000:]}") from None
    assert started.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        small_model(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ran(request: pytest.FixtureRequest, models: Path) -> tuple[int, dict[str, Any]]:
    """How many ranks, and what they found."""
    return request.param, launch("tensor_parallel", request.param, models)


@pytest.fixture(scope="module")
def both(models: Path) -> dict[str, Any]:
    """What two processes found that are no model's ranks: with whole models of their own, and with heads that they share."""
    return launch("two_processes", 2, models)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_generate_what_one_process_does(ran: tuple[int, dict[str, Any]], kind: str) -> None:
    ranks, found = ran[0], ran[1][kind]
    assert found["ranks"] == [tuple(range(ranks))] * 2
    assert_same_generation(found["zero"]["out"], found["dense"])
    for name, settings in SETTINGS.items():
        expected, actual = decoded(small_model(kind), settings), found[name]
        assert (expected["heads"], actual["heads"]) == (4, 4 // ranks)
        assert torch.equal(actual["out"].sequences, expected["out"].sequences), name
        for ours, theirs in zip(actual["out"].logits, expected["out"].logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if name == "zero" else 0.05)
        ours, theirs = actual["report"]["overall"], expected["report"]["overall"]
        assert ours["head_steps"] == theirs["head_steps"] == 2 * (STEPS - 1) * 8
        assert ours["calls"] == theirs["calls"] and ours["rungs"]["uncertified"] == 0
        # The model's own sums are in another order: an edge case may go the other way.
        assert all([abs(ours["rungs"][rung] - count) <= 4 for rung, count in theirs["rungs"].items()]), name
        assert actual["report"]["exact_head_steps"] == expected["report"]["exact_head_steps"]
    assert torch.equal(found["hooks"].sequences, found["dense"].sequences)


@pytest.mark.parametrize("name", BARE_SETTINGS)
def test_the_same_heads_give_the_same_decisions(ran: tuple[int, dict[str, Any]], name: str) -> None:
    """Equal keys, values and queries: outputs, rungs, figures and totals are those of one process to the last bit."""
    ranks, found = ran
    expected, actual = bare_run(0, 1, BARE_SETTINGS[name]), found["bare"][name]
    assert torch.equal(actual["output"], expected["output"])
    ours, theirs = actual["report"], expected["report"]
    assert ours["processes"] == ranks
    for part in ("overall", "layers", "steps", "exact_head_steps", "repaired_blocks", "materialised_operations"):
        assert ours[part] == theirs[part], part
    assert ours.get("records") == theirs.get("records")
    assert ours["memory"]["dense_bytes"] == theirs["memory"]["dense_bytes"]
    by_head = [{rung for rung, count in head["rungs"].items() if count} for head in theirs["layers"]["0"]["heads"]]
    assert set.union(*by_head) >= SEEN[name]


def test_all_ranks_fail_together_and_go_on(both: dict[str, Any]) -> None:
    found = both["failures"]
    peer = "PeerFailedError"
    for name in ("page", "page, promotions"):
        assert found[f"{name}: before"] == [("fine", 151)] * 2
        assert found[name] == [(peer, 150 + 1), ("CorruptedPageError", 150 + 1)]
        assert found[f"{name}: after"] == [("fine", 152)] * 2
    assert found["update"] == [(peer, 150), ("HostMemoryError", 150)]
    assert found["update: after"] == [("fine", 151)] * 2
    assert found["crop"] == [(peer, 151), ("CorruptedPageError", 151)]
    assert found["crop: after"] == [("fine", 92)] * 2
    assert torch.equal(*found["repaired"]["outputs"])
    assert found["repaired"]["repaired"] > 0 and found["repaired"]["steps"] == 2 * 2 * 8
    assert found["rollback"] == [([151], 150, [150]), ([150, 151], 150, [150])]


def test_data_parallel_processes_do_not_wait_and_add_up(both: dict[str, Any]) -> None:
    found = both["data_parallel"]
    own, whole = found["own"], found["whole"]
    assert found["alone"] and found["refused"]
    assert whole["processes"] == 2 and whole["steps"] == sum(part["steps"] for part in own)
    assert [part["overall"]["head_steps"] for part in own] == [2 * 8 * 5, 2 * 8 * 9]
    for name in ("head_steps", "promoted_key_blocks", "promoted_value_blocks", "bytes_moved", "calls"):
        assert whole["overall"][name] == sum(part["overall"][name] for part in own), name
    for rung, count in whole["overall"]["rungs"].items():
        assert count == sum(part["overall"]["rungs"][rung] for part in own)
    assert whole["overall"]["relative"]["bound"]["max"] == max(part["overall"]["relative"]["bound"]["max"] for part in own)
    assert whole["memory"]["dense_bytes"] == sum(part["memory"]["dense_bytes"] for part in own)
    assert "processes" not in own[0]


def test_one_process_agrees_with_itself() -> None:
    model = small_model("llama")
    assert ranks_of(model.config, model, None) is ALONE
    cache = CertifiedQuantizedCache(model.config, **SMALL)
    generate(model, prompt(LENGTH), 4, cache)
    assert gather_report(cache).to_dict() == cache.report().to_dict()


def test_the_example_runs(tmp_path: Path) -> None:
    """The embedded model, whose two KV heads two ranks share."""
    example = Path(__file__).resolve().parent.parent / "examples" / "tensor_parallel.py"
    said = torchrun(2, str(example), "--tokens", "8", "--json", str(tmp_path / "report.json"))
    assert "certificate: rtol=0.05" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2 and report["overall"]["head_steps"] == 6 * 4 * 7
    assert all(len(layer["heads"]) == 4 for layer in report["layers"].values())
