"""What the Space computes: one prompt continued with three caches in turns, and what the certified one proves on the way.

No user interface here. A `Comparison` belongs to one request and shares nothing but the models' weights with others.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_certkv import CertifiedQuantizedCache, CertKVConfig, ConfigError, InputError, MemoryReport
from hf_certkv.certificate import StepRecord
from hf_certkv.embedded import resolve_model, set_margin
from hf_certkv.ladder import Rung

CACHES = ("dense", "naive", "certified")
FORMATS = {"K8 V4": 4, "K8 V8": 8}  # name -> bits of a value; keys have 8
MODEL_VARIABLE = "CERTKV_SPACE_MODEL"  # names a further model: on the Hub, or a folder
HARD = "retriever, hard"
HARD_MARGIN = 5.5  # nats: at 4,096 tokens exact attention just about finds the needles (the model's card has the figures)
MOST_TOKENS = 8192  # prompt and answer together: what two cores read in seconds
MOST_NEW_TOKENS = 128
MOST_CHARACTERS = 200_000
LARGEST_SEED = 2**31 - 1

_loading = threading.Lock()
_loaded: dict[str, tuple[Any, Any]] = {}


def model_names() -> list[str]:
    """The models to choose from; the one that the environment names comes last."""
    further = os.environ.get(MODEL_VARIABLE, "").strip()
    return list(dict.fromkeys(["prose", "retriever", HARD, *([further] if further else [])]))


def load(name: str) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer; loaded once, shared by all requests.

    Raises: ConfigError: the model is none of `model_names`, or cannot be loaded.
    """
    if name not in model_names():
        raise ConfigError(f"model {name!r}: expected one of {', '.join(model_names())}.")
    if name in _loaded:
        return _loaded[name]
    with _loading:
        if name not in _loaded:
            where = resolve_model("retriever" if name == HARD else name)
            try:
                # float32, so that what differs between the answers is the caches' doing and not bfloat16's rounding.
                model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
                tokenizer = AutoTokenizer.from_pretrained(where)
            except (OSError, ValueError, ImportError, KeyError) as error:
                said = " ".join(str(error).split())[:300]
                raise ConfigError(f"{MODEL_VARIABLE}={name!r} cannot be loaded: {said}") from error
            _loaded[name] = (set_margin(model, HARD_MARGIN) if name == HARD else model, tokenizer)
        return _loaded[name]


@dataclass(frozen=True)
class Question:
    """What a user asks for. `temperature` 0 takes the likeliest token; `audit` compares every output with float64 attention."""

    prompt: str
    model: str = "prose"
    rtol: float = 0.02
    value_format: str = "K8 V4"
    new_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0
    audit: bool = False


@dataclass
class Lane:
    """One cache on its way. `ids`: tokens so far; `finished`: the model ended its text."""

    name: str
    cache: Any
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass(frozen=True)
class Answer:
    """A cache's text so far: `text[:agreed]` is of tokens before the first that is not the dense cache's.

    `same` of `tokens` tokens come before that; `bound`, `error`: the largest of any head and step, shares of the output's norm
    (NaN where there are none: the dense cache, nothing quantised, no audit). `device`: bytes, NaN for the dense cache.
    """

    name: str
    text: str
    agreed: int
    tokens: int
    same: int
    bound: float
    error: float
    device: float


@dataclass(frozen=True)
class Certificate:
    """What was proven so far, as arrays `[layers' heads, decode steps]`, shares of the output's norm, NaN where there is none.

    Attributes:
        layers: layer of each row; heads: head of each row.
        bound: of certified outputs; candidate: of the fast path alone, before anything was raised; error: the true one.
        rung: `Rung` values, -1 where nothing was recorded.
        memory: of the certified cache.
    """

    layers: np.ndarray
    heads: np.ndarray
    bound: np.ndarray
    candidate: np.ndarray
    error: np.ndarray
    rung: np.ndarray
    memory: MemoryReport

    @property
    def head_steps(self) -> int:
        """Outputs recorded."""
        return int((self.rung >= 0).sum())

    def share(self, *rungs: Rung) -> float:
        """Share of head-steps that ended on these rungs."""
        return float(np.isin(self.rung, rungs).sum()) / max(1, self.head_steps)


