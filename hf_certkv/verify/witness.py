"""A witness: one call in a file, with what was found of it, that anyone can run again.

One safetensors file: the tensors `query`, `keys`, `values` and, where there are any, `mask` and `sinks`; one JSON text in the
metadata. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import CertKVConfig
from ..errors import ConfigError, InputError
from .cases import BASE, BITS, Case, Verdict, judge, run
from .oracle import flint

FORMAT, VERSION, KEY = "hf_certkv witness", 1, "witness"
NEEDED, OPTIONAL = ("query", "keys", "values"), ("mask", "sinks")


@dataclass(frozen=True)
class Witness:
    """A call and what was found of it.

    Attributes: case: settings completed by those of `cases.BASE`; share: error / bound, rounded up; where: batch row, query
        head and position; breaches: in words; note: what kind of case it is; versions: of what found it.
    """

    case: Case
    share: float
    where: tuple[int, ...] | None
    breaches: list[str]
    note: str
    versions: dict[str, str]


def save_witness(path: Path, case: Case, verdict: Verdict, note: str = "") -> None:
    """Write a call and its verdict; floats as hexadecimal text, so that they come back bit for bit."""
    tensors = {name: getattr(case, name) for name in (*NEEDED, *OPTIONAL) if getattr(case, name) is not None}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "note": note,
        "share": verdict.share.hex(),
        "share_decimal": repr(verdict.share),
        "where": verdict.where,
        "breaches": verdict.breaches,
        "scale": None if case.scale is None else float(case.scale).hex(),
        "softcap": None if case.softcap is None else float(case.softcap).hex(),
        "settings": {**BASE, **case.settings},
        "versions": {
            "hf_certkv": __version__,
            "torch": str(torch.__version__),
            "python-flint": flint.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: part.detach().cpu().contiguous().clone() for name, part in tensors.items()}, path, {KEY: json.dumps(about)}
    )


def load_witness(path: Path) -> Witness:
    """Read and check a witness.

    Raises: InputError: no such file, not a witness, a tensor or a figure that is missing or not what it must be.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected a witness in the safetensors format, got something else ({error}).") from error
    try:
        about = json.loads(text or "")
    except (ValueError, RecursionError) as error:  # no JSON, or a number of too many digits
        raise InputError(f"{path}: expected JSON under {KEY!r} in the metadata, got {str(text)[:40]!r}.") from error
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        given = (about.get("format"), about.get("version")) if isinstance(about, dict) else type(about).__name__
        raise InputError(f"{path}: expected format {FORMAT!r} in version {VERSION}, got {given}.")
    missing, unknown = set(NEEDED) - set(tensors), set(tensors) - {*NEEDED, *OPTIONAL}
    if missing or unknown:
        raise InputError(f"{path}: expected the tensors {NEEDED} and perhaps {OPTIONAL}, got {sorted(tensors)}.")
    _check_shapes(path, tensors)
    share = _number(path, about, "share")
    if share is None:
        raise InputError(f"{path}: expected 'share' as a hexadecimal float, got None.")
    case = Case(
        **tensors, scale=_number(path, about, "scale"), softcap=_number(path, about, "softcap"), settings=_settings(path, about)
    )
    where = about.get("where")
    return Witness(
        case,
        share,
        tuple(int(x) for x in where) if isinstance(where, list) and all(isinstance(x, int) for x in where) else None,
        [str(breach) for breach in about["breaches"]] if isinstance(about.get("breaches"), list) else [],
        str(about.get("note", "")),
        {str(k): str(v) for k, v in about["versions"].items()} if isinstance(about.get("versions"), dict) else {},
    )


def _check_shapes(path: Path, tensors: dict[str, Tensor]) -> None:
    query, keys, values = (tensors[name] for name in NEEDED)
    shapes = {name: tuple(part.shape) for name, part in tensors.items()}
    fits = (
        query.dim() == keys.dim() == values.dim() == 4
        and all(part.numel() for part in (query, keys, values))
        and keys.shape[:3] == values.shape[:3]
        and (query.shape[0], query.shape[3]) == (keys.shape[0], keys.shape[3])
        and query.shape[1] % keys.shape[1] == 0
        and query.shape[2] < keys.shape[2]
        and query.dtype == keys.dtype == values.dtype
        and query.dtype in BITS
    )
    mask, sinks = tensors.get("mask"), tensors.get("sinks")
    if mask is not None:
        full = (*query.shape[:3], keys.shape[2]) if query.dim() == keys.dim() == 4 else ()
        sizes = zip(mask.shape[::-1], full[::-1], strict=False)
        fits = fits and 2 <= mask.dim() <= 4 and mask.shape[-1] == full[-1] and all(size in (1, whole) for size, whole in sizes)
        fits = fits and mask.dtype in (torch.bool, torch.float32, query.dtype)
    if sinks is not None:
        fits = fits and sinks.shape == query.shape[1:2] and sinks.is_floating_point()
    if not all(bool(torch.isfinite(tensors[name]).all()) for name in (*NEEDED, "sinks") if name in tensors):
        raise InputError(f"{path}: expected finite numbers in query, keys, values and sinks: the oracle is exact.")
    if not fits:
        raise InputError(f"{path}: expected the tensors of one attention call, got the shapes {shapes} and {query.dtype}.")


def _number(path: Path, about: dict[str, Any], name: str) -> float | None:
    given = about.get(name)
    if given is None:
        return None
    try:
        number = float.fromhex(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number) or (name != "share" and math.isinf(number)) or (name == "softcap" and number == 0):
        raise InputError(f"{path}: expected {name!r} as a hexadecimal float, got {str(given)[:40]!r}.")
    return number


def _settings(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    given = about.get("settings")
    try:
        CertKVConfig.from_dict(given)  # type: ignore[arg-type]
    except ConfigError as error:
        raise InputError(f"{path}: expected settings of the cache, got others: {error}") from error
    assert isinstance(given, dict)
    return {**given, "record": "full"}


def replay(path: Path, device: torch.device) -> Verdict:
    """Run a witness with the code that is here, and judge it exactly.

    Raises: InputError: as `load_witness`; or nothing of the call is quantised, so nothing is certified.
    """
    case = load_witness(path).case.to(device)
    try:
        output, record, cache = run(case)
    except IndexError as error:
        raise InputError(f"{path}: expected a call that is certified, got one without a finished block.") from error
    return judge(case, output, record, cache.settings)
