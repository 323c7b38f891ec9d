"""A certified step as a fixed sequence of Triton kernels: pass, mix, merge, bound, climb, dense. The host waits for nothing.

Everything that a kernel needs lies on the device or is known before the step; what it found out stays there until somebody asks
(`facts`). So a step can be captured in a CUDA graph, and launches do not wait for one another.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import bounds, ladder
from ..checksums import multipliers
from ..codecs import ValueCodec
from . import triton_dense
from .triton_certify import FACTS, FIGURES, PARTIALS
from .triton_climb import COUNTS, climb
from .triton_common import power_of_two
from .triton_kernels import bound_kernel, merge_kernel, mix_kernel
from .triton_pass import SUMS, coded_pass, float_pass

if TYPE_CHECKING:
    from ..inputs import StepInputs
    from ..layers import CertifiedLayer

SPAN = 4  # blocks of a program of the pass
WARPS, STAGES = 1, 1  # of a program of the pass
CHUNK, TILE, FEW = 32, 256, 64  # segments of a program of `mix` and `bound`; blocks and chunks that are looked at together
MOST_ROWS, MOST_CHANNELS = 64, 256
TROUBLE = 4  # numbers: what is wrong, unit, block


@dataclass(frozen=True)
class Format:
    """How values are read: four bits or not, groups, channels of a group, bytes of a chunk, chunks, bits of a digit."""

    four: bool
    groups: int
    group: int
    columns: int
    chunks: int
    digit: int


def format_of(codec: ValueCodec, width: int, block: int) -> Format | None:
    """How the pass reads values of this codec; None where it has no way: sizes that do not fill powers of two."""
    group = codec.group_size(width)
    groups, four = -(-width // group), codec.bits == 4
    if width > MOST_CHANNELS or width % group or (four and width % 2):
        return None
    held = width // 2 if four else width
    # Sums of codes by digits stay below 2^24.
    digit = 11 if four or block <= 64 else 10
    if groups == 1:
        return Format(four, 1, width, max(16, power_of_two(held)), 1, digit)
    columns = math.gcd(held, group) if four else group
    if columns < 16 or columns & (columns - 1):
        return None
    return Format(four, groups, group, columns, held // columns, digit)


@dataclass(frozen=True)
class Stored:
    """A layer's buffers: data of the parts of keys and values, and blocks that there is room for in each."""

    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    key_room: int
    value_room: int
    form: Format


def stored(layer: CertifiedLayer) -> Stored | None:
    """Where a layer's blocks lie; None where the kernels have no code for the format, or parts have unlike room."""
    form = format_of(layer.value_codec, layer.widths[1], layer.block)
    if form is None or layer.widths[0] > MOST_CHANNELS:
        return None
    parts = [
        {n: b.data for n, b in buffers.items() if b.data is not None} for buffers in (layer.store.keys, layer.store.values)
    ]
    rooms = [{part.shape[2] for name, part in found.items() if name not in ("plane", "checksum")} for found in parts]
    if any([len(room) != 1 for room in rooms]):
        return None
    return Stored(parts[0], parts[1], rooms[0].pop(), rooms[1].pop(), form)