class Comparison:
    """One question to one model, with a cache of each kind.

    Raises: InputError, ConfigError: the prompt or a setting cannot be used; the message is fit to be shown.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        settings = _settings(question)
        if not question.prompt.strip():
            raise InputError("The prompt is empty: write something, or choose an example.")
        if len(question.prompt) > MOST_CHARACTERS:
            raise InputError(f"The prompt has {len(question.prompt):,} characters; at most {MOST_CHARACTERS:,} are read here.")
        self.model, self.tokenizer = load(question.model)
        self.ids = self.tokenizer(question.prompt, return_tensors="pt").input_ids
        self.prompt_tokens = int(self.ids.shape[1])
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or MOST_TOKENS
        most = min(positions, MOST_TOKENS)
        if self.prompt_tokens == 0:
            raise InputError("The prompt has no tokens for this model: write some words.")
        if self.prompt_tokens + question.new_tokens > most:
            raise InputError(
                f"The prompt has {self.prompt_tokens:,} tokens and {question.new_tokens} are to be added; {question.model} "
                f"takes {most:,} in all here. Shorten the prompt."
            )
        config = self.model.config
        caches = {
            "dense": lambda: DynamicCache(config=config),
            "naive": lambda: CertifiedQuantizedCache(config, settings=settings.replace(policy="naive")),
            "certified": lambda: CertifiedQuantizedCache(config, settings=settings),
        }
        # Each draws the same random numbers: answers differ only where the caches made the probabilities differ.
        self.lanes = [Lane(name, caches[name](), torch.Generator().manual_seed(question.seed)) for name in CACHES]

    def notes(self) -> list[str]:
        """What a user should know of this prompt before reading the result."""
        notes = []
        exact = self.lanes[-1].cache.settings.exact_below
        if self.prompt_tokens + self.question.new_tokens <= exact:
            notes.append(
                f"Up to {exact} tokens are kept exactly, so here is nothing to certify: all three answers are the same. "
                "Use a longer prompt or an example."
            )
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and (missing := int((self.ids == unknown).sum())):
            notes.append(f"{missing:,} of {self.prompt_tokens:,} words are not in this model's small vocabulary.")
        return notes

    def steps(self) -> Iterator[int]:
        """Computes, and yields how many tokens there are: 0 after the prompt was read, then after each step.

        All but the last token of the prompt are read at once, which is exact; the last one is the first decode step, so that
        the first word of an answer already comes through the cache.
        """
        for lane in self.lanes:
            self._read(lane)
        yield 0
        for step in range(1, self.question.new_tokens + 1):
            for lane in self.lanes:
                if not lane.finished:
                    self._write(lane)
            yield step
            if all([lane.finished for lane in self.lanes]):
                return

    # Entered anew for each call: a generator may go on in another thread, where the mode of the first is not in force.
    @torch.inference_mode()
    def _read(self, lane: Lane) -> None:
        if self.prompt_tokens > 1:
            self.model(input_ids=self.ids[:, :-1], past_key_values=lane.cache, logits_to_keep=1)

    @torch.inference_mode()
    def _write(self, lane: Lane) -> None:
        last = torch.tensor([lane.ids[-1:]]) if lane.ids else self.ids[:, -1:]
        logits = self.model(input_ids=last, past_key_values=lane.cache, logits_to_keep=1).logits[0, -1].float()
        if self.question.temperature > 0:
            chances = torch.softmax(logits / self.question.temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=lane.generator))
        else:
            token = int(logits.argmax())
        lane.ids.append(token)
        ends = self.model.generation_config.eos_token_id
        lane.finished = token in (ends if isinstance(ends, list) else [ends])

    def answers(self) -> list[Answer]:
        """The three texts so far."""
        dense = self.lanes[0].ids
        return [self._answer(lane, dense) for lane in self.lanes]

    def _answer(self, lane: Lane, dense: list[int]) -> Answer:
        pairs = zip(lane.ids, dense, strict=False)
        same = next((i for i, (mine, exact) in enumerate(pairs) if mine != exact), min(len(lane.ids), len(dense)))
        text = self.tokenizer.decode(lane.ids, skip_special_tokens=True)
        # What both begin with: decoding fewer tokens may end in half a character, or without a space.
        alike = self.tokenizer.decode(lane.ids[:same], skip_special_tokens=True)
        agreed = next((i for i, (a, b) in enumerate(zip(text, alike, strict=False)) if a != b), min(len(text), len(alike)))
        bound = error = device = math.nan
        if isinstance(lane.cache, CertifiedQuantizedCache):
            device = float(lane.cache.memory().device)
            for record in lane.cache.recorder.records:
                figures = record.relative()
                bound, error = (_larger(old, figures[name]) for old, name in ((bound, "bound"), (error, "error")))
        return Answer(lane.name, text, agreed, len(lane.ids), same, bound, error, device)

    def certificate(self) -> Certificate:
        """What the certified cache has proven so far."""
        cache = self.lanes[-1].cache
        report = cache.report()  # makes the records complete
        return _certificate(cache.recorder.records, self.question.new_tokens, report.memory)


def _settings(question: Question) -> CertKVConfig:
    """The certified cache's settings. Raises: ConfigError: something is out of range."""
    if question.value_format not in FORMATS:
        raise ConfigError(f"format {question.value_format!r}: expected one of {', '.join(FORMATS)}.")
    for name, value, least, most in (
        ("tokens to write", question.new_tokens, 1, MOST_NEW_TOKENS),
        ("seed", question.seed, 0, LARGEST_SEED),
    ):
        if not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{name}: {value!r} was given, a whole number from {least} to {most:,} was expected.")
    if not 0 <= question.temperature <= 2:
        raise ConfigError(f"temperature: {question.temperature!r} was given, a number from 0 to 2 was expected.")
    # Plain torch is quick enough for texts of a few thousand tokens, and needs no compiling: requirements.txt leaves numba out.
    return CertKVConfig(
        rtol=question.rtol,
        value_bits=FORMATS[question.value_format],
        audit=question.audit,
        record="full",
        kernel="reference",
    )


