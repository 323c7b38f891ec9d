"""Run files (docs/evaluation.md): read, and checked to the last value, so that nothing drawn of one can fail half-way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError

FORMAT, VERSION = "certkv-run", 1
KINDS = ("eval", "generate")
RUNGS = ("fast", "keys", "values", "dense_head", "dense_layer", "uncertified")
LARGEST_FILE = 2**29  # bytes
MOST_COLUMNS, MOST_ROWS = 4096, 65536  # of a trace: what is written has 128 columns at most
MOST = 1e300
SHOWN = 60  # characters of a wrong value that are shown

Check = Callable[[Any, str], None]  # value, and where it is


def load_run(path: str | Path) -> dict[str, Any]:
    """A run file as it is, after every check.

    Raises: InputError: it cannot be read, is not JSON, or is not a run file of this version; the message says where.
    """
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise InputError(f"{path}: {size:,} bytes; a run file has at most {LARGEST_FILE:,}.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, so not a run file ({error.reason} at byte {error.start}).") from error
    try:
        run = json.loads(text, object_pairs_hook=_object)
        json.dumps(run, ensure_ascii=False).encode()  # half a character, written as an escape, could be shown nowhere
        check_run(run)
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be a run file.") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise InputError(f"{path}: not a JSON file ({error}).") from error
    found: dict[str, Any] = run
    return found


def check_run(run: Any) -> None:
    """Raises: InputError: this is not what docs/evaluation.md describes; the message says what is wrong, and where."""
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        given = run.get("format") if isinstance(run, dict) else run
        raise InputError(
            f'not a run file: its format is {_shown(given)}, expected "{FORMAT}" (`certkv eval --json` writes one).'
        )
    if run.get("version") != VERSION or isinstance(run.get("version"), bool):
        raise InputError(f"a run file of version {_shown(run.get('version'))}; this version of the package reads {VERSION}.")
    if run.get("kind") not in KINDS:
        raise InputError(f"kind is {_shown(run.get('kind'))}, expected one of {', '.join(KINDS)}.")
    (_EVAL if run["kind"] == "eval" else _GENERATE)(run, "")
    names = [cache["name"] for cache in run["caches"]]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"caches: two are called {_shown(twice[0])}.")
    for key, of_names in (
        ("summary", run.get("summary")), ("certificates", run.get("certificates")), ("speed", run.get("speed")),
        ("memory.measured", run.get("memory", {}).get("measured")), ("memory.planned", run.get("memory", {}).get("planned")),
        *((f"items[{place}].scores", item["scores"]) for place, item in enumerate(run.get("items", []))),
    ):  # fmt: skip
        unknown = sorted(set(of_names or ()) - set(names))
        if unknown:
            raise InputError(f"{key} has {_shown(unknown[0])}, which is none of the caches.")
    for cache in run["caches"]:
        if cache["name"] in run["certificates"]:
            _consistent(run["certificates"][cache["name"]], cache["settings"], f"certificates.{cache['name']}")


def _consistent(certificate: dict[str, Any], settings: dict[str, Any] | None, where: str) -> None:
    """What is called certified was made to be, and every head-step has its rung."""
    if settings is None or certificate["certified"] != (settings.get("policy") != "naive"):
        raise InputError(f"{where}.certified is {_shown(certificate['certified'])}, which its settings do not say.")
    overall = certificate["overall"]
    if sum(overall["rungs"].values()) != overall["head_steps"]:
        raise InputError(f"{where}.overall: the rungs do not add up to its {overall['head_steps']:,} head-steps.")
    if certificate["certified"] and overall["rungs"]["uncertified"]:
        raise InputError(f"{where}.overall has uncertified head-steps in a certified cache.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"an object has two values called {_shown(twice)}.")
    return found


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _wrong(where: str, value: Any, expected: str) -> NoReturn:
    raise InputError(f"{where.lstrip('.') or 'the file'} is {_shown(value)}, expected {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any, where: str) -> None:
    """A finite number."""
    if not _is_number(value) or not -MOST <= value <= MOST:
        _wrong(where, value, "a finite number")


def amount(value: Any, where: str) -> None:
    """A finite number from 0 on."""
    if not _is_number(value) or not 0 <= value <= MOST:
        _wrong(where, value, "a finite number from 0 on")


def bound(value: Any, where: str) -> None:
    """A bound, an error or their ratio: from 0 on, infinity included (an output of norm 0 has such a bound)."""
    if not _is_number(value) or not (0 <= value <= MOST or value == math.inf):
        _wrong(where, value, "a number from 0 on")


def count(value: Any, where: str) -> None:
    """A whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        _wrong(where, value, "a whole number from 0 on")


