"""The decode kernel for CPUs (extra `cpu`): pass and certificate of a step in one call, threads divided over the KV heads.

Same sums and same bounds as `reference` and `bounds.total`, to which it is tested. One term is weaker: the mean of squared
distances by squared weights is bounded by what the other sums say of it (`bounds.square_moment_bound`): that saves a product.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import stages
from ..bounds import Certificate
from . import compiling, team, threads
from .reference import Segments
from .scratch import scratch_for

if TYPE_CHECKING:
    from ..certified_pass import CertifiedPass
    from ..codecs import ValueCodec
    from ..layers import CertifiedLayer
    from ..store import Index
    from .cpu_redo import Coded

LANES = 16
ROWS = 4  # query rows of a tile, as in `micro`
ITEMS = 4  # of work for each thread, at least, so that none waits long for the last; but spans of blocks no shorter than
SPAN = 8
READ_AT_LEAST, REDONE_AT_LEAST = 64, 8  # blocks that are worth a thread
LARGEST = 512  # channels of a key whose digit sums an int32 holds
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def supports(step: CertifiedPass) -> bool:
    """Whether numba is installed and the kernel has code for the layer's format and the call."""
    # A softcap of 0 makes every score 0, or NaN: the kernel takes it for none.
    if step.config.kernel == "reference" or step.call.softcap == 0:
        return False
    layer = step.layer
    return layer.memo("cpu kernel", lambda: stored(layer)) is not None


def fits(codec: ValueCodec, widths: tuple[int, int]) -> bool:
    """Whether channels of keys and values, halves of values where two share a byte, and value groups fill vectors of 16."""
    channels, width = widths
    size = codec.group_size(width)
    filled = channels % LANES == 0 and width % (LANES if codec.bits == 8 else 2 * LANES) == 0
    return filled and (size == width or size % LANES == 0)


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether numba can be imported, and compiles."""
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


INTEGERS = True  # whether codes are multiplied as integers where the processor can do that


def integral(channels: int) -> bool:
    """Whether codes of keys of so many channels, and of values, are multiplied as integers."""
    from . import micro_integers

    return INTEGERS and channels % micro_integers.CHUNK == 0 and channels <= LARGEST and micro_integers.supported()


def padded(rows: int) -> int:
    """Query rows of a KV head that a call computes for so many."""
    return 1 if rows == 1 else -(-rows // ROWS) * ROWS


def working_bytes(units: int, rows: int, blocks: int, channels: int, width: int) -> int:
    """Bytes of scratch that a step needs: `units` KV heads of all batch rows, `rows` query rows of each."""
    every = units * padded(rows)
    segments, figures = every * (blocks + 1), 5 * units * rows * blocks
    small = every * (12 * channels + 4) + units * (32 + 8 * blocks)
    return segments * (36 + 4 * width) + 8 * figures + 12 * every * blocks + small


class Stored(NamedTuple):
    """Where a layer's finished blocks lie: addresses of the parts of keys and values, and what their sizes say."""

    lengths: int
    parts: tuple[int, int, int, int, int, int]
    numbers: tuple[int, int]
    counts: tuple[int, int]
    groups: int
    room: int


def stored(layer: CertifiedLayer) -> Stored | None:
    """Where blocks lie; None where the kernel has no code for the format, or the buffers have unlike room.

    They do when memory was refused to some while others grew.
    """
    if layer.device.type != "cpu" or not fits(layer.value_codec, layer.widths) or not installed():
        return None
    keys, values = layer.store.keys, layer.store.values
    data = [part[name].data for part in (keys, values) for name in ("codes", "scale", "offset", "numbers")]
    present = [part for part in data if part is not None]
    if len({part.shape[2] for part in present}) != 1:
        return None
    pointers = [part.data_ptr() for part in present]
    lengths = values["lengths"].data
    if lengths is None or lengths.shape[2] != present[0].shape[2]:
        return None
    return Stored(
        lengths.data_ptr(),
        (pointers[0], pointers[1], pointers[2], pointers[4], pointers[5], pointers[6]),
        (pointers[3], pointers[7]),
        (present[3].shape[-1], present[7].shape[-1]),
        present[5].shape[-1],
        present[0].shape[2],
    )


