"""Float32 products as float32, whatever the process has set: no autocast, no TF32 or bfloat16 short cuts.

torch has two ways to ask for such short cuts, an old one (`set_float32_matmul_precision`) and a newer one (`fp32_precision` of
each backend); mixing them makes the old getter raise. Here the newer one is used where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FULL = ("none", "ieee")


def _backends() -> list[Any]:
    """The backends whose float32 matrix products can be cut short; empty where torch has only the old way."""
    found = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in found if hasattr(backend, "fp32_precision")]


def float32_is_full() -> bool:
    """Whether a float32 matrix product outside `full_precision` is a float32 matrix product."""
    backends = _backends()
    if backends:
        return all(backend.fp32_precision in FULL for backend in backends)
    return torch.get_float32_matmul_precision() == "highest"


def ambient_is_full(device_type: str, dtype: torch.dtype) -> bool:
    """Whether attention over tensors of `dtype`, called here and now, is computed from them as they are."""
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != dtype:
        return False
    return dtype != torch.float32 or float32_is_full()


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Everything inside is computed in the precision of its tensors; the settings are put back behind it."""
    with torch.autocast(device_type, enabled=False):
        if float32_is_full():
            yield
            return
        backends = _backends()
        if not backends:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        # A backend that follows the setting above it is made to follow it again.
        above = getattr(torch.backends, "fp32_precision", "none")
        kept = [(backend, backend.fp32_precision) for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in kept:
                backend.fp32_precision = "none" if precision == above else precision