def _larger(old: float, values: np.ndarray) -> float:
    """The largest of a number and an array, NaN aside."""
    finite = values[~np.isnan(values)]
    return float(np.fmax(old, finite.max())) if finite.size else old


def _certificate(records: list[StepRecord], steps: int, memory: MemoryReport) -> Certificate:
    """Records of single tokens as grids; step 0 of the cache is the prompt, and column c is step c + 1."""
    heads = {record.layer: record.rung.shape[1] for record in records}
    first = dict(zip(sorted(heads), np.cumsum([0, *(heads[layer] for layer in sorted(heads))]).tolist(), strict=False))
    rows = sum(heads.values())
    grids = {name: np.full((rows, steps), np.nan) for name in ("bound", "candidate", "error")}
    rung = np.full((rows, steps), -1)
    for record in records:
        place = slice(first[record.layer], first[record.layer] + heads[record.layer])
        column = record.step - 1
        figures = record.relative()
        for name, grid in grids.items():
            grid[place, column] = figures[name][0, :, 0]
        rung[place, column] = record.rung[0, :, 0]
    layers = np.array([layer for layer in sorted(heads) for _ in range(heads[layer])], dtype=int)
    return Certificate(
        layers, np.array([head for layer in sorted(heads) for head in range(heads[layer])], dtype=int), **grids, rung=rung,
        memory=memory,
    )  # fmt: skip