def text(value: Any, where: str) -> None:
    """A string."""
    if not isinstance(value, str):
        _wrong(where, value, "a string")


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        _wrong(where, value, "true or false")


def plain(value: Any, where: str) -> None:
    """Anything that JSON has, NaN apart: settings and surroundings are shown as they are."""
    if isinstance(value, dict):
        for name, part in value.items():
            plain(part, f"{where}.{name}")
    elif isinstance(value, list):
        for place, part in enumerate(value):
            plain(part, f"{where}[{place}]")
    elif isinstance(value, float) and math.isnan(value):
        _wrong(where, value, "a number")


def either(*checks: Check) -> Check:
    """What passes one of the checks; the last one says what was expected."""

    def check(value: Any, where: str) -> None:
        for one in checks[:-1]:
            try:
                return one(value, where)
            except InputError:
                continue
        return checks[-1](value, where)

    return check


def optional(inner: Check) -> Check:
    """Null, or what `inner` passes."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def listed(inner: Check, least: int = 0) -> Check:
    """A list of what `inner` passes."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            _wrong(where, value, f"a list of at least {least}" if least else "a list")
        for place, part in enumerate(value):
            inner(part, f"{where}[{place}]")

    return check


def mapping(inner: Check, numbered: bool = False) -> Check:
    """An object whose values `inner` passes. `numbered`: its names are whole numbers."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _wrong(where, value, "an object")
        for name, part in value.items():
            if numbered and not (name.isascii() and name.isdigit() and len(name) < 16):
                _wrong(f"a name in {where.lstrip('.')}", name, "a whole number")
            inner(part, f"{where}.{name}")

    return check


def record(needed: dict[str, Check], more: dict[str, Check] | None = None, also: Check | None = None) -> Check:
    """An object that has all of `needed`, perhaps some of `more`, and passes `also`. Other names are let be."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _wrong(where, value, "an object")
        missing = [name for name in needed if name not in value]
        if missing:
            raise InputError(f"{where.lstrip('.') or 'the file'} has no {missing[0]!r}.")
        for name, inner in {**needed, **(more or {})}.items():
            if name in value:
                inner(value[name], f"{where}.{name}")
        if also is not None:
            also(value, where)

    return check


def _same_shape(trace: dict[str, Any], where: str) -> None:
    """Every grid and list of a trace is as long as it must be."""
    columns, rows = trace["columns"], len(trace["rows"])
    if columns > MOST_COLUMNS or rows > MOST_ROWS:
        raise InputError(
            f"{where.lstrip('.')}: {rows:,} rows of {columns:,} columns; expected at most {MOST_ROWS:,} of {MOST_COLUMNS:,}."
        )
    grids = {name: trace[name] for name in ("bound_max", "bound_mean", "candidate_max")}
    lists = {"bytes_moved": trace["bytes_moved"], "items": trace["items"]}
    lists |= {f"rungs.{name}": values for name, values in trace["rungs"].items()}
    for name, grid in grids.items():
        if len(grid) != rows:
            raise InputError(f"{where.lstrip('.')}.{name} has {len(grid)} rows, expected {rows}.")
        lists |= {f"{name}[{place}]": row for place, row in enumerate(grid)}
    for name, values in lists.items():
        if len(values) != columns:
            raise InputError(f"{where.lstrip('.')}.{name} has {len(values)} columns, expected {columns}.")


