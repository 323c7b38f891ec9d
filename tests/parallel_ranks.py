"""What the processes of test_parallel.py do: `torchrun parallel_ranks.py SCENARIO FOLDER`. Rank 0 leaves what it found."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import build_model, generate, prompt
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from hf_certkv import (
    CertifiedQuantizedCache,
    ConfigError,
    CorruptedPageError,
    HostMemoryError,
    InputError,
    PeerFailedError,
    gather_report,
)
from hf_certkv.layers import CertifiedLayer
from hf_certkv.parallel import ALONE, Ranks

LENGTH, STEPS = 200, 16
SMALL: dict[str, Any] = {"block_size": 16, "recent_window": 8, "exact_below": 0}
KINDS = ("llama", "qwen3")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"rtol": 0.05},
    "zero": {"rtol": 0.0},
    "shared": {"rtol": 0.02, "scope": "layer"},
}
BARE = LlamaConfig(num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, head_dim=32, hidden_size=256)
BARE_STEPS = 10
# Each makes ranks disagree: some heads are easy and some are not.
BARE_SETTINGS: dict[str, dict[str, Any]] = {
    "head": {"rtol": 0.02},
    "head, reference": {"rtol": 0.02, "kernel": "reference"},
    "dense heads": {"rtol": 0.003, "dense_layer_share": 0.6},
    "dense layers": {"rtol": 0.003, "dense_layer_share": 0.3},
    "shared": {"rtol": 0.01, "scope": "layer"},
    "shared, strict": {"rtol": 0.001, "atol": 1e-4, "scope": "layer", "kernel": "reference"},
    "hot": {"rtol": 0.02, "hot_blocks": 3},
    # A head of this policy that has moved more than a fair share goes dense when another one fails: not so here.
    "paper": {"rtol": 0.05, "policy": "paper", "value_group": 16, "refine": "off", "dense_head_share": 1.0},
    "full": {"rtol": 0.02, "record": "full", "audit": True},
    "naive": {"policy": "naive"},
}


def small_model(kind: str) -> Any:
    """Eight query heads, four KV heads."""
    return build_model(kind, num_attention_heads=8, num_key_value_heads=4, head_dim=32)


def decoded(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and logits, and what all ranks report."""
    cache = CertifiedQuantizedCache(model.config, **SMALL, **settings)
    return {
        "out": plain(generate(model, prompt(LENGTH), STEPS, cache)),
        "report": gather_report(cache).to_dict(),
        "heads": cache.certified_layers[0].heads,
    }


def plain(out: Any) -> Any:
    """A generation without its cache, which cannot be pickled."""
    return SimpleNamespace(sequences=out.sequences, logits=out.logits)