class Scratch(threading.local):
    """Tensors that the steps of a thread use one after the other, by device and stream: they grow, and are not cleared."""

    def __init__(self) -> None:
        self.held: dict[Any, Tensor] = {}

    def __call__(self, device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that an earlier step may have used too."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        count, key = math.prod(shape), (device, stream, name)
        found = self.held.get(key)
        if found is None or found.numel() < count:
            with torch.inference_mode(False):
                found = self.held[key] = torch.empty(count + count // 64, dtype=dtype, device=device)
        return found[:count].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.held.values())


scratch = Scratch()


@lru_cache(maxsize=256)
def constants(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 numbers on the device. They are copied there once: a step with new ones waits for that."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64).to(device)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of the interpreter, few programs that run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class DeviceStep:
    """One certified call, from its inputs to facts on the device. U units, R rows, N blocks, S segments, C chunks.

    Attributes:
        result: the output in the layer's type `[B, H, R, W]`; facts: float64 `[U, R, FACTS]`, see triton_certify.py; dense:
        int32 `[U]`, heads left to the dense rung; counts: float64 `[U, COUNTS]`, see triton_climb.py; trouble: int32
        `[TROUBLE]`, not 0 where a page was damaged; levels: int32 `[3, U, N]`, of keys, of values, and those that blocks began
        with.
    """

    def __init__(self, step: StepInputs) -> None:
        self.step, self.layer = step, step.layer
        layer, call = step.layer, step.call
        found = layer.memo("triton", lambda: stored(layer))
        assert found is not None, "asked for by `supports`"
        self.stored, self.device = found, layer.device
        self.units, self.used = step.shape[0] * step.shape[1], step.rows
        self.blocks, self.exact = step.blocks, step.exact_keys.shape[2]
        self.segments = self.blocks + -(-self.exact // layer.block)
        self.chunks = -(-self.segments // CHUNK)
        self.query = call.query.detach().reshape(self.units, self.used, layer.widths[0]).resolve_neg().contiguous()
        units, used, blocks, segments, chunks, width = (
            self.units, self.used, self.blocks, self.segments, self.chunks, layer.widths[1],
        )  # fmt: skip
        single, double = torch.float32, torch.float64
        self.maximum = self._new("maximum", (units, used, segments), single)
        self.sums = self._new("sums", (units, used, segments, SUMS.value), single)
        self.output = self._new("output", (units, segments, used, width), single)
        self.l1, self.l2, self.errors = (self._new(name, (units, used, blocks), single) for name in ("l1", "l2", "errors"))
        self.slips, self.squares = (self._new(name, (units, blocks), single) for name in ("slips", "squares"))
        self.levels = self._new("levels", (3, units, blocks), torch.int32)
        self.exact_norms = self._new("exact_norms", (units, segments - blocks, 2), double)
        self.tops = self._new("tops", (units, used, chunks), double)
        self.mixed = self._new("mixed", (units, chunks, used, width), double)
        self.middle = self._new("middle", (units, used, width), single)
        self.unit_norms = self._new("unit_norms", (2, units), double)
        # What the host asks for in the end, in one piece.
        sizes = (units * used * FACTS.value, units * COUNTS.value, units * used, units * used, TROUBLE // 2)
        self.told = self._new("told", (sum(sizes),), double)
        facts, tallies, norm, bound, trouble = self.told.split(sizes)
        self.facts, self.counts = facts.view(units, used, FACTS.value), tallies.view(units, COUNTS.value)
        self.dense_norm, self.dense_bound = norm.view(units, used), bound.view(units, used)
        self.trouble = trouble.view(torch.int32)
        self.figures = self._new("figures", (FIGURES.value, units, used, blocks), double)
        self.partials = self._new("partials", (units, used, chunks, PARTIALS.value), double)
        self.dense = self._new("dense", (units,), torch.int32)
        self.result = torch.empty(step.shape, dtype=layer.dtype, device=self.device)
        config, form = step.config, found.form
        self.chain = layer.block + 2  # segments are put together in float64
        self.settings = constants(
            (
                float(call.scaling),
                float(call.softcap or 0.0),
                bounds.step_slip(layer.block, form.group, lanes=1),
                *bounds.OUTPUT_ROUNDOFF[layer.dtype],
                float(config.rtol),
                float(config.atol),
            ),
            self.device,
        )
        size = step.bias_size
        self.bias_size = size.reshape(1) if isinstance(size, Tensor) else constants((float(size),), self.device)
        self.block_bias, self.exact_bias = (along_tokens(bias) for bias in (step.block_bias, step.exact_bias))
        sink = step.sink_logit
        self.sink = sink.expand(step.shape[0], -1, -1).contiguous() if sink is not None else None
        item = layer.dtype.itemsize * layer.block
        self.page_bytes = (item * layer.widths[0], item * layer.widths[1])
        self.plane_bytes = tuple(layer.block * ((width + 1) // 2) for width in layer.widths)

    def _new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return scratch(self.device, name, shape, dtype)

    @property
    def _shape(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        channels, width = self.layer.widths
        return {
            "USED": self.used,
            "CHANNELS": channels,
            "WIDE": max(32, power_of_two(channels)),
            "WIDTH": width,
            "WIDE_VALUES": max(16, power_of_two(width)),
        }

    def run(self) -> None:
        """The pass over everything at its base level or in hot slots, its bounds, and promotions where they are needed."""
        self.trouble.zero_()
        self.run_pass()
        self.run_certificate()
        self.run_climb()
        if self.step.config.certified:
            self.run_dense()
        self.layer.working_bytes = scratch.nbytes

    def run_pass(self) -> None:
        """Sums of every segment."""
        step, layer, held, form = self.step, self.layer, self.stored, self.stored.form
        keys, values, hot = held.keys, held.values, layer.hot
        exact_keys, exact_values = step.exact_keys, step.exact_values
        scaling, softcap = float(step.call.scaling), float(step.call.softcap or 0.0)
        bias = bias_arguments(self.block_bias, self.maximum)
        common = {
            "SOFTCAP": step.call.softcap is not None,
            "BIAS": self.block_bias is not None,
            "ROWS": max(16, power_of_two(self.used)),
            "FEW": power_of_two(self.used),
            "TOKENS": layer.block,
            "GROUPS": form.groups,
            **self._shape,
        }
        coded_pass[(self.units, -(-self.blocks // SPAN))](
            self.query, keys["codes"], keys["scale"], keys["offset"],
            values["codes"], values["scale"], values["offset"], values["numbers"], values["lengths"], *bias,
            self.maximum, self.sums, self.output, self.l1, self.l2, self.errors, self.slips, self.squares, self.levels,
            self.blocks, held.key_room, held.value_room, SPAN, self.segments, step.shape[1], self.units, scaling, softcap,
            FOUR=form.four, GROUP=form.group, COLUMNS=form.columns, CHUNKS=form.chunks, DIGIT=form.digit,
            COUNT=values["numbers"].shape[-1],
            **{name: value for name, value in common.items() if name not in ("WIDE_VALUES", "ROWS")}, num_warps=WARPS,
            num_stages=STAGES,
        )  # fmt: skip
        slots = hot.slots if hot.blocks is not None else 0
        hot_parts = (hot.blocks, hot.keys, hot.values) if slots else (self.levels, exact_keys, exact_values)
        float_pass[(self.units, self.segments - self.blocks + slots)](
            self.query, exact_keys, exact_values, self.exact, exact_keys.stride(1), exact_values.stride(1),
            exact_keys.stride(2),
            exact_values.stride(2), *hot_parts, slots, values["scale"], *bias,
            *bias_arguments(self.exact_bias, self.maximum),
            self.maximum, self.sums, self.output, self.errors, self.slips, self.squares, self.levels, self.exact_norms,
            self.blocks, held.value_room, self.segments, step.shape[1], self.units, scaling, softcap,
            HOT=slots > 0, **common, num_warps=4,
        )  # fmt: skip

    def run_certificate(self) -> None:
        """Outputs, norms and parts of the bounds: what is left is adding up the chunks."""
        step, layer, held = self.step, self.layer, self.stored
        keys, values, shape = held.keys, held.values, self._shape
        mix_kernel[(self.units, self.chunks)](
            self.maximum, self.output, self.tops, self.mixed, self.segments, self.chunks,
            USED=self.used, WIDTH=shape["WIDTH"], WIDE_VALUES=shape["WIDE_VALUES"], CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
        counts = {"KEY_COUNT": keys["numbers"].shape[-1], "COUNT": values["numbers"].shape[-1]}
        merge_kernel[(self.units, self.used)](
            self.query, self.maximum, self.sums, self.errors, self.slips, keys["numbers"], values["numbers"], self.levels[0],
            self.levels[1], self.exact_norms, self.tops, self.mixed, self.sink if self.sink is not None else self.maximum,
            self.middle, self.result, self.facts, self.figures, self.unit_norms, self.settings, self.bias_size, self.blocks,
            self.segments,
            self.chunks, held.key_room, held.value_room, layer.sequence_length, self.chain,
            SOFTCAP=step.call.softcap is not None, SUNK=self.sink is not None, **shape, **counts, TILE=TILE, FEW=FEW,
            num_warps=4,
        )  # fmt: skip
        bound_kernel[(self.units, self.chunks)](
            self.maximum, self.sums, self.output, self.l1, self.l2, self.slips, self.squares, keys["numbers"],
            values["numbers"], self.levels[0], self.levels[1], self.middle, self.facts, self.figures, self.partials,
            self.settings, self.blocks, self.segments, self.chunks, held.key_room, held.value_room,
            USED=self.used, CHANNELS=shape["CHANNELS"], WIDTH=shape["WIDTH"], WIDE_VALUES=shape["WIDE_VALUES"], **counts,
            TOKENS=layer.block, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip

    def run_climb(self) -> None:
        """Bounds; promotions of the heads that are above their budgets; which are left to the dense rung."""
        step, layer, held, form = self.step, self.layer, self.stored, self.stored.form
        keys, values, shadow, config = held.keys, held.values, layer.shadow, step.config
        assert shadow is not None
        table, (key_page, value_page) = shadow.table(), self.page_bytes
        page_sums = shadow.device_sums.data
        assert page_sums is not None
        key_plane, value_plane = keys.get("plane"), values.get("plane")
        discount = ladder.DEVICE_DISCOUNT if config.refine == "device" else 1.0
        planes = [size * discount for size in self.plane_bytes]
        prices = constants((planes[0], key_page, planes[1], value_page, config.dense_head_share), self.device)
        climb[(self.units,)](
            self.query, keys["codes"], key_plane if key_plane is not None else keys["codes"], keys["scale"], keys["offset"],
            keys["numbers"], values["codes"], value_plane if value_plane is not None else values["codes"], values["scale"],
            values["offset"], values["numbers"], table.slabs, table.value_offset, page_sums, page_sums.shape[2],
            multipliers(0, layer.block * layer.widths[0], self.device), multipliers(1, layer.block * layer.widths[1],
            self.device),
            self.result, *bias_arguments(self.block_bias, self.maximum), self.sink if self.sink is not None else self.maximum,
            self.maximum, self.sums, self.output, self.l1, self.l2, self.errors, self.slips, self.squares, self.levels[0],
            self.levels[1], self.levels[2], self.exact_norms, self.tops, self.mixed, self.middle, self.result, self.facts,
            self.figures, self.partials, self.unit_norms, self._new("wanted", (self.units, self.used), torch.float64),
            self._new("chosen", (self.units, self.blocks), torch.int32), self.dense, self.counts, self.trouble, self.settings,
            prices, self.bias_size, self.blocks, self.segments, self.chunks, held.key_room, held.value_room,
            key_plane.shape[2] if key_plane is not None else 0, value_plane.shape[2] if value_plane is not None else 0,
            table.rows_per_slab, step.shape[1], layer.sequence_length, self.chain, config.max_rounds,
            float(step.call.scaling), float(step.call.softcap or 0.0),
            CERTIFIED=config.certified, SOFTCAP=step.call.softcap is not None, BIAS=self.block_bias is not None,
            SUNK=self.sink is not None, ROWS=max(16, power_of_two(self.used)), FEW_ROWS=power_of_two(self.used),
            TOKENS=layer.block, FOUR=form.four, GROUPS=form.groups, GROUP=form.group, KEY_COUNT=keys["numbers"].shape[-1],
            COUNT=values["numbers"].shape[-1], KEY_PLANE=key_plane is not None, VALUE_PLANE=value_plane is not None,
            ITEM=layer.dtype.itemsize, CHUNK=CHUNK, TILE=TILE, FEW=FEW, **self._shape, num_warps=4,
        )  # fmt: skip

    def run_dense(self) -> None:
        """Heads that are left to the dense rung, exactly, from their originals; the others are left as they are."""
        step, layer, shadow, call = self.step, self.layer, self.layer.shadow, self.step.call
        assert shadow is not None and shadow.device_sums.data is not None
        table = shadow.table()
        pages = triton_dense.HostPages(
            table.slabs,
            table.rows_per_slab,
            table.value_offset,
            self.blocks,
            layer.block,
            shadow.device_sums.data.view(self.units, -1, 2),
            *(multipliers(kind, layer.block * layer.widths[kind], self.device) for kind in (0, 1)),
        )
        triton_dense.launch(
            self.dense,
            self.query,
            pages,
            step.exact_keys,
            step.exact_values,
            float(call.scaling),
            call.softcap,
            self.block_bias,
            self.exact_bias,
            self.sink,
            self.unit_norms[0],
            self.unit_norms[1],
            self.bias_size,
            self.trouble,
            self.result.view(self.units, self.used, -1),
            self.dense_norm,
            self.dense_bound,
            partial(scratch, self.device),
            processors(self.device),
        )

    def row_figure(self, which: Any) -> Tensor:
        """A fact of the rows, by its place in triton_certify.py: float64 `[B, H, R]`, a view of scratch."""
        return self.facts[..., which.value].view(self.step.shape[:3])

    def block_figure(self, which: int) -> Tensor:
        """Mass, shift, key part (over the least normaliser not yet), value part or mean step: float64 `[B, H, R, N]`."""
        return self.figures[which].view(*self.step.shape[:3], self.blocks)


def along_tokens(bias: Tensor | None) -> Tensor | None:
    """A bias whose tokens lie one behind the other."""
    if bias is None:
        return None
    inner = bias.stride()[3:] == ((bias.shape[-1], 1) if bias.dim() == 5 else (1,))
    return bias if inner else bias.contiguous()


def bias_arguments(bias: Tensor | None, other: Tensor) -> tuple[Any, ...]:
    """A bias, and numbers from one batch row, KV head and query row to the next: 0 where they share."""
    if bias is None:
        return other, 0, 0, 0
    steps = [step if size > 1 else 0 for size, step in zip(bias.shape[:3], bias.stride()[:3], strict=True)]
    return bias, *steps
