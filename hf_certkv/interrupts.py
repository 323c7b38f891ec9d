"""Ctrl-C kept back while something is done that must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:  # what `signal` is made of: the wrapper turns handlers into enums, at ten times the price, and steps come here often
    import _signal as signals  # type: ignore[import-not-found]
except ImportError:  # not CPython's way to build `signal`
    signals = signal


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What runs inside is finished before Ctrl-C is answered. Keep it short: bookkeeping, no computation.

    Python answers signals in the main thread only; elsewhere, or where the handler is not Python's to move, nothing changes.
    Once inside, nothing gets lost and nothing is left out; before, Ctrl-C may still come, and what was to run inside does not.
    What must run nevertheless is run twice: `try: try: ... finally: tidy() finally: tidy()`, with a `tidy` that can be.
    """
    before = signals.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    received: list[tuple[Any, ...]] = []
    signals.signal(signal.SIGINT, lambda *given: received.append(given))
    try:
        yield
    finally:
        signals.signal(signal.SIGINT, before)
        if received:  # whatever the process does about Ctrl-C: an exception, its end, nothing
            signal.raise_signal(signal.SIGINT)
