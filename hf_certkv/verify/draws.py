"""Cases that metamorphic relations start from: small, of any format, with numbers that stay exact under the change."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import kernel
from .cases import Case, mask_of, tensors
from .generate import Pick
from .kernel import both

GRID = 64.0  # keys and values that a constant is added to are multiples of 1/64, so that the sum is exact in every dtype


@dataclass(frozen=True)
class Draw:
    """Where a relation takes its cases from."""

    pick: Pick
    device: torch.device

    def case(self, fast: bool = True, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)) -> Case:
        """Whole blocks and a few exact tokens after them. Args: fast: with a tolerance that the fast path meets."""
        pick, dtype = self.pick, self.pick(dtypes)
        block, batch, groups, new = pick((16, 16, 32)), pick((1, 2, 3)), pick((1, 2, 4)), pick((1, 3))
        tokens = pick(range(2, 5)) * block + max(new, pick(range(1, block + 1)))
        regime = pick(("normal", "drifting", "wild values"))
        channels, width = pick(both((8, 16, 19), (16, 32))), pick(both((8, 16, 19), (32, 64)))
        q, k, v = tensors(regime, dtype, tokens, channels, width, batch, new, pick(range(2**30)), 2, groups)
        settings = {
            "block_size": block,
            "value_bits": pick((4, 8)),
            "value_group": pick(both((None, 0, 4), (None, 0, 16))),
            "refine": pick(("device", "host", "off")),
            "rtol": 0.0 if fast else pick((0.02, 0.1, 0.3)),
            "atol": 1e6 if fast else 0.0,
        }
        case = Case(q, k, v, settings=settings)
        return kernel.shaped(case) if kernel.chosen() == "triton" else case

    def on_grid(self, x: Tensor) -> Tensor:
        """Multiples of 1/64 within [-1, 1]: eight bits."""
        return ((x.float() * 16).round() / GRID).clamp(-1, 1).to(x.dtype)

    def constant(self, width: int, dtype: torch.dtype) -> Tensor:
        """A vector that `on_grid` numbers can be added to without rounding; in float32 larger than float16 offsets resolve."""
        sizes = {torch.bfloat16: (0.0, 0.25, -0.5, 0.5), torch.float16: (0.0, 1.0, -3.0, 6.0)}
        some = self.pick(
            (sizes.get(dtype, (0.0, 7.0, -301.5, 900.25)), sizes[torch.float16 if dtype != torch.bfloat16 else dtype])
        )
        return torch.tensor([self.pick(some) for _ in range(width)]).to(dtype)

    def order(self, count: int) -> Tensor:
        """A permutation that is not the identity, where there is one."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.pick(range(2**30))))
        return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def masked(draw: Draw, case: Case) -> Case:
    """The case, in most draws with a mask."""
    query, kind = case.query, draw.pick(("none", "bool", "heads", "alibi", "padding"))
    shape = (query.shape[0], query.shape[2], case.keys.shape[2])
    return replace(case, mask=mask_of(kind, query.dtype, *shape, draw.pick(range(2**20)), query.shape[1]))


def moderate(x: Tensor) -> Tensor:
    """The same without numbers near 0, so that powers of two of it are exact."""
    return torch.where(x.abs() < 2.0**-6, torch.full_like(x, 2.0**-6), x)
