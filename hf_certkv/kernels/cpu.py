"""The decode kernel for CPUs (extra `cpu`): pass and certificate of a step in one call, threads divided over the KV heads.

Same sums and same bounds as `reference` and `bounds.total`, to which it is tested. One term is weaker: the mean of squared
distances by squared weights is bounded by what the other sums say of it (`bounds.square_moment_bound`): that saves a product.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import bounds, stages
from ..bounds import Certificate
from . import team, threads
from .reference import Segments

if TYPE_CHECKING:
    from ..codecs import ValueCodec
    from ..decode import DecodeStep
    from ..layers import CertifiedLayer
    from ..store import Index
    from .cpu_redo import Coded

LANES = 16
ROWS = 4  # query rows of a tile, as in `micro`
ITEMS = 4  # of work for each thread, at least, so that none waits long for the last; but spans of blocks no shorter than
SPAN = 8
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_scratch = threading.local()


def supports(step: DecodeStep) -> bool:
    """Whether numba is installed and the kernel has code for the layer's format and the call."""
    layer = step.layer
    capped = step.call.softcap != 0  # a cap of 0 makes every score 0, or NaN: the kernel takes 0 for none
    wanted = step.config.kernel != "reference" and capped
    if not (wanted and layer.device.type == "cpu" and fits(layer.value_codec, layer.widths) and installed()):
        return False
    return layer.memo("cpu kernel", lambda: _stored(layer)) is not None


