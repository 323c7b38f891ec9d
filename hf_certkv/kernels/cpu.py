"""The decode kernel for CPUs (extra `cpu`): pass and certificate of a step in one call, threads divided over the KV heads.

Same sums and same bounds as `reference` and `bounds.total`, to which it is tested. One term is weaker: the mean of squared
distances by squared weights is bounded by that by weights (`bounds.mean_radius`, `spread`), which saves a second product.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import bounds
from ..bounds import Certificate
from . import threads
from .reference import Segments

if TYPE_CHECKING:
    from ..decode import DecodeStep
    from ..store import Index

LANES = 16
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_scratch = threading.local()


def supports(step: DecodeStep) -> bool:
    """Whether numba is installed and the kernel has code for the layer's format: sizes that fill vectors of sixteen."""
    layer = step.layer
    channels, width = layer.widths
    codec = layer.value_codec
    size = codec.group_size(width)
    fits = channels % LANES == 0 and width % (LANES if codec.bits == 8 else 2 * LANES) == 0
    grouped = size == width or size % LANES == 0
    wanted = step.config.kernel != "reference"
    return wanted and layer.device.type == "cpu" and fits and grouped and installed()


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether numba can be imported."""
    return find_spec("numba") is not None


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that this thread's last call may have used too: it grows, and is not cleared."""
    held: dict[str, np.ndarray] = _scratch.__dict__
    count = int(np.prod(shape))
    array = held.get(name)
    if array is None or len(array) < count:
        held[name] = array = np.empty(count + count // 8, dtype)
    return array[:count]


def scratch_bytes() -> int:
    """Bytes that this thread's calls hold between steps, for all layers and caches together."""
    return sum(array.nbytes for array in _scratch.__dict__.values())


def pointer(part: Tensor | np.ndarray) -> int:
    """Where an array begins."""
    return part.data_ptr() if isinstance(part, Tensor) else int(part.ctypes.data)


class FusedStep:
    """A step on the CPU: its arrays, and what the certificate says of them. Shapes as in `DecodeStep`.

    Attributes: result: the output in the layer's type `[B, H, R, W]`.
    """

    def __init__(self, step: DecodeStep) -> None:
        from .cpu_certify import Claim
        from .cpu_pass import Task
        from .micro import ROWS

        layer, config, call = step.layer, step.config, step.call
        batch, heads, used, width = step.shape
        channels, units, blocks = layer.widths[0], batch * heads, step.blocks
        rows = 1 if used == 1 else -(-used // ROWS) * ROWS
        self.shape, self.units, self.rows, self.used, self.blocks = step.shape, units, rows, used, blocks
        keys, values = ({name: part.data for name, part in parts.items()} for parts in (layer.store.keys, layer.store.values))
        exact = step.exact_keys, step.exact_values
        query = call.query.detach().reshape(batch, heads, used, channels).contiguous()
        sink = step.sink_logit.expand(batch, -1, -1).contiguous() if step.sink_logit is not None else None
        block_bias, exact_bias = (_along_tokens(bias) for bias in (step.block_bias, step.exact_bias))
        self.result = torch.empty(step.shape, dtype=layer.dtype, device=layer.device)  # whatever the default device is
        self.row_figures = np.empty((7, units * used))
        # Kept alive while their addresses are in use.
        self.inputs = (keys, values, exact, query, sink, block_bias, exact_bias)
        segment, codec = (units, rows, blocks + 1), layer.value_codec
        groups = values["scale"].shape[-1]
        self.maximum, self.sums = scratch("maximum", segment, np.float32), scratch("sums", (*segment, 8), np.float32)
        self.output = scratch("output", (units, blocks + 1, rows, width), np.float32)
        self.block_figures = scratch("figures", (5, units * used, blocks), np.float64)
        parts = [scratch(name, (units, rows, channels), np.float32) for name in ("scaled", "sizes", "raw")]
        self.query = pointer(query)
        self.task = Task(
            pointer(parts[0]),
            pointer(parts[1]),
            *(pointer(keys[name]) for name in ("codes", "scale", "offset")),
            *(pointer(values[name]) for name in ("codes", "scale", "offset")),
            pointer(exact[0]),
            pointer(exact[1]),
            pointer(block_bias) if block_bias is not None else 0,
            pointer(exact_bias) if exact_bias is not None else 0,
            _strides(block_bias),
            _strides(exact_bias),
            pointer(self.maximum),
            pointer(self.sums),
            pointer(scratch("squares", (units, blocks), np.float32)),
            pointer(self.output),
            *(pointer(scratch(name, (units, rows, blocks), np.float32)) for name in ("l1", "l2")),
            rows,
            used,
            heads,
            channels,
            width,
            layer.block,
            blocks,
            keys["codes"].shape[2],
            exact[0].shape[2],
            exact[0].stride(1) // channels,
            DTYPES[layer.dtype],
            codec.bits,
            groups,
            -(-codec.group_size(width) // LANES),
            float(call.softcap or 0.0),
            1 + (groups + 8) * 2.0**-23,
        )
        self.claim = Claim(
            pointer(parts[2]),
            pointer(scratch("top", (units, rows), np.float32)),
            pointer(keys["numbers"]),
            pointer(values["numbers"]),
            keys["numbers"].shape[-1],
            values["numbers"].shape[-1],
            0,
            0,
            *(pointer(scratch(name, (units,), np.float64)) for name in ("key_norm", "value_norm")),
            pointer(sink) if sink is not None else 0,
            units,
            layer.sequence_length,
            step.chain,
            pointer(self.result),
            pointer(self.row_figures),
            pointer(self.block_figures),
            float(call.scaling),
            float(step.bias_size),
            float(config.rtol),
            float(config.atol),
            *bounds.OUTPUT_ROUNDOFF[layer.dtype],
        )

    def run(self) -> None:
        """The pass over everything at its base level, and its certificate."""
        from . import cpu_step

        task, claim, query = self.task, self.claim, self.query
        threads.run(lambda start, stop: cpu_step.units(task, claim, query, start, stop), self.units)

    def certify(self, key_level: Tensor, value_level: Tensor) -> None:
        """The certificate again, after blocks were raised to these levels: int64 `[B, H, N]`."""
        from . import cpu_step

        levels = key_level.contiguous(), value_level.contiguous()
        self.row_figures = np.empty_like(self.row_figures)  # those of before may be in use
        given = {"key_level": pointer(levels[0]), "value_level": pointer(levels[1]), "row_figures": pointer(self.row_figures)}
        task, claim = self.task, self.claim._replace(**given)
        threads.run(lambda start, stop: cpu_step.certify_again(task, claim, start, stop), self.units)

    def segments(self) -> Segments:
        """Views of the pass's sums, without those by squared weights; `redo_blocks` may replace a block's."""
        batch, heads, used, width = self.shape
        shape = (batch, heads, self.rows, self.blocks + 1)
        maximum = torch.from_numpy(self.maximum).view(shape)[:, :, :used]
        sums = torch.from_numpy(self.sums).view(*shape, 8)[:, :, :used]
        output = torch.from_numpy(self.output).view(batch, heads, self.blocks + 1, self.rows, width)[:, :, :, :used]
        return Segments(maximum, sums[..., 4], sums[..., 5], output, None, sums[..., :4])

    def redone(self, index: Index) -> None:
        """Blocks of `segments` were replaced: their sums of higher powers of the weights are no longer known."""
        rows, heads, blocks = index
        shape = (*self.shape[:2], self.rows, self.blocks + 1, 8)
        torch.from_numpy(self.sums).view(shape)[rows, heads, :, blocks, 6:] = torch.nan

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
