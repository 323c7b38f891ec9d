"""How an operation is made to fail at a chosen point: tensors and host pages that cannot be allocated, Ctrl-C at any line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import shadow

LABORATORY = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(LABORATORY)


class Fault:
    """A failure to come at the k-th point. Attributes: seen: points that were passed; error: what was raised."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        self.error: BaseException | None = None

    def point(self) -> bool:
        """Another point is passed: whether this is the one."""
        self.seen += 1
        return self.seen == self.at


class TensorFault(TorchDispatchMode):
    """torch refuses the k-th operation that makes or writes a tensor; with `lasting`, all that make one from there on."""

    def __init__(self, fault: Fault, lasting: bool) -> None:
        super().__init__()
        self.fault, self.lasting = fault, lasting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        makes = any(part.alias_info is None and "Tensor" in str(part.type) for part in returned)
        writes = any(part.alias_info is not None and part.alias_info.is_write for part in returned)
        if (makes or (writes and not self.lasting)) and (self.fault.point() or (self.lasting and self.fault.error is not None)):
            self.fault.error = self.fault.error or torch.OutOfMemoryError(f"injected at {func}")
            raise self.fault.error
        return func(*args, **(kwargs or {}))


@contextmanager
def tensors_fail(fault: Fault) -> Iterator[None]:
    """One operation fails, as when another process took the memory for a moment."""
    with TensorFault(fault, lasting=False):
        yield


@contextmanager
def tensors_keep_failing(fault: Fault) -> Iterator[None]:
    """From the k-th on no tensor can be made: what undoes a step has to do without."""
    with TensorFault(fault, lasting=True):
        yield


def host_fails(kind: type[Exception]) -> Callable[[Fault], AbstractContextManager[None]]:
    """The k-th allocation for originals is refused."""

    @contextmanager
    def injected(fault: Fault) -> Iterator[None]:
        allocate = shadow.allocate_host

        def refuse(count: int, pinned: bool) -> torch.Tensor:
            if fault.point():
                fault.error = kind("injected: out of host memory")
                raise fault.error
            return allocate(count, pinned)

        shadow.allocate_host = refuse
        try:
            yield
        finally:
            shadow.allocate_host = allocate

    return injected


@contextmanager
def interrupted(fault: Fault) -> Iterator[None]:
    """SIGINT at the k-th point where a function of the package begins or a line of it is about to be executed."""

    def watched(frame: FrameType) -> bool:
        name = frame.f_code.co_filename
        return name.startswith(PACKAGE) and not name.startswith(LABORATORY)

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and fault.error is None and fault.point():
            fault.error = KeyboardInterrupt(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
            signal.raise_signal(signal.SIGINT)
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        if fault.error is not None or not watched(frame):
            return None
        if fault.point():
            fault.error = KeyboardInterrupt(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} (call)")
            signal.raise_signal(signal.SIGINT)
        return line

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


Inject = Callable[[Fault], AbstractContextManager[None]]
