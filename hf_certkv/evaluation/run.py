"""A run: every piece of a task with every cache, over one or several processes, from where an earlier session stopped."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..bench import statistics
from ..cache import CertifiedQuantizedCache
from ..config import CertKVConfig
from ..environment import describe
from ..errors import InputError, UnsupportedModelError
from ..plan import plan_memory
from ..report import MemoryReport
from .caches import DENSE, CacheSpec
from .checkpoint import Checkpoint, Progress, piece_of
from .evidence import Evidence
from .runs import FORMAT, VERSION
from .summary import summary
from .task import Row, Task

PLANNED = 1024  # tokens of the shortest context that memory is planned for
LONGEST_PLANNED = 131072
SAMPLED = 1024  # elements of each weight that a run knows the model by
Tell = Callable[[int, int], None]  # pieces done, of how many


class Run:
    """One task with some caches on one model.

    Args: name: of the model, as the user gave it; audit: the first so many pieces are compared with float64 attention;
        seed: of the bootstrap.
    """

    def __init__(self, task: Task, specs: list[CacheSpec], name: str, audit: int = 0, seed: int = 0) -> None:
        if audit < 0:
            raise InputError(f"--audit {audit}: expected a number of items, 0 or more.")
        self.task, self.specs, self.audit, self.seed = task, specs, audit, seed
        self.model = describe_model(task.model, name)
        config = task.model.config.to_dict()
        config.pop("_name_or_path", None)
        self.identity = {
            "task": {"name": task.name, **task.settings()},
            "model": self.model,
            "config": json.loads(json.dumps(config, default=str)),
            "weights": _fingerprint(task.model),
            "versions": {"hf_certkv": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "caches": [spec.to_dict() for spec in specs],
            "audit": audit,
            "seed": seed,
        }
        self.config_hash = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def execute(self, out: Path, tell: Tell | None = None, process: int = 0, processes: int = 1, wait: Any = None) -> Any:
        """Measure what is left, this process's share of it, and give the whole run as plain JSON types.

        Args: out: where the run will be written: unfinished work lies beside it; tell: progress of this process;
            wait: called where all processes must have come; given with more than one.

        Returns: the run; None in all processes but the first.
        """
        wait = wait or (lambda: None)
        checkpoint = Checkpoint(out, self.config_hash)
        if process == 0:
            checkpoint.consolidate(checkpoint.load())
        wait()
        before = checkpoint.load()
        wait()  # nobody may write before all have read
        mine = before if process == 0 else Progress()
        pieces = self.task.pieces()
        left = [piece for piece in pieces if piece not in before.pieces][process::processes]
        done = len(pieces) - len(left) if processes == 1 else 0
        for count, piece in enumerate(left):
            if tell is not None:
                tell(done + count, done + len(left))
            start = time.perf_counter()
            audited = piece in pieces[: self.audit]
            makers = {spec.name: partial(spec.make, self.task.model.config, audited) for spec in self.specs}
            outcome = self.task.measure(piece, makers)
            _mark_equal(outcome.rows)
            mine.add(piece, outcome, self.task.steps, timed=not audited)
            mine.seconds += time.perf_counter() - start
            checkpoint.save(process, mine)
        if tell is not None:
            tell(done + len(left), done + len(left))
        wait()
        if process != 0:
            return None
        return self.result(mine if processes == 1 else checkpoint.load(), processes)

    def unfinished(self, out: Path) -> dict[str, Any] | None:
        """What an interrupted run has so far, as plain JSON types; None where no piece was finished."""
        progress = Checkpoint(out, self.config_hash).load()
        return self.result(progress, 1) if progress.rows else None

    def clear(self, out: Path) -> None:
        """Take away what `execute` left beside the file: the run is written."""
        Checkpoint(out, self.config_hash).clear()

    def result(self, progress: Progress, processes: int) -> dict[str, Any]:
        """The run file's content (docs/evaluation.md)."""
        pieces = self.task.pieces()
        order = {piece: index for index, piece in enumerate(pieces)}
        items = [row.to_dict() for row in sorted(progress.rows, key=lambda row: order[piece_of(row.id, order)])]
        about = (self.task.name, self.task.metric.right_or_wrong, self.seed)
        certificates = {
            spec.name: progress.evidence[spec.name].to_dict(spec.settings)
            for spec in self.specs
            if spec.settings is not None and spec.name in progress.evidence
        }
        found = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "eval",
            "complete": progress.pieces >= set(pieces),
            "config_hash": self.config_hash,
            "task": {"name": self.task.name, "settings": self.task.settings(), "metric": self.task.metric.to_dict()},
            "audit": self.audit,
            "seed": self.seed,
            "model": self.model,
            "environment": describe(),
            "caches": [spec.to_dict() for spec in self.specs],
            "items": items,
            "summary": {spec.name: summary(spec.name, items, *about) for spec in self.specs},
            "certificates": certificates,
            "memory": {
                "measured": self._measured(certificates),
                **planned_memory(self.task.model, self.specs),
            },
            "speed": _speed(progress.timings),
            "processes": processes,
            "seconds": round(progress.seconds, 1),
        }
        return strict(found)

    def _measured(self, certificates: dict[str, Any]) -> dict[str, Any]:
        """What the caches of the longest item held, the dense one included: all of them had the same tokens."""
        found = {name: part["memory"] for name, part in certificates.items()}
        dense = max((memory["dense_bytes"] for memory in found.values()), default=0)
        return {DENSE: MemoryReport({"exact": dense}, dense).to_dict(), **found} if found else {}


