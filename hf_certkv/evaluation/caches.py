"""The caches that a run compares: how a user names one, and how an empty one is made."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedConfig

from ..cache import CertifiedQuantizedCache
from ..config import CertKVConfig
from ..errors import InputError

DENSE = "dense"
PRESETS: dict[str, Callable[[], CertKVConfig]] = {
    "naive": CertKVConfig.naive,
    "certified": CertKVConfig,
    "paper": CertKVConfig.paper,
}
DEFAULT = (DENSE, "naive", "certified")


@dataclass(frozen=True)
class CacheSpec:
    """One cache under comparison. `settings` is None for transformers' own `DynamicCache`."""

    name: str
    settings: CertKVConfig | None

    @property
    def certified(self) -> bool:
        """Whether its bounds are enforced."""
        return self.settings is not None and self.settings.certified

    def make(self, config: PreTrainedConfig, audit: bool = False) -> Any:
        """An empty cache that keeps the record of every step. `audit`: compare each output with float64 attention."""
        if self.settings is None:
            return DynamicCache(config=config)
        settings = self.settings.replace(record="full", audit=audit or self.settings.audit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the naive baseline says at every construction that it certifies nothing
            return CertifiedQuantizedCache(config, settings=settings)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"name": self.name, "settings": None if self.settings is None else self.settings.to_dict()}


def parse(text: str) -> CacheSpec:
    """A cache as `[NAME=]KIND[:setting=value,...]`; KIND is a preset, or where a `CertKVConfig` was saved.

    Raises: InputError: it is not of that form; ConfigError: a setting is unknown or out of range.
    """
    name, rest = "", text
    equals, colon = text.find("="), text.find(":")
    if equals >= 0 and (colon < 0 or equals < colon):
        name, rest = text[:equals].strip(), text[equals + 1 :]
    kind, _, listed = rest.partition(":")
    kind = kind.strip()
    changes = _settings(text, listed)
    if not kind:
        raise InputError(f"--cache {text!r}: expected dense, naive, certified, paper or a saved config, as KIND:setting=value.")
    shown = " ".join([kind, *(f"{key}={value}" for key, value in changes.items())])
    if kind == DENSE:
        if changes:
            raise InputError(f"--cache {text!r}: the dense cache has no settings.")
        return CacheSpec(name or DENSE, None)
    if kind in PRESETS:
        return CacheSpec(name or shown, PRESETS[kind]().replace(**changes))
    return CacheSpec(name or shown, _saved(kind).replace(**changes))


def parse_all(texts: Sequence[str]) -> list[CacheSpec]:
    """Every cache, the dense one first: it is what all are compared with.

    Raises: InputError: two of them have one name.
    """
    specs = [parse(text) for text in (texts or DEFAULT)]
    if not any(spec.settings is None for spec in specs):
        specs.insert(0, CacheSpec(DENSE, None))
    specs.sort(key=lambda spec: spec.settings is not None)
    dense = [spec.name for spec in specs if spec.settings is None]
    if dense != [DENSE]:
        raise InputError(f"--cache: expected one dense cache, called {DENSE!r}; got {', '.join(map(repr, dense))}.")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--cache: two are called {twice[0]!r}; give one another name, as NAME=KIND:setting=value.")
    return specs


def _settings(text: str, listed: str) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in listed.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--cache {text!r}: {part!r} is no setting; expected setting=value, separated by commas.")
        try:
            changes[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            changes[key.strip()] = {"None": None, "True": True, "False": False}.get(value.strip(), value.strip())
    fields = {field.name for field in dataclasses.fields(CertKVConfig)}
    unknown = sorted(set(changes) - fields)
    if unknown:
        raise InputError(f"--cache {text!r}: no setting is called {unknown[0]!r}; there are {', '.join(sorted(fields))}.")
    return changes


def _saved(kind: str) -> CertKVConfig:
    path = Path(kind).expanduser()
    if path.is_file():
        return CertKVConfig.from_json(path)
    if "/" not in kind and not path.is_dir():
        raise InputError(f"--cache {kind!r}: expected dense, naive, certified, paper, or a saved config's place.")
    return CertKVConfig.from_pretrained(str(path) if path.is_dir() else kind)