def _coded(layer: CertifiedLayer, kind: int) -> Coded:
    """Where the codes of keys (0) or values (1) lie."""
    from .cpu_redo import Coded

    buffers, codec, width = (layer.store.keys, layer.store.values)[kind], layer.value_codec, layer.widths[kind]
    codes, plane, scale, offset = (buffers[name].data for name in ("codes", "plane", "scale", "offset"))
    assert codes is not None and scale is not None and offset is not None
    group, bits = (codec.group_size(width), codec.bits) if kind else (0, 8)
    planes = (plane.data_ptr(), plane.shape[2]) if plane is not None else (0, 0)
    groups = scale.shape[-1] if kind else 0
    sizes = (layer.block, width, groups, group, bits)
    return Coded(codes.data_ptr(), planes[0], scale.data_ptr(), offset.data_ptr(), codes.shape[2], planes[1], *sizes)


class FusedStep:
    """A step on the CPU: its arrays, and what the certificate says of them. Shapes as in `DecodeStep`.

    Attributes: result: the output in the layer's type `[B, H, R, W]`; row_figures: as in `Claim`; integers: whether codes are
        multiplied as such; certified_again: whether some blocks were computed in float32 after that.
    """

    def __init__(self, step: CertifiedPass) -> None:
        cpu_layout, _ = _modules()
        AT = cpu_layout.AT  # noqa: N806

        self.layer = layer = step.layer
        config, call = step.config, step.call
        batch, heads, used, width = step.shape
        channels, self.blocks, self.shape, self.used = layer.widths[0], step.blocks, step.shape, used
        self.units, self.rows = batch * heads, padded(used)
        exact = (step.exact_keys, step.exact_values)
        if exact[0].stride(1) * width != exact[1].stride(1) * channels:  # unlike room, as in `stored`
            exact = exact[0].contiguous(), exact[1].contiguous()
        query = call.query.detach().reshape(batch, heads, used, channels).resolve_neg().contiguous()
        self.result = torch.empty(step.shape, dtype=layer.dtype, device=layer.device)  # whatever the default device is
        self.row_figures = np.empty((7, self.units * used))
        self.scratch = scratch_for(self)
        self.numbers = ints = cpu_layout.template(self, config)
        floats = ints.view(np.float64)
        self.integers, self.certified_again = bool(ints[AT["integers"]]), False
        ints[AT["query_given"]] = query.data_ptr()
        ints[AT["exact_keys"]], ints[AT["exact_values"]] = exact[0].data_ptr(), exact[1].data_ptr()
        ints[AT["exact"]], ints[AT["exact_room"]] = exact[0].shape[2], exact[0].stride(1) // channels
        ints[AT["result"]], ints[AT["row_figures"]] = self.result.data_ptr(), self.row_figures.ctypes.data
        ints[AT["tokens"]], ints[AT["chain"]] = layer.sequence_length, step.chain
        floats[AT["scaling"]], floats[AT["softcap"]] = call.scaling, call.softcap or 0.0
        others: list[Tensor] = []
        if call.mask is not None:
            floats[AT["bias_size"]] = float(step.bias_size)
            for name, bias in (("block", step.block_bias), ("exact", step.exact_bias)):
                if bias is not None:
                    others.append(_along_tokens(bias))
                    ints[AT[f"{name}_bias"]] = others[-1].data_ptr()
                    at = AT[f"{name}_strides"]
                    ints[at : at + 3] = _strides(others[-1])
        if step.sink_logit is not None:
            others.append(step.sink_logit.expand(batch, -1, -1).contiguous())
            ints[AT["sink"]] = others[-1].data_ptr()
        self.inputs = (exact, query, others)  # kept alive while their addresses are in use

    def run(self) -> None:
        """The pass over everything at its base level, and its certificate."""
        cpu_step = _modules()[1]
        count = torch.get_num_threads()
        spans = max(1, min(-(-ITEMS * count // self.units), self.blocks // SPAN)) if count > 1 else 1
        if spans > 1:
            self._do(cpu_step.PREPARE, 1)
        self._do(cpu_step.WHOLE, spans)

    def _do(self, what: int, spans: int = 1) -> None:
        """One of the kinds of work of `cpu_step`, on torch's threads."""
        AT = _modules()[0].AT  # noqa: N806
        ints, left = self.numbers, self.scratch("left", self.units, np.int64)[0]
        left[:] = spans
        ints[AT["what"]], ints[AT["spans"]], ints[AT["taken"]], ints[AT["done"]] = what, spans, 0, 0
        team.run(_address(self.integers), ints.ctypes.data, min(torch.get_num_threads(), self.units * spans))
        finished = int(ints[AT["done"]])
        if finished != self.units:
            raise MemoryError(f"no memory for scratch: the CPU kernel finished {finished} of {self.units} KV heads")

    def tell_stages(self) -> None:
        """What pass and certificate take, by doing both again, and the parts of the certificate by themselves."""
        _, cpu_step = _modules()

        def seconds(call: Callable[[], None]) -> float:
            return min(stages.timed(call)[0] for _ in range(3))

        def repeat() -> None:
            whole, merged = seconds(self.run), seconds(lambda: self._do(cpu_step.MERGE))
            certified = seconds(lambda: self._do(cpu_step.CERTIFY)) - merged
            stages.add(stages.CERTIFICATE, certified)
            stages.add(stages.PASS, whole - certified)
            stages.add(stages.AROUND, -whole)

        stages.add(stages.AROUND, -stages.timed(repeat)[0])

    def certify(self, key_level: Tensor, value_level: Tensor) -> None:
        """The certificate again, after blocks were raised to these levels: int64 `[B, H, N]`."""
        cpu_layout, cpu_step = _modules()
        AT = cpu_layout.AT  # noqa: N806

        levels = key_level.contiguous(), value_level.contiguous()
        self.row_figures = np.empty_like(self.row_figures)  # those of before may be in use
        self.certified_again = True
        ints = self.numbers
        ints[AT["row_figures"]] = self.row_figures.ctypes.data
        ints[AT["key_level"]], ints[AT["value_level"]] = levels[0].data_ptr(), levels[1].data_ptr()
        try:
            self._do(cpu_step.CERTIFY)
        finally:
            ints[AT["key_level"]] = ints[AT["value_level"]] = 0

    def segments(self) -> Segments:
        """Views of the pass's sums, without those by squared weights."""
        batch, heads, used, width = self.shape
        shape = (batch, heads, self.rows, self.blocks + 1)
        count = math.prod(shape)
        flat = [
            self.scratch(name, count * each, np.float32)[0] for name, each in (("maximum", 1), ("sums", 8), ("output", width))
        ]
        maximum = torch.from_numpy(flat[0]).view(shape)[:, :, :used]
        sums = torch.from_numpy(flat[1]).view(*shape, 8)[:, :, :used]
        output = torch.from_numpy(flat[2]).view(batch, heads, self.blocks + 1, self.rows, width)[:, :, :, :used]
        return Segments(maximum, sums[..., 4], sums[..., 5], output, None, sums[..., :4])

    def read(self, kind: int, index: Index, levels: Tensor, out: Tensor) -> None:
        """Blocks at level 0 or 1 as float32, into their places of `out` `[n, block, channels]`; others are left alone."""
        from . import cpu_redo

        compiling.announce(cpu_redo.read)
        coded = self.layer.memo(f"cpu kernel, coded {kind}", lambda: _coded(self.layer, kind))
        units, numbers = self._units(index)
        levels = levels.contiguous()
        place, count = out.data_ptr(), len(units)
        given = (coded, units.data_ptr(), numbers.data_ptr(), levels.data_ptr(), count, place)
        threads.run(lambda start, stop: cpu_redo.read(*given, start, stop), count, READ_AT_LEAST)

    def redo(self, index: Index, keys: Tensor, values: Tensor) -> None:
        """Put single blocks into the pass's sums anew. Args: keys, values: float32 `[n, block, channels]`, contiguous."""
        from . import cpu_redo

        compiling.announce(cpu_redo.redo)
        units, numbers = self._units(index)
        given = (self.numbers.ctypes.data, units.data_ptr(), numbers.data_ptr(), len(units), keys.data_ptr(), values.data_ptr())
        threads.run(lambda start, stop: cpu_redo.redo(*given, start, stop), len(units), REDONE_AT_LEAST)

    def _units(self, index: Index) -> tuple[Tensor, Tensor]:
        rows, heads, blocks = index
        return rows * self.shape[1] + heads, blocks.contiguous()

    def row_figure(self, which: int) -> Tensor:
        """Bound, norm, expected, fixed, key total, value total, or 1 where the budget is met: float64 `[B, H, R]`."""
        return torch.from_numpy(self.row_figures[which]).view(self.shape[:3])

    def all_met(self) -> bool:
        """Whether every row's bound is within its own budget."""
        return bool(self.row_figures[6].all())

    def block_figure(self, which: int) -> Tensor:
        """Mass, shift, key part, value part, or mean step: float64 `[B, H, R, N]`, a copy."""
        figures = self.scratch("figures", 5 * self.units * self.used * self.blocks, np.float64)[0]
        return torch.from_numpy(figures).view(5, *self.shape[:3], self.blocks)[which].clone()

    def query_weights(self) -> tuple[Tensor, Tensor]:
        """sum |q_c| S_c and ||q * S||_2 over the row's largest |q_c|, as the pass added them up, not rounded up: to choose by.

        Returns: float64 `[B, H, R, N]`, both.
        """
        batch, heads, used, _ = self.shape
        shape, count = (batch, heads, self.rows, self.blocks), self.units * self.rows * self.blocks
        flat = (torch.from_numpy(self.scratch(name, count, np.float32)[0]) for name in ("l1", "l2"))
        l1, l2 = (part.view(shape)[:, :, :used].double() for part in flat)
        return l1, l2.sqrt()

    def score_errors(self) -> Tensor:
        """How far scores of codes that were multiplied as integers may be off, else 0: float64 `[B, H, R, N]`, a copy."""
        batch, heads, used, _ = self.shape
        flat = self.scratch("errors", self.units * self.rows * self.blocks, np.float32)[0]
        return torch.from_numpy(flat).view(batch, heads, self.rows, self.blocks)[:, :, :used].double()

    def certificate(self) -> Certificate:
        """The bound and its parts."""
        bound, fixed, key_total, value_total = (self.row_figure(which) for which in (0, 3, 4, 5))
        return Certificate(bound, fixed, key_total, value_total, self.block_figure(2), self.block_figure(3))


@lru_cache(maxsize=1)
def _modules() -> tuple[Any, Any]:
    """`cpu_layout` and `cpu_step`, which need numba: imported at first use, and not looked for again in every step."""
    from . import cpu_layout, cpu_step

    return cpu_layout, cpu_step


@lru_cache(maxsize=2)
def _address(integers: bool) -> int:
    """Where the compiled step begins; it is compiled once, and not in every thread, with a word to the user."""
    from . import cpu_step

    function = cpu_step.share_integers if integers else cpu_step.share
    compiling.announce(function)
    return compiling.address(function)


def _along_tokens(bias: Tensor) -> Tensor:
    """A bias whose tokens lie one behind the other."""
    inner = bias.stride()[3:] == ((bias.shape[-1], 1) if bias.dim() == 5 else (1,))
    return bias if inner else bias.contiguous()


def _strides(bias: Tensor) -> tuple[int, int, int]:
    """Numbers from one batch row, KV head and query row to the next; 0 where they share."""
    first, second, third = (step if size > 1 else 0 for size, step in zip(bias.shape[:3], bias.stride()[:3], strict=True))
    return first, second, third