def _pair(first: Check, second: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != 2:
            _wrong(where, value, "a list of two")
        first(value[0], f"{where}[0]")
        second(value[1], f"{where}[1]")

    return check


_QUANTILES = record({"max": bound}, {"count": count, **dict.fromkeys(("mean", "p50", "p90", "p99"), bound)})
_RELATIVE = mapping(optional(_QUANTILES))
_RUNGS = record(dict.fromkeys(RUNGS, count))
_HEAD = record({"rungs": _RUNGS, "relative": _RELATIVE})
_OVERALL = record({"head_steps": count, "rungs": _RUNGS, "relative": _RELATIVE}, {"bytes_moved": count})
_LAYER = record({"head_steps": count, "rungs": _RUNGS, "relative": _RELATIVE}, {"bytes_moved": count, "heads": listed(_HEAD)})
_GRID = listed(listed(optional(bound)))
_TRACE = record(
    {
        "steps": count, "columns": count, "rows": listed(_pair(count, count)), "bound_max": _GRID, "bound_mean": _GRID,
        "candidate_max": _GRID, "rungs": record(dict.fromkeys(RUNGS, listed(count))), "bytes_moved": listed(amount),
        "items": listed(count),
    },
    also=_same_shape,
)  # fmt: skip
_HISTOGRAMS = mapping(listed(_pair(optional(amount), count)))
_MEMORY = record(
    {"device_bytes": count, "dense_bytes": count}, {"host_bytes": count, "working_bytes": count, "parts": mapping(count)}
)
_CERTIFICATE = record(
    {"certified": flag, "overall": _OVERALL},
    {
        "settings": mapping(plain), "layers": mapping(_LAYER, numbered=True), "trace": optional(_TRACE), "memory": _MEMORY,
        "histograms": optional(_HISTOGRAMS), "exact_head_steps": count, "repaired_blocks": count,
        "exact_layers": mapping(text, numbered=True), "materialised_operations": mapping(count),
    },
)  # fmt: skip
_INTERVAL = record({"mean": number}, {"low": optional(number), "high": optional(number)})
_DISCORDANT = record({"better": count, "worse": count, "p": optional(number)})
_SUMMARY = record(
    {"items": count, "score": optional(number), "difference": optional(_INTERVAL)},
    {
        "discordant": optional(_DISCORDANT), "kl": optional(number), "same_top": optional(number),
        "equal": optional(number), "perplexity": optional(number), "perplexity_difference": optional(_INTERVAL),
    },
)  # fmt: skip
_SUMMARIES = record({"overall": _SUMMARY}, {"contexts": mapping(_SUMMARY, numbered=True), "tasks": mapping(_SUMMARY)})
_ITEM = record(
    {"id": either(count, text), "scores": mapping(record({"score": optional(number)}, {"kl": optional(number)}, also=plain))},
    {"context": optional(count), "group": optional(mapping(either(number, text)))},
)
_METRIC = record({"name": text, "label": text, "unit": text, "higher_is_better": flag, "right_or_wrong": flag})
_SETTINGS = optional(mapping(plain))


def _tolerances(settings: Any, where: str) -> None:
    """What the page computes with; the rest of the settings is shown as it is."""
    _SETTINGS(settings, where)
    for name in ("rtol", "atol"):
        if settings is not None and name in settings:
            amount(settings[name], f"{where}.{name}")


_QUARTILES = record({"median": amount}, {"q1": optional(amount), "q3": optional(amount), "n": optional(count)})
_SPEED = record({"decode_ms": optional(_QUARTILES)}, {"over_dense": optional(_QUARTILES)})
_COMMON: dict[str, Check] = {
    "model": record({"name": text}, also=plain),
    "environment": mapping(plain),
    "caches": listed(record({"name": text, "settings": _tolerances}), least=1),
    "certificates": mapping(_CERTIFICATE),
}
_BYTES = record({}, {"measured": mapping(_MEMORY), "planned": mapping(mapping(_MEMORY, numbered=True))})
_MORE: dict[str, Check] = {
    "memory": _BYTES, "speed": mapping(_SPEED), "text": optional(text), "complete": flag, "config_hash": optional(text),
    "processes": optional(count), "seconds": optional(amount),
}  # fmt: skip
_GENERATE = record(_COMMON, _MORE)
_EVAL = record(
    {
        **_COMMON, "complete": flag, "items": listed(_ITEM), "summary": mapping(_SUMMARIES),
        "task": record({"name": text, "metric": _METRIC}, {"settings": optional(mapping(plain))}),
    },
    _MORE,
)  # fmt: skip
