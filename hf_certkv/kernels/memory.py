"""What lies at an address, for kernels: arrays of numbers, records of a call's sizes and addresses, a shared counter."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, types
from numba.extending import intrinsic as _intrinsic

from .compiling import part

intrinsic: Any = _intrinsic  # its calls look otherwise than its definition


def record(kind: type[NamedTuple]) -> np.dtype[Any]:
    """The record that holds such a tuple: int64 and float64 numbers, and triples of the former."""
    fields: list[Any] = []
    for name, hint in get_type_hints(kind).items():
        fields.append((name, np.float64) if hint is float else (name, np.int64) if hint is int else (name, np.int64, (3,)))
    return np.dtype(fields)


def pointer_to(kind: Any) -> Any:
    """A function of kernels that makes a typed pointer of an address."""

    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        signature = types.CPointer(kind)(types.intp)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return pointer


def reader(dtype: np.dtype[Any]) -> Any:
    """A function of kernels that gives the record at an address."""
    pointer = pointer_to(from_dtype(dtype))

    @part
    def read(address: int) -> Any:
        return carray(pointer(address), 1)[0]

    return read


@intrinsic
def add_shared(typing: Any, address: Any, more: Any) -> Any:
    """Add to the int64 number at an address that other threads add to as well. Returns what it was.

    What a thread wrote before is seen by the thread that adds next.
    """
    signature = types.int64(types.intp, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return signature, generate


_float_pointer, _double_pointer, _long_pointer = (pointer_to(kind) for kind in (types.float32, types.float64, types.int64))
_short_pointer, _bits_pointer = pointer_to(types.uint16), pointer_to(types.uint32)


@part
def float32s(address: int, count: int) -> Any:
    """The array of `count` float32 numbers at an address."""
    return carray(_float_pointer(address), count)


@part
def float64s(address: int, count: int) -> Any:
    """The array of `count` float64 numbers at an address."""
    return carray(_double_pointer(address), count)


@part
def int64s(address: int, count: int) -> Any:
    """The array of `count` int64 numbers at an address."""
    return carray(_long_pointer(address), count)


@part
def uint16s(address: int, count: int) -> Any:
    """The array of `count` 16-bit numbers at an address."""
    return carray(_short_pointer(address), count)


@part
def uint32s(address: int, count: int) -> Any:
    """The array of `count` float32 numbers at an address, by their bits."""
    return carray(_bits_pointer(address), count)
