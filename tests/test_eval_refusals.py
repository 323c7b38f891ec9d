"""What `certkv eval` must not measure, mix or lose: models without a cache, other weights, damaged and foreign parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_eval_runs import SOURCE, filled, prose
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM
from typer.testing import CliRunner

from hf_certkv import InputError, UnsupportedModelError
from hf_certkv.cli import app
from hf_certkv.embedded import embedded_path, load_embedded
from hf_certkv.evaluation.caches import parse_all
from hf_certkv.evaluation.checkpoint import Checkpoint
from hf_certkv.evaluation.divergence import Divergence
from hf_certkv.evaluation.evidence import Evidence
from hf_certkv.evaluation.needle import Needle
from hf_certkv.evaluation.perplexity import Perplexity
from hf_certkv.evaluation.run import Run
from hf_certkv.evaluation.summary import sums

TINY: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2}


def makers(model: Any, *caches: str) -> dict[str, Any]:
    return {spec.name: (lambda spec=spec: spec.make(model.config)) for spec in parse_all(list(caches))}  # type: ignore[misc]


def test_a_model_that_takes_no_cache_is_refused() -> None:
    model: Any = MambaForCausalLM(MambaConfig(**TINY, state_size=8))
    _, tokenizer = prose()
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM takes no cache"):
        Perplexity(model, tokenizer, SOURCE, (300,), 1, 5)
    with pytest.raises(UnsupportedModelError, match="takes no cache"):
        Needle(model, tokenizer, (300,), 1)


def test_more_tokens_than_the_model_was_made_for_are_refused() -> None:
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=64, n_layer=2, n_head=2, n_positions=128))
    _, tokenizer = prose()
    Perplexity(model, tokenizer, SOURCE, (128,), 1, 5)
    with pytest.raises(InputError, match="made for"):
        Perplexity(model, tokenizer, SOURCE, (129,), 1, 5)
    with pytest.raises(InputError, match="made for"):
        Divergence(model, tokenizer, SOURCE, (120,), 1, new_tokens=9)
    with pytest.raises(InputError, match="made for"):
        Needle(model, tokenizer, (120,), 1)  # the question comes on top


def test_a_hybrid_model_is_read_again_for_each_question() -> None:
    torch.manual_seed(0)
    options = {**TINY, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
    model: Any = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **options, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        )
    ).eval()  # fmt: skip
    _, tokenizer = prose()
    task = Needle(model, tokenizer, (300,), depths=2, needles=2)
    outcome = task.measure("300/0/0", makers(model, "exact=certified:rtol=0"))
    assert len(outcome.runs["dense"]) == 2
    for row in outcome.rows:
        assert row.scores["dense"]["text"] == row.scores["exact"]["text"]


def test_what_a_generation_config_asks_for_is_left_out() -> None:
    model, tokenizer = load_embedded("prose", dtype=torch.float32)
    plain = Divergence(model, tokenizer, SOURCE, (280,), 1, 6).measure("280/0", makers(model, "naive")).rows[0].scores
    model.generation_config.update(repetition_penalty=1.8, cache_implementation="static")
    same = Divergence(model, tokenizer, SOURCE, (280,), 1, 6).measure("280/0", makers(model, "naive")).rows[0].scores
    assert same == plain


def test_other_weights_in_the_same_folder_are_another_run() -> None:
    model, tokenizer = load_embedded("prose", dtype=torch.float32)
    task = Perplexity(model, tokenizer, SOURCE, (300,), 1, 6)
    specs = parse_all(["naive"])
    before = Run(task, specs, "prose").config_hash
    assert Run(task, specs, "prose").config_hash == before
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.up_proj.weight").mul_(1.01)
    assert Run(task, specs, "prose").config_hash != before


def run_and_part(tmp_path: Path, name: str = "run.json", last: int = 6) -> tuple[Run, Checkpoint]:
    model, tokenizer = prose()
    run = Run(Perplexity(model, tokenizer, SOURCE, (300,), 2, last), parse_all(["naive"]), "prose")
    return run, Checkpoint(tmp_path / name, run.config_hash)


def test_names_with_brackets_and_other_runs_parts_are_kept_apart(tmp_path: Path) -> None:
    run, checkpoint = run_and_part(tmp_path, "m[1].json")
    other, others = run_and_part(tmp_path, "m[1].json", last=7)
    run.execute(tmp_path / "m[1].json")
    other.execute(tmp_path / "m[1].json")
    assert len(checkpoint.load().pieces) == len(others.load().pieces) == 2
    run.clear(tmp_path / "m[1].json")
    assert not checkpoint.load().pieces and len(others.load().pieces) == 2


@pytest.mark.parametrize("damage", ["pieces", "row", "rows", "evidence"])
def test_a_damaged_part_with_the_right_hash_does_not_count(damage: str, tmp_path: Path) -> None:
    run, checkpoint = run_and_part(tmp_path)
    run.execute(tmp_path / "run.json")
    state = json.loads(checkpoint.path(0).read_text(encoding="utf-8"))
    progress = state["progress"]
    if damage == "pieces":
        progress["pieces"] = 3
    elif damage == "row":
        del progress["rows"][0]["scores"]
    elif damage == "rows":
        progress["rows"] = progress["rows"][:1]  # a piece without its row
    else:
        progress["evidence"]["naive"] = {}
    checkpoint.path(0).write_text(json.dumps(state), encoding="utf-8")
    assert checkpoint.load().rows == []
    assert run.execute(tmp_path / "run.json")["complete"]


def test_steps_of_a_prompt_read_in_small_parts_do_not_count() -> None:
    model, tokenizer = prose()
    whole = filled(Perplexity(model, tokenizer, SOURCE, (320,), 1, 5), "320/0")
    parts = filled(Perplexity(model, tokenizer, SOURCE, (320,), 1, 5, chunk=16), "320/0")
    assert parts.cache.report().to_dict()["overall"]["head_steps"] > 5 * 24
    for run in (whole, parts):
        evidence = Evidence(5)
        evidence.add(run.cache, run.taken)
        found = evidence.to_dict(run.cache.settings)
        assert found["overall"]["head_steps"] == 5 * 24 == sum(sum(counts) for counts in found["trace"]["rungs"].values())


def test_few_steps_are_not_timed() -> None:
    model, tokenizer = prose()
    assert Perplexity(model, tokenizer, SOURCE, (300,), 1, 3).measure("300/0", makers(model)).decode_ms is None
    assert Perplexity(model, tokenizer, SOURCE, (300,), 1, 4).measure("300/0", makers(model)).decode_ms is not None


def test_every_token_counts_the_same() -> None:
    items = [
        {"context": 16, "group": {}, "scores": {"dense": {"score": 2.0, "tokens": 15}, "x": {"score": 3.0, "tokens": 15}}},
        {"context": 1024, "group": {}, "scores": {"dense": {"score": 1.0, "tokens": 45}, "x": {"score": 1.0, "tokens": 45}}},
    ]
    found = sums("x", items, "ppl", False, 0)
    assert found["score"] == pytest.approx((15 * 3 + 45 * 1) / 60) and found["difference"]["mean"] == pytest.approx(15 / 60)
    assert found["difference"]["low"] == 0.0 and found["difference"]["high"] == 1.0
    by_hand = torch.tensor([(15 * 3 + 45) / 60, (15 * 2 + 45) / 60], dtype=torch.float64).exp()
    assert found["perplexity"] == pytest.approx(float(by_hand[0]))
    assert found["perplexity_difference"]["mean"] == pytest.approx(float(by_hand[0] - by_hand[1]))


def test_a_full_disk_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_certkv.evaluation.checkpoint.write_whole", full)
    out = tmp_path / "run.json"
    arguments = ["needle", "-m", str(embedded_path("retriever")), "--context", "300", "--depths", "1", "--json", str(out)]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 1 and "No space left" in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()