def planned_memory(model: PreTrainedModel, specs: list[CacheSpec]) -> dict[str, Any]:
    """Bytes by part against context, from the model's config, as `{"planned": ...}`; empty where it does not say."""
    config = model.config
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or LONGEST_PLANNED
    contexts, context = [], PLANNED
    while context <= min(longest, LONGEST_PLANNED):
        contexts.append(context)
        context *= 2
    planned: dict[str, Any] = {}
    try:
        for spec in specs:
            for tokens in contexts:
                memory = plan_memory(config, tokens, 1, model.dtype, spec.settings or CertKVConfig(), model.device)
                if spec.settings is None:
                    memory = MemoryReport({"exact": memory.dense}, memory.dense)
                planned.setdefault(spec.name, {})[str(tokens)] = memory.to_dict()
    except UnsupportedModelError:
        return {}
    return {"planned": planned} if planned else {}


def _mark_equal(rows: list[Row]) -> None:
    """Say of each answer whether it is the dense cache's, word for word."""
    for row in rows:
        dense = row.scores[DENSE]
        for scores in row.scores.values():
            if "text" in scores:
                scores.setdefault("equal", float(scores["text"] == dense["text"]))


def describe_model(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What a run file says of a model."""
    return {
        "name": name,
        "type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "revision": getattr(model.config, "_commit_hash", None),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": str(torch.device(model.device).type),
    }


def of_generation(
    cache: CertifiedQuantizedCache, model: PreTrainedModel, name: str, prompt_tokens: int, token_ids: list[int], text: str
) -> dict[str, Any]:
    """A run file's content for one text that `model` wrote with `cache`, which keeps every record."""
    evidence = Evidence(len(token_ids) - 1)
    evidence.add(cache, len(token_ids) - 1)
    spec = CacheSpec("certified" if cache.settings.certified else "naive", cache.settings)
    certificate = evidence.to_dict(cache.settings)
    found = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "generate",
        "model": describe_model(model, name),
        "environment": describe(),
        "caches": [spec.to_dict()],
        "certificates": {spec.name: certificate},
        "memory": {"measured": {spec.name: certificate["memory"]}, **planned_memory(model, [spec])},
        "prompt_tokens": prompt_tokens,
        "token_ids": token_ids,
        "text": text,
    }
    return strict(found)


def _speed(timings: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Decode steps of items, and their ratio to the dense cache's in the same item: of both the median and the quartiles."""
    out: dict[str, Any] = {}
    dense = timings.get(DENSE, {})
    for name, spent in timings.items():
        pieces = sorted(set(spent) & set(dense))
        if pieces:
            ratios = statistics.summary([spent[piece] / dense[piece] for piece in pieces])
            out[name] = {"decode_ms": statistics.summary([spent[piece] for piece in pieces]), "over_dense": ratios}
    return out


def _fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of some elements of every weight: other weights in the same folder are another model."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)][: 2 * SAMPLED]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def strict(value: Any) -> Any:
    """As plain JSON types, None for what is no number. Infinity stays: it is a bound like others, and Python's JSON has it."""
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
