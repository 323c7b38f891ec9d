"""The pass over a layer's blocks, each at some level, and its certificate: by the CPU kernel where it can."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from . import bounds, stages
from .attention import AttentionCall
from .codecs import EPSILON, ETA, KAPPA, KEY_SPECTRAL, PER_LEVEL, VALUE_RMS, VALUE_SPECTRAL, token_steps
from .inputs import StepInputs
from .kernels import cpu
from .kernels import reference as kernel
from .layers import CertifiedLayer
from .store import Index


class CertifiedPass(StepInputs):
    """What a step has computed so far, with every block at some level, and what is certified of that."""

    def __init__(self, layer: CertifiedLayer, call: AttentionCall) -> None:
        super().__init__(layer, call)
        self.certificate: bounds.Certificate | None = None
        self.fused: cpu.FusedStep | None = None
        self.kernel = "reference"  # what reads the codes: that, "cpu" or "none"
        self.settled = False  # every row was seen within its budget, and none is dense
        self.at_once = False  # the CPU kernel saw that, and nothing else is asked for

    @cached_property
    def base_level(self) -> Tensor:
        """Level 0 of every block, int64 `[B, H, N]`: replaced, never written to."""
        return torch.zeros(*self.shape[:2], self.blocks, dtype=torch.int64, device=self.layer.device)

    @cached_property
    def key_level(self) -> Tensor:
        """Levels of the blocks' keys."""
        return self.base_level

    @cached_property
    def value_level(self) -> Tensor:
        """Levels of the blocks' values."""
        return self.base_level

    @cached_property
    def hot_level(self) -> Tensor:
        """Levels that the blocks began with: 2 where originals are in the hot slots."""
        return self.base_level

    @cached_property
    def output(self) -> Tensor:
        """What is returned, `[B, H, R, W]` in the layer's type: at first what the CPU kernel has made."""
        return self._of_the_kernel().result

    @cached_property
    def bound(self) -> Tensor:
        """The bounds of the rows: float64 `[B, H, R]`, as are the others."""
        return self._of_the_kernel().row_figure(0)

    @cached_property
    def candidate(self) -> Tensor:
        """The bounds of the fast path."""
        return self.bound

    @cached_property
    def norm(self) -> Tensor:
        """The L2 norms of what is returned."""
        return self._of_the_kernel().row_figure(1)

    @cached_property
    def expected(self) -> Tensor:
        """The errors to expect."""
        return self._of_the_kernel().row_figure(2)

    def _of_the_kernel(self) -> cpu.FusedStep:
        assert self.fused is not None, "nothing was computed yet"
        return self.fused

    def without_pass(self) -> None:
        """Nothing is computed from codes: everything is to be dense."""
        self.kernel = "none"
        self.candidate = self.bound = self.expected = torch.full_like(self.query_norm, math.nan)
        self.output = self.call.query.new_zeros(self.shape)

    def first_pass(self) -> None:
        """Everything at its base level, hot blocks at the originals; the fast path's certificate."""
        layer = self.layer
        self.fuse()
        if self.at_once:
            return
        hot = layer.hot.lookup(self.blocks)
        if self.fused is not None:
            self.candidate = self.bound
            if hot is None:
                return
        else:
            self.segments = kernel.decode_pass(
                self.scaled,
                *self.encoded,
                self.exact_keys,
                self.exact_values,
                self.block_bias,
                self.exact_bias,
                layer.key_codec,
                layer.value_codec,
                self.call.softcap,
            )
        if hot is not None:
            index, keys, values = hot
            self.hot_level = self.hot_level.clone()
            self.hot_level[index] = 2
            self.key_level = self.value_level = self.hot_level
            self.redo(index, keys.float(), values.float())
        self.certify()
        self.candidate = self.bound

    def fuse(self) -> None:
        """Have the CPU kernel do the first pass, where it can, if that was not done yet."""
        if self.fused is not None or not cpu.supports(self):
            return
        self.fused = fused = cpu.FusedStep(self)
        self.kernel = "cpu"
        fused.run()
        if stages.asked():
            fused.tell_stages()
        config = self.config
        plain = config.certified and config.scope == "head" and config.policy != "paper" and not config.audit
        if plain and self.layer.hot.slots == 0 and fused.all_met():
            self.at_once = self.settled = True
            return
        self._take(fused)

    def _take(self, fused: cpu.FusedStep) -> None:
        """What the CPU kernel has computed; the parts of the certificate when somebody asks (`details`)."""
        self.output = fused.result
        self.bound, self.norm, self.expected = (fused.row_figure(which) for which in range(3))

    def details(self) -> None:
        """Have what promotions are chosen by: segments, the certificate's parts, masses, steps."""
        if self.fused is None or self.certificate is not None:
            return
        self.segments = self.fused.segments()
        self.certificate = self.fused.certificate()
        self.mass, self.shift, self.step = (self.fused.block_figure(which) for which in (0, 1, 4))

    @cached_property
    def query_weights(self) -> tuple[Tensor, Tensor]:
        """sum |q_c| S_c and ||q * S||_2: float64 `[B, H, R, N]`."""
        return kernel.score_weights(self.query, self.encoded[0].scale)

    @cached_property
    def shift0(self) -> tuple[Tensor, Tensor]:
        """Delta_b and Lambda_b at the base level: `[B, H, R, N]`."""
        return self._shift(0)

    @cached_property
    def shift1(self) -> tuple[Tensor, Tensor] | None:
        """Delta_b and Lambda_b with the refinement plane, where there is one."""
        return self._shift(1) if self.layer.key_codec.levels > 1 else None

    @cached_property
    def refined_share(self) -> Tensor | None:
        """About how much of Delta_b remains with the refinement plane, where there is one: to choose by."""
        if self.layer.key_codec.levels == 1:
            return None
        if self.fused is None:
            assert self.shift1 is not None
            left, whole = self.shift1[0], self.shift0[0]
        else:
            l1, l2 = self.fused.query_weights()
            numbers = self.key_numbers.unsqueeze(2)
            whole = torch.minimum(numbers[..., KAPPA] * l1, numbers[..., EPSILON] * l2)
            left = torch.minimum(numbers[..., PER_LEVEL + KAPPA] * l1, numbers[..., PER_LEVEL + EPSILON] * l2)
        return left / whole.clamp_min(bounds.MASS_FLOOR)

    def _shift(self, level: int) -> tuple[Tensor, Tensor]:
        """Delta_b and Lambda_b of every row and block at a level."""
        at = self.key_numbers[..., level * PER_LEVEL : (level + 1) * PER_LEVEL].unsqueeze(2)
        scaling, (query_l1, query_l2) = self.call.scaling, self.query_weights
        shift = bounds.score_shift(scaling, at[..., KAPPA], query_l1, at[..., EPSILON], query_l2)
        return shift, bounds.score_shift_l2(scaling, at[..., KEY_SPECTRAL], query_l2)

    def _value_number(self, column: int) -> Tensor:
        """A value number `[B, H, 1, N]` at each block's present level; 0 at the originals."""
        base = self.value_numbers[..., column]
        level = self.value_level
        if self.layer.value_codec.levels > 1:
            base = torch.where(level == 1, self.value_numbers[..., PER_LEVEL + column], base)
        return torch.where(level == 2, torch.zeros_like(base), base).unsqueeze(2)

    def certify(self) -> None:
        """Combine the segments; evaluate the bound of what would be returned now."""
        if self.fused is not None:
            self.certificate = None
            self.fused.certify(self.key_level, self.value_level)
            self._take(self.fused)
            self.details()
            return
        combined = kernel.combine(self.segments, self.sink_logit)
        self.output = combined.output.to(self.call.query.dtype)
        norm = torch.linalg.vector_norm(self.output.double(), dim=-1)
        level = self.key_level.unsqueeze(2)
        shift, shift_l2 = self.shift0
        if self.shift1 is not None:
            shift = torch.where(level == 1, self.shift1[0], shift)
            shift_l2 = torch.where(level == 1, self.shift1[1], shift_l2)
        self.mass, self.step = combined.mass[..., :-1], combined.step[..., :-1]
        root, root_step = combined.root_square_mass[..., :-1], combined.root_square_step[..., :-1]
        self.certificate = bounds.total(
            combined.attended[..., :-1],
            self.mass,
            root,
            combined.mass[..., -1] + combined.sink_mass,
            shift,
            shift_l2,
            level < 2,
            self._value_number(ETA),
            self._value_number(VALUE_SPECTRAL),
            self.step,
            root_step,
            combined.moment[..., :-1],
            combined.square_moment[..., :-1],
            self.value_numbers[..., -1].unsqueeze(2),
            self.value_radius,
            norm,
            self.slack,
            self.rounding,
            bounds.output_rounding(norm, self.shape[3], self.output.dtype),
            self.chain,
            self.layer.block + self.shape[3],
        )
        self.shift = torch.where(level < 2, shift, torch.zeros_like(shift))
        self.norm, self.bound = norm, self.certificate.total
        self.expected = (root * root_step * self._value_number(VALUE_RMS)).square().sum(dim=-1).sqrt()

    def redo(self, index: Index, keys: Tensor, values: Tensor) -> None:
        """Put blocks into the sums anew. Args: keys, values: float32 `[n, block, channels]`."""
        self.details()
        if self.fused is not None:
            self.fused.redo(index, keys.contiguous(), values.contiguous())
            return
        steps = token_steps(self.encoded[1].scale[index])
        kernel.redo_blocks(self.segments, index, self.scaled, keys, values, steps, self.block_bias, self.call.softcap)
