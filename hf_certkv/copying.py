"""Copies within host memory, without torch's own threads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .kernels import threads

FEW = 2**15  # numbers that torch copies on the calling thread
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(x: Tensor) -> np.ndarray:
    """A tensor on the CPU as numpy has it: integers of its numbers' bits."""
    return x.view(BITS[x.dtype.itemsize]).numpy()


def copy(out: Tensor, source: Tensor) -> None:
    """`out.copy_(source)` for tensors `[rows, ...]` of one shape and dtype on the CPU, by threads that wait for nobody.

    torch's threads go to sleep late and wait for each other at the end of every operation. Where some other thread has taken
    their processor meanwhile, as between the layers of a model, that costs more than the copy.
    """
    to, given = as_integers(out), as_integers(source.detach())

    def work(start: int, stop: int) -> None:
        to[start:stop] = given[start:stop]

    threads.run(work, len(given))


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()` of `[batch, heads, ...]`, copied as `copy` does where that can be."""
    if x.device.type != "cpu" or x.numel() <= FEW or x.is_contiguous() or x.requires_grad:
        return x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # whatever the default device is
    copy(out.transpose(0, 1), x.transpose(0, 1))
    return out
