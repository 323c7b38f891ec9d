"""One architecture under examination: every mode with this package's cache and with transformers' own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache import CertifiedQuantizedCache
from ..config import CertKVConfig
from ..errors import CertificateViolation, CertKVError
from ..ladder import Rung
from ..layers import CertifiedLayer
from .modes import MODES, Generated, Mode
from .tiny import tiny_config, tiny_model

SETTINGS = CertKVConfig(block_size=16, recent_window=16, exact_below=32, record="full", kernel="reference")
CERTIFIED, PARTLY, EXACT, REFUSED, ABSENT, WRONG, CRASHED = (
    "certified", "partly certified", "exact", "refused", "not offered", "WRONG", "CRASHED",
)  # fmt: skip
FAILURES = (WRONG, CRASHED)
SMALLEST = 1e-12  # a tolerance that no bound meets
NEAR = 1e-3  # of the largest logit, for sums in another order
LONGEST = 160  # characters of a reason


@dataclass
class Found:
    """One mode of one architecture.

    Attributes:
        status: certified: every call of every full-attention layer with few queries was, and not all densely; partly, exact:
            some or none were; refused: by this package, with a typed error; not offered: the model fails with transformers' own
            cache too; WRONG, CRASHED: what must not be.
        reason: why not certified; share: of calls that were; head_steps: certified ones; dense: how many of them were served
            densely; worst: largest error found by the audit, relative to its bound.
    """

    status: str
    reason: str = ""
    share: float = 0.0
    head_steps: int = 0
    dense: int = 0
    worst: float = 0.0


@dataclass
class Examined:
    """One architecture. Attributes: layers: how many of each kind; modes: by name; failed: why there is no model."""

    model_type: str
    model: str = ""
    attention: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    modes: dict[str, Found] = field(default_factory=dict)
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @property
    def full(self) -> int:
        """Layers of full attention over keys and values."""
        return sum(count for name, count in self.layers.items() if name.startswith("Certified"))

    @property
    def offered(self) -> dict[str, Found]:
        """Modes that work with transformers' own cache."""
        return {name: mode for name, mode in self.modes.items() if mode.status != ABSENT}


def examine(model_type: str, modes: dict[str, Mode] | None = None, attention: str | None = None) -> Examined:
    """Build a tiny model and run it in every mode. Args: attention: implementation, or None for the model's default."""
    found = Examined(model_type)
    with quiet():
        try:
            model = tiny_model(tiny_config(model_type), attention=attention)
        except Exception as error:  # whatever a model's code raises is the finding
            found.failed = _words(error)
            return found
        model.generation_config.update(eos_token_id=None, pad_token_id=0, num_assistant_tokens=3)
        model.generation_config.num_assistant_tokens_schedule = "constant"
        found.model, found.attention = type(model).__name__, str(model.config._attn_implementation)
        try:
            cache = CertifiedQuantizedCache(model.config)
        except CertKVError as error:
            found.modes = {name: Found(REFUSED, _words(error)) for name in modes or MODES}
            return found
        for layer in cache.layers:
            name = type(layer).__name__
            found.layers[name] = found.layers.get(name, 0) + 1
        for name, mode in (modes or MODES).items():
            found.modes[name] = examine_mode(model, mode)
    return found


class _Counting(CertifiedQuantizedCache):
    """Counts the updates whose attention is to be certified: few new tokens, on a layer that is quantised.

    And calls of attention that were computed exactly although they have few queries: layers may share keys and values.
    """

    wanted = exact_calls = 0

    def note_exact(self, positions: int) -> None:
        """A call was computed exactly."""
        super().note_exact(positions)
        self.exact_calls += positions <= self.settings.certify_queries

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        made = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, CertifiedLayer) and layer.store.blocks and layer.new_tokens < layer.sequence_length:
            self.wanted += layer.new_tokens <= self.settings.certify_queries
        return made


def examine_mode(model: PreTrainedModel, mode: Mode) -> Found:
    """Compare bit by bit at zero tolerance, and look at what is certified at the default one."""
    reference = DynamicCache(config=model.config)
    try:
        expected = mode(model, reference)
    except Exception as error:  # the model's own limits
        return Found(ABSENT, _words(error))
    if not _used(reference):
        return Found(ABSENT, "the model leaves the cache that it is given alone")
    try:
        exactly = CertifiedQuantizedCache(model.config, settings=SETTINGS, rtol=0.0, atol=0.0)
        actual = mode(model, exactly)
        if not actual.same(expected):
            return Found(WRONG, _difference(actual, expected))
        # Dense by what this package takes attention to mean, where the model's own steps were carried out above.
        dense = CertifiedQuantizedCache(model.config, settings=SETTINGS, rtol=SMALLEST)
        if not mode(model, dense).near(expected, NEAR):
            return Found(WRONG, f"other logits than with DynamicCache at rtol={SMALLEST:g}")
        cache = _Counting(model.config, settings=SETTINGS, audit=True)
        mode(model, cache)
        return _judge(cache)
    except CertificateViolation as error:
        return Found(WRONG, _words(error))
    except CertKVError as error:
        return Found(REFUSED, _words(error))
    except Exception as error:  # whatever it is, it must not be
        return Found(CRASHED, _words(error))


def _judge(cache: _Counting) -> Found:
    """What the records of a run at the default tolerance say."""
    if not cache.certified_layers:
        return Found(EXACT, "no layer is full attention over keys and values")
    report = cache.report().to_dict()
    records, operations = cache.recorder.records, report["materialised_operations"]
    steps = int(report["overall"]["head_steps"])
    worst = max((float((record.error / record.bound).max()) for record in records), default=0.0)
    if not worst <= 1.0:
        return Found(WRONG, f"a bound was broken: error / bound = {worst:.3g}", worst=worst)
    if not cache.wanted:
        return Found(EXACT, "nothing was long enough to be quantised")
    share = min(1.0, len(records) / max(cache.wanted, len(records) + cache.exact_calls))
    dense = sum(int((record.rung >= Rung.DENSE_HEAD).sum()) for record in records)
    if records and dense == steps:
        return Found(EXACT, "no head-step met its tolerance, all were served densely", share, steps, dense, worst)
    reason = f"exact originals for {', '.join(sorted(operations))}" if operations else "calls that are not covered"
    if share == 1.0:  # a model may read keys or values besides, for a mask of its own
        return Found(CERTIFIED, f"beside attention, {reason}" if operations else "", share, steps, dense, worst)
    return Found(PARTLY if records else EXACT, reason, share, steps, dense, worst)


def _used(cache: Cache) -> bool:
    return any(getattr(layer, "is_initialized", True) for layer in cache.layers)


def _difference(actual: Generated, expected: Generated) -> str:
    if not torch.equal(actual.tokens, expected.tokens):
        return "other tokens than with DynamicCache at rtol=0"
    gaps = [float((a - b).abs().max()) for a, b in zip(actual.logits, expected.logits, strict=True)]
    return f"other logits than with DynamicCache at rtol=0, by up to {max(gaps):.3g}"


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:LONGEST]


@contextmanager
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
