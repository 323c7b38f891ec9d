"""Work on a stream beside the current one, ordered by events: the host waits for none of it. On the CPU all is done at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def asynchronous(device: torch.device) -> bool:
    """Whether work on the device is queued, and done later."""
    return device.type == "cuda"


class SideStream:
    """A stream of its own, made when it is first used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def queue(self, behind: bool = True) -> Iterator[None]:
        """What runs inside is queued here. Args: behind: behind all that the current stream has been given so far."""
        if not asynchronous(self.device):
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if behind:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """An event that comes when all that was queued here is done; None where it is done already."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def keep(self, *tensors: Tensor) -> None:
        """Tensors that were made on another stream are used here: their memory is not used again before that is done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: then events from before may not be asked for, and have come (torch waits)."""
    return torch.cuda.is_current_stream_capturing()


def has_come(event: torch.cuda.Event | None) -> bool:
    """Whether what was queued before the event is done, as far as that may be asked."""
    return event is None or (not capturing() and event.query())


def wait_for(device: torch.device, event: torch.cuda.Event | None) -> None:
    """The current stream goes on when the event has come. The host does not wait."""
    if event is not None and not capturing():
        torch.cuda.current_stream(device).wait_event(event)
