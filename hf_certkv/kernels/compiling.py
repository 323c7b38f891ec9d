"""How kernels are compiled by numba: cached on disk where that is possible, with a word to the user when it takes time."""

from __future__ import annotations

import gc
import hashlib
import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..interrupts import uninterrupted

_announced = False


def announce(function: Any) -> None:
    """Say on stderr, once per process, that kernels are being compiled, if that one has to be."""
    global _announced
    if not _announced and not is_kept(function):
        _announced = True
        print("hf_certkv: compiling CPU kernels (once; kept on disk where the cache can be written)", file=sys.stderr)


def is_kept(function: Any) -> bool:
    """Whether an earlier process left this version of a kernel on disk, or this one has compiled it."""
    if function.signatures:
        return True
    try:
        return bool(function._cache._cache_file._load_index())
    except Exception:  # these are numba's own matters, and may change
        return False


def address(function: Any) -> int:
    """Where the C function `void f(intp)` of a kernel begins; compiled, or taken from disk, if that was not done before."""
    from numba import types

    if is_kept(function):
        with uninterrupted():  # numba frees much while it loads, and Ctrl-C in a destructor gets lost
            function.compile((types.intp,))
    else:
        function.compile((types.intp,))
    compiled = function.overloads[(types.intp,)]
    found: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)
    return found


@cache
def numba() -> Any:
    """The module, imported at first use."""
    with uninterrupted():  # garbage of others is freed meanwhile, and Ctrl-C in a destructor gets lost
        gc.collect()
        return importlib.import_module("numba")


@cache
def version() -> str:
    """A digest of all sources that a kernel may be made of: other kernels that it calls, constants that it takes over."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), here.parent / "bounds.py", here.parent / "codecs.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` without the interpreter's lock, cached on disk. Args: options: further ones of `njit`.

    numba takes what it has on disk for a function if that function's own file is unchanged. A kernel of yesterday must not
    measure blocks for the codec of today: the name that goes into the cache has the version of all sources in it.
    """
    njit = numba().njit

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            function.__qualname__ += f"_{version()}"
            return njit(nogil=True, cache=True, **options)(function)
        except (RuntimeError, OSError):  # there is no place to write to, or no source to read
            return njit(nogil=True, **options)(function)

    return compiled


@cache
def _linked(optimised: bool) -> Any:
    """The compiler of functions that only kernels call: their LLVM code becomes part of whatever calls them.

    numba would optimise each of them, with all that it calls, and turn it into machine code that nobody runs: that takes longer
    than the kernels themselves. What is replaced here is numba's own matter; where it has other names, numba does just that.
    Args: optimised: whether a function is optimised by itself nevertheless.
    """
    from numba.core.compiler import Compiler

    try:
        from numba.core.codegen import JITCodeLibrary
    except ImportError:
        return Compiler

    class Linked(JITCodeLibrary):
        def add_llvm_module(self, module: Any) -> None:
            if optimised:
                super().add_llvm_module(module)
            else:
                self._final_module.link_in(module)

        def _optimize_final_module(self) -> None:
            if optimised:
                super()._optimize_final_module()

        def _finalize_final_module(self) -> None:
            self._finalized = True

        @property
        def codegen(self) -> Any:
            return SimpleNamespace(set_env=lambda *_: None)  # there is no code whose environment could be set

    class Inner(Compiler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.state.library = Linked(self.state.targetctx.codegen(), "part")

    return Inner


def part(function: Callable[..., Any], **options: Any) -> Any:
    """A function that only kernels call: compiled into them, not kept by itself, without what Python would call it through.

    Python that calls it crashes: tests call a `kernel` that does.
    Its sums are in the order written, whoever calls it: unless told, numba would take over `fastmath` from a caller. Where they
    may be in any order, so that its loops can be vectorised, that is done before it is written out among others: later LLVM
    misses some.
    """
    inner: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "fastmath": False, **options}
    compiler = _linked(inner["fastmath"] is True or "reassoc" in (inner["fastmath"] or ()))
    return numba().njit(nogil=True, error_model="numpy", pipeline_class=compiler, **inner)(function)


def swift(function: Callable[..., Any]) -> Any:
    """As `part`; sums may be taken in any order, so that they can be vectorised. NaN and infinities stay as they are."""
    return part(function, fastmath={"reassoc", "nsz"})


def unrolled(function: Callable[..., Any]) -> Any:
    """As `part`, written out where it is called: a loop that calls anything is not vectorised."""
    return part(function, forceinline=True)
