"""Correctness on a device: dense tokens bit for bit, and an audit of both embedded models. Says nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from benchmarks.audit import run
from benchmarks.common import greedy, make_cache
from hf_certkv import CertKVConfig
from hf_certkv.embedded import load_embedded, make_haystack
from hf_certkv.environment import describe

PROMPT_TOKENS, NEW_TOKENS, AUDIT_STEPS = 1024, 64, 40
FORMATS: tuple[dict[str, Any], ...] = ({}, {"refine": "off", "hot_blocks": 8}, {"refine": "device"}, {"value_bits": 8})


def dense_tokens_equal(model: Any, prompt: torch.Tensor) -> bool:
    """Whether rtol = 0 gives the logits of `DynamicCache`, bit for bit, over a greedy continuation."""
    outputs = [
        greedy(model, prompt, cache, NEW_TOKENS, output_logits=True, return_dict_in_generate=True)
        for cache in (DynamicCache(config=model.config), make_cache(model.config, CertKVConfig(rtol=0.0)))
    ]
    return all(torch.equal(ours, theirs) for ours, theirs in zip(outputs[0].logits, outputs[1].logits, strict=True))


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    out: Annotated[Path, typer.Option(help="folder for device.json")] = Path("."),
) -> None:
    """Check the cache on a device; exit status 1 where anything is wrong."""
    result: dict[str, Any] = {"machine": describe(), "device": device, "bit_identical": {}, "audit": []}
    if device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    for name in ("prose", "retriever"):
        for dtype in (torch.float32, torch.bfloat16):
            model, _ = load_embedded(name, dtype=dtype, device=device)
            hay = make_haystack(None, PROMPT_TOKENS, AUDIT_STEPS, seed=0)
            prompt = hay.input_ids.to(device)
            result["bit_identical"][f"{name}, {dtype}"] = dense_tokens_equal(model, prompt)
            keys = torch.tensor([[needle.key_id for needle in hay.needles]], device=device)
            for changes in FORMATS:
                settings = CertKVConfig(rtol=0.05, audit=True).replace(**changes)
                result["audit"].append({"model": name, "dtype": str(dtype), **run(model, prompt, keys, settings)})
            (out / "device.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    violations = sum(part["violations"] for part in result["audit"])
    steps = sum(part["head_steps"] for part in result["audit"])
    identical = all(result["bit_identical"].values())
    print(f"{device}: bit identical {identical}, {steps:,} head-steps audited, {violations} violations")
    raise typer.Exit(0 if identical and violations == 0 else 1)


if __name__ == "__main__":
    typer.run(main)
