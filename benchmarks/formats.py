"""What the defaults were chosen from: bound, fast-path share, true error, bytes and traffic by format and tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.audit import decode
from benchmarks.common import make_cache, passages, save, timed
from hf_certkv import CertKVConfig
from hf_certkv.config import Refine
from hf_certkv.embedded import load_embedded
from hf_certkv.plan import plan_bytes

ROWS, TOKENS, STEPS = 3, 1536, 24
TOLERANCES = (0.02, 0.05, 0.1)
SHAPES: list[dict[str, Any]] = [
    {"block_size": block, "value_bits": bits, "value_group": group}
    for block in (16, 32, 64, 128)
    for bits, group in ((4, 16), (4, 32), (4, 64), (8, 0))
]


def device_share(settings: CertKVConfig) -> float:
    """Device bytes over dense bf16 at head size 128 and 4K tokens, everything counted."""
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, head_dim=128, hidden_size=1024)
    planned = plan_bytes(config, 4096, 1, torch.bfloat16, settings)
    device = sum(size for name, size in planned.items() if not name.startswith("host_"))
    return device / (8 * 4096 * 256 * 2)


def measure(text: Path) -> None:
    """Fast-path bounds of every shape (uncertified, so that all steps stay on it); traffic of the refinement choices."""
    model, tokenizer = load_embedded("prose")
    rows = passages(tokenizer, text, ROWS, TOKENS + STEPS)
    result: dict[str, Any] = {"tokens": TOKENS, "formats": [], "refinement": []}
    for shape in SHAPES:
        settings = CertKVConfig.naive(refine="off", record="full", audit=True, **shape)
        cache = make_cache(model.config, settings)
        line: dict[str, Any] = dict(shape)
        with timed(line):
            decode(model, cache, rows[:, :TOKENS], rows[:, TOKENS:])
        cache.recorder.commit()
        figures = [record.relative() for record in cache.recorder.records]
        bound, error = (np.concatenate([part[name].ravel() for part in figures]) for name in ("candidate", "error"))
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            line[f"bound_{name}"] = float(np.quantile(bound, share))
        line["error_p50"], line["tightness_p50"] = float(np.median(error)), float(np.median(bound / error))
        line["fast_share"] = {str(limit): float((bound <= limit).mean()) for limit in TOLERANCES}
        for refine in get_args(Refine):
            line[f"device_over_dense_refine_{refine}"] = device_share(CertKVConfig(refine=refine, **shape))
        result["formats"].append(line)
        save("formats", result)
    for bits in (4, 8):
        for refine in get_args(Refine):
            for rtol in TOLERANCES:
                settings = CertKVConfig(rtol=rtol, refine=refine, value_bits=bits)
                cache = make_cache(model.config, settings)
                line = {"value_bits": bits, "refine": refine, "rtol": rtol}
                with timed(line):
                    decode(model, cache, rows[:, :TOKENS], rows[:, TOKENS:])
                report = cache.report()
                line["rung_share"] = report.rung_share
                moved = report.to_dict()["overall"]["bytes_moved"]
                originals = sum(layer.dense_nbytes() for layer in cache.certified_layers)
                line["moved_over_originals"] = moved / (STEPS * originals)
                line["device_over_dense"] = device_share(settings)
                result["refinement"].append(line)
                save("formats", result)
