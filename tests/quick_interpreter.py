"""Triton's interpreter without what takes most of its time: to patch the language again at every call of an inner function.

A launch patches `triton.language` for all that it calls. Inner functions that see `triton.language.core` too, as those of
Triton itself do, need that patched: once, for it stays so.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

CORE = "triton.language.core"
_done: set[str] = set()


def install() -> None:
    """For this process. Where Triton's insides are not as known here, nothing is changed."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    function, patch = getattr(interpreter, "InterpretedFunction", None), getattr(interpreter, "_patch_lang", None)
    error = getattr(interpreter, "InterpreterError", None)
    if function is None or patch is None or error is None or _done:
        return
    _done.add("installed")

    @cache
    def sees_core(fn: Any) -> bool:
        return any([value is sys.modules[CORE] for value in fn.__globals__.values()])

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if CORE not in _done and sees_core(self.fn):
            patch(self.fn)
            _done.add(CORE)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise error(repr(e)) from e

    function.__call__ = call
