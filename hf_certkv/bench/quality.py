"""The embedded models with real prompts: time of a decode step, and in a second, untimed pass what the audit finds.

Both passes feed the same tokens to every system: for `retriever` the names of facts in its haystack, for `prose` the rest of a
passage that it wrote itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..config import CertKVConfig
from ..embedded import EMBEDDED, load_embedded, make_haystack
from .decode_step import step
from .harness import Timer, describe_failure
from .rows import Row, evidence, timed_rows
from .systems import DYNAMIC, OURS, PEER, System, certified

OPENING = "It was a dark evening, and the old man sat by the fire"
TEMPERATURE, LIKELIEST = 0.8, 50


def measure(
    context: int, audited: int, systems: list[System], timer: Timer, device: torch.device, seed: int, tell: Any
) -> list[Row]:
    """Rows by model and system; `audited`: steps of the second pass."""
    rows: list[Row] = []
    for name in EMBEDDED:
        tell(f"{name}, {context:,} tokens")
        model, tokenizer = load_embedded(name, device=device)
        steps = max(audited, timer.warmup + timer.rounds)
        if name == "retriever":
            hay = make_haystack(None, context, steps, seed=seed)
            prompt, ids = hay.input_ids, torch.tensor([[needle.key_id for needle in hay.needles]])
        else:
            text = passage(model, tokenizer, context + steps, seed)
            prompt, ids = text[:, :context], text[:, context:]
        rows += _model(name, model, prompt.to(device), ids.to(device), audited, systems, timer)
    return rows


def passage(model: Any, tokenizer: Any, tokens: int, seed: int) -> Tensor:
    """A text that the model writes, sampled: int64 `[1, tokens]`, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    ids: Tensor = tokenizer(OPENING, return_tensors="pt").input_ids
    written, new = ids, ids
    while written.shape[1] < tokens:
        logits = model(input_ids=new.to(model.device), past_key_values=cache, logits_to_keep=1).logits[0, -1].float().cpu()
        logits[model.config.eos_token_id] = -torch.inf
        top = (logits / TEMPERATURE).topk(LIKELIEST)
        new = top.indices[torch.multinomial(top.values.softmax(dim=-1), 1, generator=generator)].view(1, 1)
        written = torch.cat([written, new], dim=1)
    return written[:, :tokens]


def _model(name: str, model: Any, prompt: Tensor, ids: Tensor, audited: int, systems: list[System], timer: Timer) -> list[Row]:
    config = model.config
    place: Row = {
        "model": name, "context": prompt.shape[1], "head_dim": config.head_dim, "batch": 1, "layers": config.num_hidden_layers
    }  # fmt: skip
    caches, failed = {}, {}
    for system in systems:
        try:
            caches[system.name] = read(model, system.make(config), prompt)
        except Exception as error:
            if system.kind != PEER:
                raise
            failed[system.name] = describe_failure(error)
    tolerated = [system.name for system in systems if system.kind == PEER]
    samples = timer.run({key: step(model, cache, ids) for key, cache in caches.items()}, tolerated=tolerated)
    samples.failed.update(failed)
    rows = timed_rows(place, samples, DYNAMIC)
    for system in systems:
        if system.kind == OURS:
            rows[system.name].update(_audited(model, system, prompt, ids[:, :audited]))
    return list(rows.values())


def read(model: Any, cache: Any, prompt: Tensor) -> Any:
    """Prefill in one pass."""
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _audited(model: Any, system: System, prompt: Tensor, ids: Tensor) -> Row:
    """Decode again with every output compared with float64 attention over the originals.

    Raises: CertificateViolation: an error above its bound, which would be a bug of this package.
    """
    audited = certified(system.name, CertKVConfig.from_dict({**system.settings, "audit": True}))
    cache = audited.make(model.config)
    call = step(model, read(model, cache, prompt), ids)
    for _ in range(ids.shape[1]):
        call()
    return {**evidence(cache), "violations": 0, "audited_steps": ids.shape[1]}
