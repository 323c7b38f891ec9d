"""The systems that are compared: how each cache is made, whether it can be had here, and with which settings it runs.

The peers run with their own defaults: what someone who only writes their name gets.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache

from ..cache import CertifiedQuantizedCache
from ..config import CertKVConfig
from .harness import describe_failure
from .model import model_config

DENSE, PEER, OURS = "dense", "peer", "ours"
DYNAMIC = "DynamicCache"
ANY_TOLERANCE = 1e6  # relative tolerance that every bound meets: every step stays on the fast path, its bound returned
PROBE_TOKENS = 320


@dataclass(frozen=True)
class System:
    """One cache under comparison.

    Attributes: name; kind: DENSE, PEER or OURS; make: config -> empty cache; needs: distribution name and module of a package
        that it needs; settings: what it runs with; most_tokens: times batch rows, that it is given on a CPU, and why no more.
    """

    name: str
    kind: str
    make: Callable[[PreTrainedConfig], Any]
    needs: tuple[str, str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    most_tokens: int | None = None
    why_most: str = ""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot be measured here; None if it can: a small cache was filled and took one more token."""
        if self.needs is not None and not _installed(self.needs[1]):
            return f"{self.needs[0]} is not installed (pip install '.[bench]')"
        if self.kind == OURS:
            return None
        try:
            cache = self.make(model_config(head_dim=64, layers=1))
            for tokens in (PROBE_TOKENS, 1):
                states = torch.zeros(1, 8, tokens, 64, dtype=torch.bfloat16, device=device) + 0.5
                keys, _ = cache.update(states, states.clone(), 0)
            if keys.shape[-2] != PROBE_TOKENS + 1:
                return f"returned {keys.shape[-2]} keys after {PROBE_TOKENS + 1} tokens"
        except Exception as error:  # whatever is wrong with a peer is told, and the others are measured
            return describe_failure(error)
        return None

    def describe(self, reason: str | None) -> dict[str, Any]:
        """As plain JSON types."""
        version = None
        if self.needs is not None and reason is None:
            try:
                version = importlib.metadata.version(self.needs[0])
            except importlib.metadata.PackageNotFoundError:
                version = None
        return {
            "name": self.name,
            "kind": self.kind,
            "settings": self.settings,
            "available": reason is None,
            "reason": reason,
            "package": self.needs and self.needs[0],
            "version": version,
        }


def certified(name: str, settings: CertKVConfig) -> System:
    """One of this package's own."""

    def make(config: PreTrainedConfig) -> CertifiedQuantizedCache:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the naive baseline says on every construction that it certifies nothing
            return CertifiedQuantizedCache(config, settings=settings)

    return System(name, OURS, make, settings=settings.to_dict())


def quantized(backend: str, needs: tuple[str, str] | None, most_tokens: int | None = None, why_most: str = "") -> System:
    """One of transformers' QuantizedCache backends, with its defaults."""
    layer = next((kind for name, kind in _layer_classes().items() if name.lower().startswith(backend)), None)
    settings = {} if layer is None else _defaults(layer)
    return System(
        f"QuantizedCache {backend}",
        PEER,
        lambda config: QuantizedCache(backend=backend, config=config),
        needs,
        {"backend": backend, **settings},
        most_tokens,
        why_most,
    )


def all_systems(quick: bool = False) -> list[System]:
    """Every system, the dense one first. `quick`: fewer tolerances, and 4-bit values only."""
    systems = [
        System(DYNAMIC, DENSE, lambda config: DynamicCache(config=config)),
        quantized("quanto", ("optimum-quanto", "optimum.quanto")),
        # Its quantiser optimises every group: seconds for a thousand tokens, and ten times the dense bytes meanwhile.
        quantized(
            "hqq",
            ("hqq", "hqq"),
            1024 if quick else 32768,
            "its quantiser takes minutes for more, and ten times the dense bytes",
        ),
        quantized("fp8", None),
        certified("naive K8 V4", CertKVConfig.naive()),
        certified("fast path K8 V4", CertKVConfig(rtol=ANY_TOLERANCE)),
    ]
    for rtol in (0.05,) if quick else (0.1, 0.05, 0.02):
        systems.append(certified(f"rtol {rtol} K8 V4", CertKVConfig(rtol=rtol)))
    if quick:
        return systems
    systems.append(certified("fast path K8 V8", CertKVConfig(rtol=ANY_TOLERANCE, value_bits=8)))
    for rtol in (0.1, 0.05, 0.02):
        systems.append(certified(f"rtol {rtol} K8 V8", CertKVConfig(rtol=rtol, value_bits=8)))
    return systems


def by_format(systems: list[System]) -> list[System]:
    """Those that differ in more than their tolerance: what filling and memory can tell apart."""
    return [system for system in systems if system.kind != OURS or system.settings["rtol"] == ANY_TOLERANCE]


def _layer_classes() -> dict[str, type]:
    from transformers import cache_utils

    return {name: kind for name, kind in vars(cache_utils).items() if name.endswith("QuantizedLayer")}


def _defaults(layer: type) -> dict[str, Any]:
    """Default arguments of a layer's constructor."""
    parameters = inspect.signature(layer).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not inspect.Parameter.empty}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would be in is not there
        return False