def fits(codec: ValueCodec, widths: tuple[int, int]) -> bool:
    """Whether channels of keys and values, halves of values where two share a byte, and value groups fill vectors of 16."""
    channels, width = widths
    size = codec.group_size(width)
    filled = channels % LANES == 0 and width % (LANES if codec.bits == 8 else 2 * LANES) == 0
    return filled and (size == width or size % LANES == 0)


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether numba can be imported."""
    return find_spec("numba") is not None


class Scratch:
    """Arrays that calls of a thread use one after the other: they grow, and are not cleared."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[np.ndarray, int]] = {}

    def __call__(self, name: str, count: int, dtype: Any) -> tuple[np.ndarray, int]:
        """`count` numbers that an earlier call may have used too, and where they begin."""
        found = self._held.get(name)
        if found is None or len(found[0]) < count:
            array = np.empty(count + count // 64, dtype)
            found = self._held[name] = (array, array.ctypes.data)
        return found[0][:count], found[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array, _ in self._held.values())


def scratch_for(user: object) -> Scratch:
    """This thread's arrays; new ones while an earlier user still lives, whose numbers they are."""
    last = getattr(_scratch, "user", None)
    if last is not None and last() is not None:
        return Scratch()
    _scratch.user = weakref.ref(user)
    if not hasattr(_scratch, "arrays"):
        _scratch.arrays = Scratch()
    arrays: Scratch = _scratch.arrays
    return arrays


def scratch_bytes() -> int:
    """Bytes that this thread's calls hold between steps, for all layers and caches together."""
    return _scratch.arrays.nbytes if hasattr(_scratch, "arrays") else 0


def padded(rows: int) -> int:
    """Query rows of a KV head that a call computes for so many."""
    return 1 if rows == 1 else -(-rows // ROWS) * ROWS


def working_bytes(units: int, rows: int, blocks: int, channels: int, width: int) -> int:
    """Bytes of scratch that a step needs: `units` KV heads of all batch rows, `rows` query rows of each."""
    every = units * padded(rows)
    segments, figures = every * (blocks + 1), 5 * units * rows * blocks
    small = every * (12 * channels + 4) + units * (24 + 4 * blocks)
    return segments * (36 + 4 * width) + 8 * figures + 8 * every * blocks + small


class Stored(NamedTuple):
    """Where a layer's finished blocks lie: addresses of the parts of keys and values, and what their sizes say."""

    parts: tuple[int, int, int, int, int, int]
    numbers: tuple[int, int]
    counts: tuple[int, int]
    groups: int
    room: int


def _stored(layer: CertifiedLayer) -> Stored | None:
    """Where blocks lie; None where the buffers have unlike room, as when memory was refused to some while others grew."""
    keys, values = layer.store.keys, layer.store.values
    data = [part[name].data for part in (keys, values) for name in ("codes", "scale", "offset", "numbers")]
    present = [part for part in data if part is not None]
    if len({part.shape[2] for part in present}) != 1:
        return None
    pointers = [part.data_ptr() for part in present]
    return Stored(
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

    Attributes: result: the output in the layer's type `[B, H, R, W]`.
    """

    def __init__(self, step: DecodeStep) -> None:
        from .cpu_certify import Claim
        from .cpu_pass import Task

        self.layer = layer = step.layer
        config, call = step.config, step.call
        batch, heads, used, width = step.shape
        channels, units, blocks = layer.widths[0], batch * heads, step.blocks
        rows = padded(used)
        layer.working_bytes = working_bytes(units, used, blocks, channels, width)
        self.shape, self.units, self.rows, self.used, self.blocks = step.shape, units, rows, used, blocks
        stored = layer.memo("cpu kernel", lambda: _stored(layer))
        assert stored is not None, "asked for by `supports`"
        exact, codec = (step.exact_keys, step.exact_values), layer.value_codec
        if exact[0].stride(1) * width != exact[1].stride(1) * channels:  # unlike room, as in `_stored`
            exact = exact[0].contiguous(), exact[1].contiguous()
        query = call.query.detach().reshape(batch, heads, used, channels).resolve_neg().contiguous()
        sink = step.sink_logit.expand(batch, -1, -1).contiguous() if step.sink_logit is not None else None
        block_bias, exact_bias = (_along_tokens(bias) for bias in (step.block_bias, step.exact_bias))
        self.result = torch.empty(step.shape, dtype=layer.dtype, device=layer.device)  # whatever the default device is
        self.row_figures = np.empty((7, units * used))
        # Kept alive while their addresses are in use.
        self.inputs = (exact, query, sink, block_bias, exact_bias)
        self.scratch = scratch = scratch_for(self)
        segments = units * rows * (blocks + 1)
        self.maximum, maximum = scratch("maximum", segments, np.float32)
        self.sums, sums = scratch("sums", segments * 8, np.float32)
        self.output, output = scratch("output", segments * width, np.float32)
        self.block_figures, block_figures = scratch("figures", 5 * units * used * blocks, np.float64)
        scaled, sizes, raw = (scratch(name, units * rows * channels, np.float32)[1] for name in ("scaled", "sizes", "raw"))
        self.query = query.data_ptr()
        self.task = Task(
            scaled,
            sizes,
            *stored.parts,
            exact[0].data_ptr(),
            exact[1].data_ptr(),
            block_bias.data_ptr() if block_bias is not None else 0,
            exact_bias.data_ptr() if exact_bias is not None else 0,
            _strides(block_bias),
            _strides(exact_bias),
            maximum,
            sums,
            scratch("squares", units * blocks, np.float32)[1],
            output,
            scratch("l1", units * rows * blocks, np.float32)[1],
            scratch("l2", units * rows * blocks, np.float32)[1],
            rows,
            used,
            heads,
            channels,
            width,
            layer.block,
            blocks,
            stored.room,
            exact[0].shape[2],
            exact[0].stride(1) // channels,
            DTYPES[layer.dtype],
            codec.bits,
            stored.groups,
            -(-codec.group_size(width) // LANES),
            float(call.softcap or 0.0),
            1 + (stored.groups + 8) * 2.0**-23,
        )
        relative, absolute = bounds.OUTPUT_ROUNDOFF[layer.dtype]
        self.claim = Claim(
            raw,
            scratch("top", units * rows, np.float32)[1],
            *stored.numbers,
            *stored.counts,
            0,
            0,
            scratch("key_norm", units, np.float64)[1],
            scratch("value_norm", units, np.float64)[1],
            sink.data_ptr() if sink is not None else 0,
            units,
            layer.sequence_length,
            step.chain,
            self.result.data_ptr(),
            self.row_figures.ctypes.data,
            block_figures,
            float(call.scaling),
            float(step.bias_size),
            float(config.rtol),
            float(config.atol),
            relative,
            absolute,
        )

    def run(self) -> None:
        """The pass over everything at its base level, and its certificate."""
        from . import cpu_step

        count = torch.get_num_threads()
        spans = max(1, min(-(-ITEMS * count // self.units), self.blocks // SPAN)) if count > 1 else 1
        if spans > 1:
            self._do(cpu_step.PREPARE, 1)
        self._do(cpu_step.WHOLE, spans)

    def _do(self, what: int, spans: int = 1) -> None:
        """One of the kinds of work of `cpu_step`, on torch's threads."""
        from . import cpu_step

        left, place = self.scratch("left", self.units, np.int64)
        left[:] = spans
        step = np.empty(1, cpu_step.STEP)
        step[0] = (self.task, self.claim, (self.query, what, self.units, spans, place, 0, 0))
        team.run(_address(), step.ctypes.data, min(torch.get_num_threads(), self.units * spans))
        if step["work"]["done"][0] != self.units:
            finished = int(step["work"]["done"][0])
            raise MemoryError(f"no memory for scratch: the CPU kernel finished {finished} of {self.units} KV heads")

    def tell_stages(self) -> None:
        """What pass and certificate take, by doing both again, and the parts of the certificate by themselves."""
        from . import cpu_step

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
        from . import cpu_step

        levels = key_level.contiguous(), value_level.contiguous()
        self.row_figures = np.empty_like(self.row_figures)  # those of before may be in use
        before, figures = self.claim, self.row_figures.ctypes.data
        self.claim = before._replace(key_level=levels[0].data_ptr(), value_level=levels[1].data_ptr(), row_figures=figures)
        try:
            self._do(cpu_step.CERTIFY)
        finally:
            self.claim = before._replace(row_figures=figures)

    def segments(self) -> Segments:
        """Views of the pass's sums, without those by squared weights."""
        batch, heads, used, width = self.shape
        shape = (batch, heads, self.rows, self.blocks + 1)
        maximum = torch.from_numpy(self.maximum).view(shape)[:, :, :used]
        sums = torch.from_numpy(self.sums).view(*shape, 8)[:, :, :used]
        output = torch.from_numpy(self.output).view(batch, heads, self.blocks + 1, self.rows, width)[:, :, :, :used]
        return Segments(maximum, sums[..., 4], sums[..., 5], output, None, sums[..., :4])

    def read(self, kind: int, index: Index, levels: Tensor, out: Tensor) -> None:
        """Blocks at level 0 or 1 as float32, into their places of `out` `[n, block, channels]`; others are left alone."""
        from . import cpu_redo

        coded = self.layer.memo(f"cpu kernel, coded {kind}", lambda: _coded(self.layer, kind))
        units, numbers = self._units(index)
        levels = levels.contiguous()
        place, count = out.data_ptr(), len(units)
        given = (coded, units.data_ptr(), numbers.data_ptr(), levels.data_ptr(), count, place)
        threads.run(lambda start, stop: cpu_redo.read(*given, start, stop), count)

    def redo(self, index: Index, keys: Tensor, values: Tensor) -> None:
        """Put single blocks into the pass's sums anew. Args: keys, values: float32 `[n, block, channels]`, contiguous."""
        from . import cpu_pass, cpu_redo

        task, (units, numbers) = np.empty(1, cpu_pass.TASK), self._units(index)
        task[0] = self.task
        given = (task.ctypes.data, units.data_ptr(), numbers.data_ptr(), len(units), keys.data_ptr(), values.data_ptr())
        threads.run(lambda start, stop: cpu_redo.redo(*given, start, stop), len(units))

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
        return torch.from_numpy(self.block_figures).view(5, *self.shape[:3], self.blocks)[which].clone()

    def certificate(self) -> Certificate:
        """The bound and its parts."""
        bound, fixed, key_total, value_total = (self.row_figure(which) for which in (0, 3, 4, 5))
        return Certificate(bound, fixed, key_total, value_total, self.block_figure(2), self.block_figure(3))


@lru_cache(maxsize=1)
def _address() -> int:
    """Where the compiled step begins; it is compiled once, and not in every thread, with a word to the user."""
    from . import compiling, cpu_step

    if not compiling.is_kept(cpu_step.share):
        compiling.announce()
    return compiling.address(cpu_step.share)


def _along_tokens(bias: Tensor | None) -> Tensor | None:
    """A bias whose tokens lie one behind the other."""
    if bias is None:
        return None
    inner = bias.stride()[3:] == ((bias.shape[-1], 1) if bias.dim() == 5 else (1,))
    return bias if inner else bias.contiguous()


def _strides(bias: Tensor | None) -> tuple[int, int, int]:
    """Numbers from one batch row, KV head and query row to the next; 0 where they share."""
    if bias is None:
        return 0, 0, 0
    first, second, third = (step if size > 1 else 0 for size, step in zip(bias.shape[:3], bias.stride()[:3], strict=True))
    return first, second, third
