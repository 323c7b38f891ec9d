"""`torch.compile` of a model around the cache: graphs end where the cache begins, and go on behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """The function; where a compiler traces the caller, as a call that it leaves alone. Steps branch on their certificates."""
    alone: Callable[P, T] = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return alone(*args, **kwargs)
        return function(*args, **kwargs)

    return call
