"""Streams and events without a GPU: copies queued on a side stream are done late, as late as what waits for them allows.

Only non-blocking copies are late. What the current stream computes is done at once: a missing wait reads what is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_certkv import hot_slots, originals, shadow, streams


class Stream:
    """A queue of copies. Attributes: done: how many of them have been carried out."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.queue, self.done = gpu, list[Callable[[], Any]](), 0

    def run(self, stop: int | None = None) -> None:
        """Carry out what is queued, the first `stop` or all."""
        while self.done < (len(self.queue) if stop is None else stop):
            self.queue[self.done]()
            self.done += 1

    def wait_stream(self, other: Stream) -> None:
        self.gpu.log.append("wait_stream")
        if not self.queue[self.done :]:
            other.run()
        else:
            self.queue.append(other.run)

    def wait_event(self, event: Event) -> None:
        self.gpu.log.append("wait_event")
        event.stream.run(event.at)

    def synchronize(self) -> None:
        self.gpu.log.append("synchronize")
        self.run()


class Event:
    """A place in a queue."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self, stream: Stream) -> None:
        self.gpu.log.append("record")
        self.stream, self.at = stream, len(stream.queue)

    def query(self) -> bool:
        return self.stream.done >= self.at

    def synchronize(self) -> None:
        self.gpu.log.append("synchronize")
        self.stream.run(self.at)


class FakeGpu:
    """Puts itself in the place of `torch.cuda`, and has the package believe that the CPU's work is queued.

    Attributes: log: what was recorded, copied, kept and waited for, in order; streams: the side streams.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log, self.streams, self.main = list[str](), list[Stream](), Stream(self)
        self.current = self.main
        patch.setattr(torch.cuda, "Stream", lambda device: self._new())
        patch.setattr(torch.cuda, "Event", lambda: Event(self))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "stream", self._inside)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: self.log.append("synchronize"))
        patch.setattr(streams.SideStream, "keep", lambda side, *tensors: self.log.append("keep"))
        for module in (streams, shadow, originals, hot_slots):
            patch.setattr(module, "asynchronous", lambda device: True)
        real = torch.Tensor.copy_

        def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if not non_blocking:
                return real(target, source)
            self.log.append("copy")
            assert target.is_contiguous() and source.is_contiguous(), "torch copies anything else by way of pageable memory"
            if self.current is self.main:
                return real(target, source)
            self.current.queue.append(lambda: real(target, source))
            return target

        patch.setattr(torch.Tensor, "copy_", copy)

    def _new(self) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def _inside(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def finish(self) -> None:
        """All side streams have done what was queued."""
        for stream in self.streams:
            stream.run()

    def waits(self) -> int:
        """How often the host has waited."""
        return self.log.count("synchronize")
