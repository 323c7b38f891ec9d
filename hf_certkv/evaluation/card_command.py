"""How a measured run can be repeated: its command line, and what no option says."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath, PureWindowsPath
from typing import Any

from ..config import CertKVConfig
from ..errors import CertKVError
from .caches import DENSE, PRESETS, CacheSpec, parse
from .card_escape import one_line

_SOURCE = {"text": "--text", "dataset": "--dataset", "split": "--split", "column": "--column"}
_SIZES = {"contexts": "--context", "items": "--items"}
OPTIONS = {
    "ppl": {**_SOURCE, **_SIZES, "score_last": "--score-last", "chunk": "--chunk"},
    "divergence": {**_SOURCE, **_SIZES, "new_tokens": "--new-tokens"},
    "needle": {
        "text": "--text",
        "depths": "--depths",
        "needles": "--needles",
        **_SIZES,
        "margin": "--margin",
        "chunk": "--chunk",
    },
    "ruler": {"tasks": "--tasks", **_SIZES, "new_tokens": "--new-tokens"},
}  # by task: a setting -> the option that sets it, in the order in which they are shown
HASHED = "text_sha256"


def command_of(run: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The command line that repeats a run, in one line, and what has to be known besides. None for a task of no command."""
    task, settings, model = run["task"], dict(run["task"].get("settings") or {}), run["model"]
    if task["name"] not in OPTIONS:
        return None, [f"settings: {_json(settings)}"]
    words, notes = ["certkv", "eval", task["name"], "--model", _model(run)], []
    if settings.get(HASHED) is not None:
        settings.setdefault("text", "FILE")
        notes.append(f"SHA-256 of the text: {settings[HASHED]}")
    settings.pop(HASHED, None)
    if task["name"] == "ppl" and "score_last" in settings and settings["score_last"] is None:
        words.append("--score-all")
    seed = settings.pop("seed", run.get("seed"))
    for name, option in OPTIONS[task["name"]].items():
        value = settings.pop(name, None)
        if value is not None:
            words += [option, _value(value)]
    for cache in run["caches"]:
        found = cache_option(cache["name"], cache["settings"])
        if found is None:
            notes.append(f"settings of the cache {cache['name']}: {_json(cache['settings'])}")
        else:
            words += ["--cache", found]
    for option, value in (
        ("--audit", run.get("audit")),
        ("--seed", seed),
        ("--dtype", model.get("dtype")),
        ("--device", model.get("device")),
    ):
        if value is not None:
            words += [option, _value(value)]
    left = {name: value for name, value in settings.items() if value is not None}
    if left:
        notes.append(f"further settings: {_json(left)}")
    return shlex.join(one_line(word) for word in words), notes


def model_label(run: dict[str, Any]) -> str:
    """The model's name; of a path of this machine the last part."""
    name: str = run["model"]["name"]
    kind = PureWindowsPath if "\\" in name else PurePath
    return (kind(name).name or name) if _is_path(name) else name


def _model(run: dict[str, Any]) -> str:
    label = model_label(run)
    return f"path/to/{label}" if label != run["model"]["name"] else label


def _is_path(name: str) -> bool:
    return name.startswith(("/", "~", ".")) or "\\" in name


def cache_option(name: str, settings: dict[str, Any] | None) -> str | None:
    """What `--cache` takes for a cache; None where nothing short makes the same one."""
    if settings is None:
        return name if name == DENSE else None
    try:
        wanted = CacheSpec(name, CertKVConfig.from_dict(settings))
    except CertKVError:
        return None
    for kind, preset in PRESETS.items():
        if preset().policy != settings.get("policy"):
            continue
        changes = [f"{key}={_value(value)}" for key, value in changed(settings, preset()).items()]
        rest = f"{kind}:{','.join(changes)}" if changes else kind
        if parse(rest) == wanted:
            return rest
        # A name with these would be read as something else: as a model on the Hub, for instance.
        if not any(sign in name for sign in ":=,") and parse(f"{name}={rest}") == wanted:
            return f"{name}={rest}"
    return None


def changed(settings: dict[str, Any], preset: CertKVConfig | None = None) -> dict[str, Any]:
    """The settings that are not the defaults (or not the preset's)."""
    usual = (preset or CertKVConfig()).to_dict()
    return {name: value for name, value in settings.items() if name not in usual or usual[name] != value}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_value(part) for part in value)
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
