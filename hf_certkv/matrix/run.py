"""`certkv matrix`: all architectures, or one of each kind, in several processes; the result as a dictionary."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..cache import CertifiedQuantizedCache
from ..environment import describe
from .examine import CERTIFIED, FAILURES, SETTINGS, Examined, examine, quiet
from .modes import MODES
from .tiny import architectures, tiny_config


def kinds() -> list[str]:
    """One architecture of each kind: of those with the same kinds of layers and the same way to call attention, the first."""
    seen: dict[tuple[Any, ...], str] = {}
    with quiet():
        for model_type in architectures():
            try:
                config = tiny_config(model_type)
                if config.get_text_config(decoder=True) is not config:
                    continue  # its text part has a name of its own
                layers = CertifiedQuantizedCache(config).layers
            except Exception:  # those are looked at by the whole matrix
                continue
            seen.setdefault((*sorted({type(layer).__name__ for layer in layers}), *_traits(config)), model_type)
    return sorted(seen.values())


def _traits(config: PreTrainedConfig) -> tuple[Any, ...]:
    """What decides which attention a model calls, and how."""
    text = config.get_text_config(decoder=True)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    names = ("attn_logit_softcapping", "sinks", "alibi", "kv_lora_rank")
    known = [bool(text.to_dict().get(name)) for name in names]
    return (bool(getattr(model, "_supports_sdpa", False)), *known)


def run(
    names: list[str],
    modes: list[str],
    workers: int = 1,
    attention: str | None = None,
    tell: Callable[[Examined], None] = lambda found: None,
) -> dict[str, Any]:
    """Examine architectures, in the order given; `tell` hears of each as it is done."""
    start = time.perf_counter()
    every = list(_examined(names, modes, workers, attention, tell))
    return {
        "machine": describe(),
        "seconds": time.perf_counter() - start,
        "workers": workers,
        "transformers": transformers.__version__,
        "settings": SETTINGS.to_dict(),
        "attention": attention,
        "modes": modes,
        "summary": summary(every),
        "architectures": [found.to_dict() for found in every],
    }


def _examined(
    names: list[str], modes: list[str], workers: int, attention: str | None, tell: Callable[[Examined], None]
) -> Iterator[Examined]:
    jobs = [(name, modes, attention) for name in names]
    if workers == 1:
        for job in jobs:
            found = _one(job)
            tell(found)
            yield found
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _alone) as pool:
        for found in pool.map(_one, jobs):
            tell(found)
            yield found


def _alone() -> None:
    torch.set_num_threads(1)


def _one(job: tuple[str, list[str], str | None]) -> Examined:
    name, modes, attention = job
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return examine(name, {mode: MODES[mode] for mode in modes}, attention)


def summary(every: list[Examined]) -> dict[str, Any]:
    """Counts of the whole matrix.

    "certified" counts architectures with full-attention layers whose cache transformers itself can serve in at least one mode,
    and that are certified in every mode that it can.
    """
    built = [found for found in every if not found.failed]
    full = [found for found in built if found.full and found.offered]
    status = Counter(mode.status for found in built for mode in found.modes.values())
    certified = [found for found in full if all(mode.status == CERTIFIED for mode in found.offered.values())]
    partly = [found for found in full if found not in certified and any(m.head_steps for m in found.offered.values())]
    return {
        "architectures": len(every),
        "built": len(built),
        "with_full_attention": len(full),
        "certified": len(certified),
        "partly_certified": len(partly),
        "certified_share": len(certified) / len(full) if full else 1.0,
        "head_steps": sum(mode.head_steps for found in built for mode in found.modes.values()),
        "worst_error_over_bound": max((mode.worst for found in built for mode in found.modes.values()), default=0.0),
        "modes_by_status": dict(status),
        "failures": [
            f"{found.model_type}, {name}: {mode.status}: {mode.reason}"
            for found in built
            for name, mode in found.modes.items()
            if mode.status in FAILURES
        ],
    }
