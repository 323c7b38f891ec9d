"""What the fault parts share: a cache bit by bit, the settings of the process, a small model."""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .. import precision
from ..cache import CertifiedQuantizedCache
from ..errors import CacheStateError
from ..handle import KEYS, VALUES
from ..layers import CertifiedLayer

State = list[dict[str, Any]]

# Two layers, two query heads a KV head; `BASE` settings hold 32 exact tokens and blocks of 16.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "max_position_embeddings": 1024,
}
BASE: dict[str, Any] = {"block_size": 16, "exact_below": 0, "sink_blocks": 1, "recent_window": 16, "rtol": 0.03}


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings: the cache says every time that it has repaired something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def small_model(device: torch.device, seed: int = 0) -> LlamaForCausalLM:
    """A random model of two layers in evaluation mode."""
    config = LlamaConfig(**SMALL, attn_implementation="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return model.eval().to(device)


def token_ids(count: int, device: torch.device, batch: int = 1, seed: int = 0) -> Tensor:
    """Random token ids `[batch, count]`."""
    return torch.randint(2, 64, (batch, count), generator=torch.Generator().manual_seed(seed)).to(device)


def fresh_copy(cache: CertifiedQuantizedCache) -> CertifiedQuantizedCache:
    """The same tokens in a cache of its own, between steps."""
    return copy.deepcopy(cache)


def raw(x: Tensor | None) -> bytes | None:
    """The bytes of a tensor."""
    if x is None:
        return None
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def state_of(cache: CertifiedQuantizedCache, pages: bool = True) -> State:
    """Everything that layers hold, used parts only, bit for bit: tokens, codes, scales, numbers, planes, pages, checksums."""
    return [
        _layer_state(layer, pages)
        if isinstance(layer, CertifiedLayer)
        else {name: raw(part) for name, part in vars(layer).items() if isinstance(part, Tensor)}
        for layer in cache.layers
    ]


def _layer_state(layer: CertifiedLayer, pages: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        "tokens": layer.sequence_length,
        "blocks": layer.store.blocks,
        "initialised": layer.is_initialized,
        "sink": layer.sink_tokens,
    }
    if not layer.is_initialized:
        return state
    shadow = layer.shadow
    assert shadow is not None
    shadow._settle()
    state["sizes"] = (layer.batch, layer.heads, layer.widths, shadow.blocks, shadow.batch)
    for kind, name in ((KEYS, "keys"), (VALUES, "values")):
        exact = layer.exact[kind]
        state[f"exact {name}"] = raw(exact.view) if exact.length else b""
        for part, buffer in (layer.store.keys if kind == KEYS else layer.store.values).items():
            state[f"{name} {part}"] = raw(buffer.view) if buffer.data is not None and buffer.length else b""
        if pages:
            rows = [(shadow.slabs[row // shadow.rows_per_slab], row % shadow.rows_per_slab) for row in range(shadow.blocks)]
            state[f"pages {name}"] = b"".join(raw(slab.pages[kind][place]) or b"" for slab, place in rows)
            state[f"sums {name}"] = b"".join(slab.sums[kind][place].tobytes() for slab, place in rows)
    return state


def differences(actual: State, expected: State) -> list[str]:
    """What differs between two states, by layer and name."""
    found = []
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        names = sorted({*ours, *theirs})
        found += [f"layer {i} {name}" for name in names if ours.get(name) != theirs.get(name)]
    return found


def counts_of(cache: CertifiedQuantizedCache) -> dict[str, Any]:
    """What the report counts, by layer; a step under way becomes part of it."""
    cache.recorder.commit()
    counts: dict[str, Any] = {str(i): part.rungs.sum(axis=0).tolist() for i, part in sorted(cache.recorder.layers.items())}
    return {**counts, "exact": cache.recorder.exact_queries, "records": len(cache.recorder.records)}


def process_settings() -> dict[str, Any]:
    """What a step may change in the process, and has to put back."""
    backends = {str(i): backend.fp32_precision for i, backend in enumerate(precision._backends())}
    return {
        "precision": backends or torch.get_float32_matmul_precision(),
        "guards open": len(precision._inside),
        "autocast": torch.is_autocast_enabled("cpu"),
        "sigint": signal.getsignal(signal.SIGINT),
    }


LONGEST_WAIT = 60.0  # seconds, after which a lock counts as never to be released


def another_thread_is_served(cache: CertifiedQuantizedCache) -> bool:
    """Whether a thread that comes now is let in, and waits for no lock that was left taken."""
    served: list[bool] = []

    def come() -> None:
        try:
            with cache._one_thread(), precision.full_precision("cpu"):
                precision.float32_is_full()
                served.append(True)
        except CacheStateError:
            served.append(False)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    thread.join(LONGEST_WAIT)
    return served == [True]