def states(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[2, 8, tokens, 32]`, keys and values `[2, 4, tokens, 32]`: the last heads are harder than the first."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, heads, tokens, 32, generator=generator) for heads in (8, 4, 4))
    key = key * torch.tensor([0.02, 0.1, 0.5, 2.0]).view(1, 4, 1, 1)
    value = value + torch.tensor([3.0, 1.0, 0.0, 0.0]).view(1, 4, 1, 1)
    return query, key, value


class Heads:
    """A cache of one layer that is given the heads of one rank, and their shares of whole tensors."""

    def __init__(self, rank: int, ranks: int, **settings: Any) -> None:
        self.rank, self.ranks = rank, ranks
        group = dist.group.WORLD if ranks > 1 else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the naive baseline says what it is
            self.cache = CertifiedQuantizedCache(BARE, process_group=group, **{**SMALL, **settings})
        _, key, value = (self.mine(part) for part in states(150, 0))
        self.cache.update(key, value, 0)

    def mine(self, part: Tensor) -> Tensor:
        """This rank's heads."""
        return part.chunk(self.ranks, dim=1)[self.rank].contiguous()

    def step(self, seed: int) -> Tensor:
        """One decode step: `[2, heads, 1, 32]`."""
        query, key, value = (self.mine(part) for part in states(1, seed))
        keys, values = self.cache.update(key, value, 0)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    @property
    def layer(self) -> CertifiedLayer:
        """The only one."""
        return self.cache.certified_layers[0]

    def all_heads(self, part: Tensor) -> Tensor:
        """A tensor of this rank's heads as all ranks' heads."""
        if self.ranks == 1:
            return part
        every: list[Any] = [None] * self.ranks
        dist.all_gather_object(every, part)
        return torch.cat(every, dim=1)


def bare_run(rank: int, ranks: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Outputs of ten decode steps, all heads, and the report."""
    heads = Heads(rank, ranks, **settings)
    output = torch.cat([heads.all_heads(heads.step(seed)) for seed in range(1, BARE_STEPS + 1)], dim=2)
    return {"output": output, "report": gather_report(heads.cache).to_dict()}


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Every model and setting."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(folder / kind, tp_plan="auto")
        found[kind] = {name: decoded(model, settings) for name, settings in SETTINGS.items()}
        found[kind]["dense"] = plain(generate(model, prompt(LENGTH), STEPS, DynamicCache(config=model.config)))
        found[kind]["hooks"] = hooked(model)
        by_model, by_config = (CertifiedQuantizedCache(given) for given in (model, model.config))
        found[kind]["ranks"] = [getattr(cache.ranks, "members", None) for cache in (by_model, by_config)]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found["bare"] = {name: bare_run(rank, ranks, settings) for name, settings in BARE_SETTINGS.items()}
    return found


def hooked(model: Any) -> Any:
    """With prefetching around the layers, and hot slots to prefetch into."""
    cache = CertifiedQuantizedCache(model=model, rtol=0.02, hot_blocks=2, **SMALL)
    return plain(generate(model, prompt(LENGTH), STEPS, cache))


def outcome(heads: Heads, seed: int) -> str:
    """The error of a step, or "fine"."""
    try:
        heads.step(seed)
    except (CorruptedPageError, HostMemoryError, InputError, PeerFailedError) as error:
        return type(error).__name__
    return "fine"


def failures() -> dict[str, Any]:
    """One rank fails in different places; then all go on. Each entry: per rank, how the step ended, and the length after it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}

    def tell(name: str, heads: Heads, ended: str) -> None:
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, (ended, heads.cache.get_seq_length()))
        found[name] = every

    def page(heads: Heads) -> Tensor:
        assert heads.layer.shadow is not None
        return heads.layer.shadow.slabs[0].pages[0]

    for name, settings in {"page": {"rtol": 0.0}, "page, promotions": {"rtol": 0.005}}.items():
        heads = Heads(rank, ranks, **settings)
        tell(f"{name}: before", heads, outcome(heads, 1))
        saved = page(heads).clone()
        if rank == 1:
            page(heads).view(torch.uint8).bitwise_not_()
        tell(name, heads, outcome(heads, 2))
        page(heads).copy_(saved)
        tell(f"{name}: after", heads, outcome(heads, 2))
    heads = Heads(rank, ranks)
    if rank == 1:
        append = heads.layer._append
        heads.layer._append = refuse_memory  # type: ignore[method-assign]
    tell("update", heads, outcome(heads, 1))
    if rank == 1:
        heads.layer._append = append  # type: ignore[method-assign]
    tell("update: after", heads, outcome(heads, 1))
    saved = page(heads).clone()
    if rank == 1:
        page(heads).view(torch.uint8).bitwise_not_()
    try:
        heads.cache.crop(-60)
        ended = "fine"
    except (CorruptedPageError, PeerFailedError) as error:
        ended = type(error).__name__
    tell("crop", heads, ended)
    page(heads).copy_(saved)
    heads.cache.crop(-60)
    tell("crop: after", heads, outcome(heads, 3))
    found["repaired"] = repaired(rank, ranks)
    found["rollback"] = rolled_back(rank, ranks)
    return found


def refuse_memory(*given: Any) -> None:
    """In place of a layer's `_append`."""
    raise HostMemoryError("refused")


def repaired(rank: int, ranks: int) -> dict[str, Any]:
    """One rank finds a damaged block and begins the step again: all do, and the output is as without damage."""
    outputs = []
    for damaged in (False, True):
        heads = Heads(rank, ranks, audit=True)
        heads.step(1)
        if damaged and rank == 1:
            heads.layer.store.keys["codes"].view.bitwise_not_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(heads.all_heads(heads.step(2)))
    report = gather_report(heads.cache).to_dict()
    return {"outputs": outputs, "repaired": report["repaired_blocks"], "steps": report["overall"]["head_steps"]}


def rolled_back(rank: int, ranks: int) -> list[Any]:
    """Forward passes that ended between layers, on each rank between others: all ranks hold the same afterwards."""
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=32, hidden_size=256)
    cache = CertifiedQuantizedCache(config, process_group=dist.group.WORLD, **SMALL)
    _, key, value = (part.chunk(ranks, dim=1)[rank] for part in states(150, 0))
    for layer in range(3):
        cache.update(key, value, layer)
    _, key, value = (part.chunk(ranks, dim=1)[rank] for part in states(1, 1))
    for layer in range(3):
        cache.update(key, value, layer)
        if layer == 1:
            cache.ranks = ALONE if rank == 0 else cache.ranks  # what rank 0 still does, the others do not
        if layer == 1 and rank != 0:
            break
    cache.ranks = Ranks(dist.group.WORLD)  # type: ignore[arg-type]
    before, held = cache._lengths(), cache.rollback()
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, (sorted(before), held, sorted(cache._lengths())))
    return every


def data_parallel(folder: Path) -> dict[str, Any]:
    """Each process has its own whole model, its own prompts, and makes a number of steps of its own."""
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    cache = CertifiedQuantizedCache(model.config, rtol=0.05, **SMALL)
    unlike = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1, num_key_value_heads=8), **SMALL)
    unlike.update(*states(60, 0)[1:], 0)  # fewer KV heads than the config says, and no tensor parallelism
    generate(model, prompt(LENGTH, seed=rank), 6 + 4 * rank, cache)
    own, whole = cache.report().to_dict(), gather_report(cache).to_dict()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    other = CertifiedQuantizedCache(model.config, rtol=0.05 * (1 + rank), **SMALL)
    try:
        gather_report(other)
        refused = False
    except ConfigError:
        refused = True
    alone = cache.ranks is ALONE and unlike.ranks is ALONE and CertifiedQuantizedCache(model).ranks is ALONE
    return {"own": every, "whole": whole, "alone": alone, "refused": refused}


def two_processes(folder: Path) -> dict[str, Any]:
    """Data-parallel ones, and then the same processes as ranks of one cache."""
    return {"data_parallel": data_parallel(folder), "failures": failures()}


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    scenario, where_to = sys.argv[1], Path(sys.argv[2])
    result = (tensor_parallel if scenario == "tensor_parallel" else two_processes)(where_to)
    if dist.get_rank() == 0:
        torch.save(result, where_to / f"{scenario}-{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()
