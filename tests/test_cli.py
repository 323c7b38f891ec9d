"""The `certkv` command, as a newcomer would use and misuse it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hf_certkv
from hf_certkv.cli import app
from hf_certkv.plan import plan_memory

PROMPT = "It was a dark evening, and the old man sat by the fire. " * 40  # some 600 tokens of prose


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def assert_one_clear_line(result: Any, *words: str) -> None:
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert result.stdout.strip() == ""


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"certkv {hf_certkv.__version__}"


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "generate", "plan", "verify", "bench", "matrix", "eval", "report", "card"):
        assert command in result.stdout


def test_the_command_is_installed_as_a_module() -> None:
    code = "from hf_certkv.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"certkv {hf_certkv.__version__}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_agrees_with_the_arithmetic(device: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig

    from hf_certkv.embedded import embedded_path

    file = tmp_path / "plan.json"
    options = ["--block-size", "32", "--dtype", "float16", "--device", device]
    result = run("plan", "-m", "prose", "-n", "4000", *options, "--json", str(file))
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    assert len(data["formats"]) == 6 and "K8 V4, refine=device" in result.stdout
    settings = hf_certkv.CertKVConfig(block_size=32, value_bits=8, refine="device")
    config = AutoConfig.from_pretrained(embedded_path("prose"))
    expected = plan_memory(config, 4000, 1, torch.float16, settings, device)
    assert (expected.parts["hot"] > 0) == (device == "cuda")
    assert data["formats"]["K8 V8, refine=device"] == expected.to_dict()
    assert data["dense_bytes"] == 4000 * 6 * 2 * 2 * 64 * 2  # tokens, layers, heads, keys and values, channels, bytes


def test_plan_of_a_local_folder_needs_no_weights(tmp_path: Path) -> None:
    from hf_certkv.embedded import embedded_path

    (tmp_path / "config.json").write_text((embedded_path("retriever") / "config.json").read_text())
    result = run("plan", "-m", str(tmp_path), "-n", "1000000000", "--batch", "8")
    assert result.exit_code == 0, result.stderr
    assert "bfloat16" in result.stdout and "GiB" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "-m", "prose", "-n", "0"], ["context=0"]),
        (["plan", "-m", "prose", "-n", "99999999999999999999"], ["context=99999999999999999999"]),
        (["plan", "-m", "prose", "-n", "100", "--batch", "0"], ["batch=0"]),
        (["plan", "-m", "prose", "-n", "100", "--block-size", "17"], ["block_size=17", "64"]),
        (["plan", "-m", "prose", "-n", "100", "--json", "no/folder/x.json"], ["no/folder"]),
        (["plan", "-m", "./nowhere", "-n", "100"], ["./nowhere", "no such folder"]),
        (["plan", "-m", "", "-n", "100"], ["'retriever'"]),
        (["generate", "-m", "prose", "-p", "a", "--prompt-file", "b"], ["--prompt-file", "one of them"]),
        (["generate", "-m", "prose", "--prompt-file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["generate", "-m", "prose", "-p", " \n"], ["empty"]),
        (["generate", "-m", "prose"], ["--prompt"]),
        (["generate", "-m", "prose", "-p", "a", "--rtol", "-1"], ["rtol=-1.0"]),
        (["generate", "-m", "prose", "-p", "a", "--rtol", "nan"], ["rtol=nan"]),
        (["generate", "-m", "prose", "-p", "a", "--value-bits", "5"], ["value_bits=5"]),
        (["generate", "-m", "prose", "-p", "a", "--temperature", "0"], ["--temperature"]),
        (["generate", "-m", "/nowhere", "-p", "a"], ["/nowhere"]),
        (["demo", "--rtol", "-1"], ["rtol=-1.0"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_misuse_is_one_line(arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_clear_line(run(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    assert_one_clear_line(run("plan", "-m", str(tmp_path), "-n", "100"), "cannot be loaded")


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xff\xfe\x00")
    assert_one_clear_line(run("generate", "-m", "prose", "--prompt-file", str(file)), "prompt.txt")


@pytest.mark.parametrize("arguments", [["plan", "--colour"], ["generate", "-m", "prose", "--max-new-tokens", "0"], ["dem"]])
def test_wrong_options_end_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_generate_writes_text_and_report(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = run(
        "generate", "-m", "prose", "-p", PROMPT, "--max-new-tokens", "8", "--rtol", "0.1", "--scope", "layer",
        "--audit", "--dtype", "float32", "--json", str(file),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    assert len(data["token_ids"]) == 8 and data["prompt_tokens"] > 400
    assert data["text"].strip() == result.stdout.strip()
    certificate = data["certificates"]["certified"]
    assert certificate["settings"]["rtol"] == 0.1 and certificate["settings"]["scope"] == "layer"
    assert certificate["overall"]["head_steps"] == 7 * 6 * 4  # the first token comes from the prefill
    assert certificate["overall"]["relative"]["error"]["max"] <= 0.1
    assert certificate["trace"]["steps"] == 7 and len(certificate["trace"]["rows"]) == 6 * 4
    assert "certificate: rtol=0.1" in result.stderr and "certificate" not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_generate_reads_a_pipe_of_one_token_and_says_that_nothing_was_quantised() -> None:
    result = run("generate", "-m", "prose", "--max-new-tokens", "3", stdin="The")
    assert result.exit_code == 0, result.stderr
    assert "Nothing was quantised" in result.stderr


def test_sampling_is_repeatable_and_naive_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    arguments = ["generate", "-m", "prose", "--prompt-file", str(file), "--max-new-tokens", "6", "--temperature", "1.5"]
    one, same, other = (run(*arguments, "--policy", "naive", "--seed", seed) for seed in ("1", "1", "2"))
    assert one.exit_code == 0, one.stderr
    assert one.stdout == same.stdout != other.stdout
    assert "note: CertKVConfig.naive() certifies NOTHING" in one.stderr and "UNCERTIFIED" in one.stderr


def test_an_interrupt_leaves_no_traceback_and_no_file(tmp_path: Path) -> None:
    code = "from hf_certkv.cli import app; app()"
    arguments = ["generate", "-m", "prose", "-p", PROMPT, "--max-new-tokens", "3000", "--json", str(tmp_path / "x.json")]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)  # the text has begun
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "error: stopped." in errors
    assert list(tmp_path.iterdir()) == []


def test_demo_in_a_reduced_form(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = run("demo", "--tokens", "1024", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "report.json"]
    assert (out / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data = json.loads((out / "report.json").read_text())
    runs = data["runs"]
    assert runs["easy"]["dense"]["answers"] == runs["easy"]["certified"]["answers"] == data["right_answers"]
    for task in runs.values():
        relative = task["certified"]["report"]["overall"]["relative"]
        assert relative["error"]["max"] <= relative["bound"]["max"] <= data["rtol"]
        assert task["certified"]["report"]["records"]
    for word in ("dense", "naive", "certified", "certificate: rtol=0.02", "memory", "demo.png", "report.json"):
        assert word in result.stdout
