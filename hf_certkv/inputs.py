"""What one certified call is computed from: the query, the layer's codes and exact tokens, the mask, the rounding terms.

Nothing here changes during a step. What the reference kernel and the rarer rungs need is computed when it is first asked for:
the fused CPU kernel computes its own on the way.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from . import bounds
from .attention import AttentionCall, is_packed
from .codecs import EncodedBlocks
from .handle import KEYS, VALUES
from .kernels import reference
from .layers import CertifiedLayer
from .masks import row_bias, split_bias


class StepInputs:
    """One call on one layer. Shapes: B batch, H KV heads, R rows, N blocks, W value channels.

    Rows: the query heads of a KV head and their positions, `row = head_in_group * positions + position`.
    """

    def __init__(self, layer: CertifiedLayer, call: AttentionCall) -> None:
        self.layer, self.call, self.config = layer, call, layer.config
        query = call.query
        self.packed = is_packed(layer, call)
        self.groups = query.shape[1] // layer.heads
        self.rows = self.groups * query.shape[2]
        self.shape = (layer.batch, layer.heads, self.rows, layer.widths[1])
        self.blocks = layer.store.blocks
        self.exact_keys, self.exact_values = layer.exact_tokens(KEYS), layer.exact_tokens(VALUES)
        self.chain = reference.chain_length(layer.block, self.exact_keys.shape[2], self.blocks + 1)
        self.block_bias: Tensor | None = None
        self.exact_bias: Tensor | None = None
        self.bias_size: Tensor | float = 0.0
        if call.mask is not None:
            span = 2 * abs(call.scaling) * (self.query_norm * self.key_norm).amax()
            bias, self.bias_size = row_bias(call.mask, layer.batch, layer.heads, self.groups, query.shape[2], span)
            self.block_bias, self.exact_bias = split_bias(bias, layer.sink_tokens, self.blocks, layer.block)
        self.sink_logit: Tensor | None = None
        if call.sinks is not None:
            positions = 1 if self.packed else query.shape[2]
            logits = call.sinks.detach().float().reshape(layer.heads, -1, 1).expand(-1, -1, positions)
            self.sink_logit = logits.reshape(1, layer.heads, self.rows)

    @cached_property
    def query(self) -> Tensor:
        """float32 `[B, H, R, channels]`."""
        return self.call.query.detach().reshape(*self.shape[:3], -1).float()

    @cached_property
    def scaled(self) -> Tensor:
        """The query times the softmax scale."""
        return self.query * self.call.scaling

    @cached_property
    def encoded(self) -> tuple[EncodedBlocks, EncodedBlocks]:
        """All blocks, keys and values."""
        return self.layer.store.encoded()

    @cached_property
    def key_numbers(self) -> Tensor:
        """float64 `[B, H, N, numbers]`."""
        return self.encoded[0].numbers.double()

    @cached_property
    def value_numbers(self) -> Tensor:
        """float64 `[B, H, N, numbers]`."""
        return self.encoded[1].numbers.double()

    @cached_property
    def query_norm(self) -> Tensor:
        """float64 `[B, H, R]`."""
        return torch.linalg.vector_norm(self.query.double(), dim=-1)

    @cached_property
    def key_norm(self) -> Tensor:
        """The largest norm of a key, original or as read: float64 `[B, H, 1]`."""
        return _largest(self.key_numbers[..., -1], self.exact_keys).unsqueeze(-1)

    @cached_property
    def value_radius(self) -> Tensor:
        """The largest norm of a value, original or as read: float64 `[B, H, 1]`."""
        return _largest(self.value_numbers[..., -1], self.exact_values).unsqueeze(-1)

    @cached_property
    def slack(self) -> Tensor:
        """lambda: float64 `[B, H, R]`."""
        call, width = self.call, self.layer.widths[0]
        error = bounds.score_rounding(call.scaling, self.query_norm, self.key_norm, width, self.bias_size, call.softcap)
        return bounds.weight_slack(error, reference.RESCALINGS)

    @cached_property
    def rounding(self) -> Tensor:
        """E_fp: float64 `[B, H, R]`."""
        tokens, width = self.layer.sequence_length, self.shape[3]
        return bounds.rounding_error(self.slack, self.value_radius, self.chain, reference.RESCALINGS, tokens, width)

    def by_position(self, rows: Tensor) -> Tensor:
        """`[B, H, R]` -> `[B, positions, query heads]`."""
        positions = 1 if self.packed else self.call.query.shape[2]
        return rows.unflatten(-1, (-1, positions)).permute(0, 3, 1, 2).flatten(2)

    def by_row(self, heads: Tensor) -> Tensor:
        """Inverse of `by_position`."""
        return heads.unflatten(-1, (self.shape[1], -1)).permute(0, 2, 3, 1).flatten(2)


def _largest(stored: Tensor, exact: Tensor) -> Tensor:
    """The largest L2 norm among stored radii `[B, H, N]` and exact tokens `[B, H, tokens, channels]`: `[B, H]`."""
    norms = torch.linalg.vector_norm(exact.double(), dim=-1).amax(dim=-1) * bounds.OUTWARD
    return torch.maximum(stored.amax(dim=-1), norms)
