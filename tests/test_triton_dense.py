"""The dense rung's kernels, where tests of kernels run: against float64 attention, and their bound against `bounds.py`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from where import DEVICE

from hf_certkv import bounds
from hf_certkv.audit import FLOAT64_ERROR, exact_output
from hf_certkv.kernels import triton_dense

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MARK = -12345.0  # in what is not to be written


@dataclass
class Case:
    """A layer and a call, all sizes, and what the kernels left."""

    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    rows: int = 3
    widths: tuple[int, int] = (80, 96)
    blocks: int = 4
    block: int = 16
    exact: int = 23
    processors: int = 3
    scaling: float = 0.25
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None  # [batch | 1, heads | 1, rows | 1, tokens], tokens of blocks before exact ones
    dense: list[int] | None = None
    size: float = 1.0
    seed: int = 0
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    query: Tensor = field(init=False)

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.heads, self.tokens)
        self.keys, self.values = (torch.randn(*shape, width, generator=made).to(self.dtype) for width in self.widths)
        self.query = (self.size * torch.randn(*shape[:2], self.rows, self.widths[0], generator=made)).to(self.dtype)

    @property
    def tokens(self) -> int:
        return self.blocks * self.block + self.exact

    @property
    def units(self) -> int:
        return self.batch * self.heads

    def pages(self, rows: int = 2) -> tuple[triton_dense.HostPages, list[Tensor]]:
        """Blocks in slabs of `rows` block rows, keys first and some bytes between them and values, and the slabs."""
        made = torch.Generator().manual_seed(self.seed + 1)
        bits = torch.int32 if self.dtype == torch.float32 else torch.int16
        mask = 2 ** (8 * self.dtype.itemsize) - 1
        split = self.blocks * self.block
        sources, sums, multipliers = [], [], []
        for part, width in zip((self.keys, self.values), self.widths, strict=True):
            paged = part[:, :, :split].unflatten(2, (self.blocks, self.block)).movedim(2, 0).flatten(1, 2).contiguous()
            factor = torch.randint(-(2**62), 2**62, (self.block * width,), generator=made) * 2 + 1
            words = paged.view(bits).flatten(2).long() & mask
            found = [sum(w * m for w, m in zip(page, factor.tolist(), strict=True)) for page in words.flatten(0, 1).tolist()]
            found = [(x + 2**63) % 2**64 - 2**63 for x in found]
            sums.append(torch.tensor(found, dtype=torch.int64).view(self.blocks, self.units).mT)
            sources.append(paged)
            multipliers.append(factor)
        page_bytes = [self.block * width * self.dtype.itemsize for width in self.widths]
        offset = rows * self.units * page_bytes[0] + 64
        slabs = []
        for first in range(0, self.blocks, rows):
            slab = torch.zeros(offset + rows * self.units * page_bytes[1], dtype=torch.uint8, pin_memory=DEVICE != "cpu")
            for source, start in zip(sources, (0, offset), strict=True):
                taken = source[first : first + rows].contiguous().view(torch.uint8).flatten()
                slab[start : start + len(taken)] = taken
            slabs.append(slab)
        table = torch.tensor([slab.data_ptr() for slab in slabs] or [0], dtype=torch.int64, device=DEVICE)
        room = torch.zeros(self.units, self.blocks + 3, 2, dtype=torch.int64)  # a view of more than is used
        room[:, : self.blocks] = torch.stack(sums, dim=-1)
        there = (part.to(DEVICE) for part in (room, *multipliers))
        return triton_dense.HostPages(table, rows, offset, self.blocks, self.block, *there), slabs


@dataclass
class Made:
    """What a launch leaves, `[units, rows, ...]`, and the trouble it had."""

    result: Tensor
    norm: Tensor
    bound: Tensor
    trouble: list[int]
    plan: triton_dense.Plan


def norms(case: Case) -> tuple[Tensor, Tensor]:
    """The largest norms of keys and values, float64 `[units]`."""
    found = [torch.linalg.vector_norm(part.double(), dim=-1).amax(dim=-1).flatten() for part in (case.keys, case.values)]
    return found[0] * bounds.OUTWARD, found[1] * bounds.OUTWARD


def bias_size(case: Case) -> Tensor:
    if case.bias is None:
        return torch.zeros((), dtype=torch.float64)
    return torch.where(case.bias == -torch.inf, 0.0, case.bias).abs().amax().double()


def call(case: Case, pages: triton_dense.HostPages, trouble: Tensor) -> Made:
    """Run the kernels on tensors of the device; what they leave comes back to the host."""
    split = case.blocks * case.block
    parts = []
    for part in (case.keys, case.values):  # views of buffers that have room for more
        roomy = torch.full((case.batch, case.heads, case.exact + 5, part.shape[-1]), torch.nan, dtype=case.dtype)
        roomy[:, :, 2 : 2 + case.exact] = part[:, :, split:]
        parts.append(roomy.to(DEVICE)[:, :, 2 : 2 + case.exact])
    block_bias = exact_bias = None
    if case.bias is not None:
        bias = case.bias.to(DEVICE)
        block_bias, exact_bias = bias[..., :split].unflatten(-1, (case.blocks, case.block)), bias[..., split:]
    shape = (case.units, case.rows)
    result = torch.full((*shape, case.widths[1]), MARK, dtype=case.dtype, device=DEVICE)
    norm, bound = (torch.full(shape, MARK, dtype=torch.float64, device=DEVICE) for _ in range(2))
    trouble = trouble.to(DEVICE)
    sinks = None if case.sinks is None else case.sinks.to(DEVICE)

    def scratch(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(size, torch.nan, dtype=dtype, device=DEVICE)

    dense = torch.tensor(case.dense or [1] * case.units, dtype=torch.int32, device=DEVICE)
    query = case.query.flatten(0, 1).contiguous().to(DEVICE)
    known = [part.to(DEVICE) for part in (*norms(case), bias_size(case))]
    plan = triton_dense.launch(
        dense, query, pages, parts[0], parts[1], case.scaling, case.softcap, block_bias, exact_bias, sinks, *known,
        trouble, result, norm, bound, scratch, case.processors,
    )  # fmt: skip
    return Made(result.cpu(), norm.cpu(), bound.cpu(), trouble.tolist(), plan)


def launch(case: Case, damage: Any = None) -> Made:
    """Run the kernels. Args: damage: what is done to the slabs, after checksums were taken."""
    pages, slabs = case.pages()
    if damage is not None:
        damage(slabs, pages)
    made = call(case, pages, torch.zeros(3, dtype=torch.int32))
    assert all([slab.data_ptr() == at for slab, at in zip(slabs, pages.slabs.tolist(), strict=False)])
    return made


def twin(case: Case, made: Made) -> Tensor:
    """The bound by `bounds.py`: float64 `[units, rows]`."""
    keys, values = (part.unsqueeze(-1) for part in norms(case))
    query = torch.linalg.vector_norm(case.query.double(), dim=-1).flatten(0, 1)
    rescalings, chain = made.plan.rescalings, made.plan.chain
    error = bounds.score_rounding(case.scaling, query, keys, case.widths[0], bias_size(case), case.softcap)
    slack = bounds.weight_slack(error, rescalings)
    rounding = bounds.rounding_error(slack, values, chain, rescalings, case.tokens, case.widths[1])
    norm = torch.linalg.vector_norm(made.result.double(), dim=-1)
    bound = rounding + bounds.output_rounding(norm, case.widths[1], case.dtype)
    return torch.where(abs(case.scaling) * query * keys < bounds.OVERFLOW, bound, torch.full_like(bound, torch.inf))


def exact(case: Case) -> Tensor:
    """float64 attention `[units, rows, width]`; 0 where a row may attend to nothing."""
    query = case.query.double()
    found = exact_output(query, case.keys, case.values, case.bias, case.scaling, case.softcap, case.sinks)
    if case.bias is not None and case.sinks is None:
        nothing = (case.bias == -torch.inf).all(dim=-1, keepdim=True).expand(*query.shape[:3], 1)
        found = torch.where(nothing, 0.0, found)
    return found.flatten(0, 1)


def granted(case: Case) -> Tensor:
    """What float64 itself may be off by, as the audit grants it."""
    keys, values = (part.unsqueeze(-1) for part in norms(case))
    query = torch.linalg.vector_norm(case.query.double(), dim=-1).flatten(0, 1)
    own = FLOAT64_ERROR * (case.tokens + case.widths[0] + 200) * 3
    return own * (1 + abs(case.scaling) * query * keys) * values


def check(case: Case, made: Made | None = None) -> Made:
    """Bound equal to its twin and at least the true error, norm right, units that are not flagged untouched."""
    made = made or launch(case)
    flagged = torch.tensor(case.dense or [1] * case.units).bool()
    for part in (made.result, made.norm, made.bound):
        assert torch.equal(part[~flagged], torch.full_like(part[~flagged], MARK))
    assert made.trouble == [0, 0, 0]
    norm = torch.linalg.vector_norm(made.result.double(), dim=-1)
    torch.testing.assert_close(made.norm[flagged], norm[flagged], rtol=1e-12, atol=0)
    torch.testing.assert_close(made.bound[flagged], twin(case, made)[flagged], rtol=1e-9, atol=0)
    error = torch.linalg.vector_norm(made.result.double() - exact(case), dim=-1)
    assert bool(((error - granted(case)) <= made.bound)[flagged].all())
    # Not for want of ambition: what section 5 says of numbers like these.
    assert bool((made.bound <= 0.05 * norms(case)[1].unsqueeze(-1) * (1 + case.size))[flagged].all())
    return made


@pytest.mark.parametrize(("kind", "place"), list(product(range(3), range(5))))
def test_outputs_and_bounds(kind: int, place: int) -> None:
    """All types with all numbers of rows, and with all sizes of blocks."""
    rows, block = (1, 3, 4, 8, 20)[place], (16, 64, 128)[(kind + place) % 3]
    widths = [(80, 96), (96, 80), (128, 64), (16, 48), (72, 72)][(kind + 2 * place) % 5]
    heads = 1 if rows == 20 else 2
    check(Case(DTYPES[kind], 1, heads, rows, widths, rows % 3 + 1, block, 5 * rows + 1, processors=1 + rows % 4, seed=rows))


@pytest.mark.parametrize("processors", [1, 3, 5, 100])
def test_any_number_of_programs(processors: int) -> None:
    case = Case(DTYPES[processors % 3], heads=1, rows=2, blocks=17, exact=40, processors=processors, size=8.0)
    made = check(case)
    assert made.plan.programs <= processors


@pytest.mark.parametrize("exact_tokens", [1, 15, 16, 17])
def test_one_block_and_ragged_ends(exact_tokens: int) -> None:
    check(Case(rows=1, blocks=1, exact=exact_tokens, processors=8))


def test_blocks_without_exact_tokens_and_exact_tokens_without_blocks() -> None:
    check(Case(blocks=3, exact=0))
    check(Case(blocks=0, exact=29))


@pytest.mark.parametrize("block", [64, 128])
def test_several_tiles_a_block(block: int) -> None:
    case = Case(torch.float16, heads=1, rows=17, widths=(256, 200), block=block, blocks=2, exact=block + 3, scaling=0.06)
    made = check(case)
    assert made.plan.tile < block


@pytest.mark.parametrize(("softcap", "dtype"), [(20.0, torch.float32), (-0.7, torch.bfloat16), (3e4, torch.float32)])
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    check(Case(dtype, heads=1, softcap=softcap, size=4.0))


@pytest.mark.parametrize("scaling", [0.0, -0.3, 1e-41, 0.1])
def test_scales(scaling: float) -> None:
    check(Case(heads=1, scaling=scaling))


def test_scores_of_one_size_after_the_other() -> None:
    """Every block has larger scores than the one before, or smaller ones: rescaled every time, or never."""
    for seed, sign in enumerate((1.0, -1.0)):
        case = Case(rows=1, heads=1, blocks=9, exact=16, processors=2, seed=seed)
        growing = torch.arange(1, case.tokens + 1) / case.tokens
        case.query = case.query.abs() * 3
        case.keys = (sign * case.keys.abs() * growing.view(1, 1, -1, 1)).to(case.dtype)
        check(case)


def test_heavy_cancellation() -> None:
    """Values of changing sign and hardly different weights: what is left is rounding, which the bound is about."""
    for seed in range(2):
        case = Case(heads=1, rows=2, blocks=16, exact=16, size=1e-3, processors=1, seed=seed)
        signs = torch.tensor([1.0, -1.0]).repeat(case.tokens // 2).view(1, 1, -1, 1)
        case.values = (case.values[:, :, :1] * signs).contiguous()
        check(case)


def masks(case: Case, kind: str) -> Tensor:
    """A bias `[batch | 1, heads | 1, rows | 1, tokens]`."""
    made = torch.Generator().manual_seed(7)
    tokens = case.tokens
    if kind == "additive":
        return torch.randn(case.batch, case.heads, case.rows, tokens, generator=made)
    if kind == "shared additive":
        return 3 * torch.randn(1, 1, 1, tokens, generator=made)
    if kind == "padding":  # some batch rows' first tokens, whole blocks and programs of them
        kept = torch.arange(tokens) >= torch.tensor([0, 53]).view(-1, 1, 1, 1)[: case.batch]
        return torch.where(kept, 0.0, -torch.inf)
    if kind == "per row":  # with a row that may attend to nothing
        bias = torch.where(torch.rand(1, 1, case.rows, tokens, generator=made) < 0.5, 0.0, -torch.inf)
        bias[:, :, 1] = -torch.inf
        return bias
    if kind == "only exact":
        return torch.where(torch.arange(tokens) < case.blocks * case.block, -torch.inf, 0.5).view(1, 1, 1, -1)
    if kind == "one token":
        return torch.where(torch.arange(tokens) == 37, 0.0, -torch.inf).view(1, 1, 1, -1)
    if kind == "per head":
        return torch.where(torch.rand(1, case.heads, 1, tokens, generator=made) < 0.2, 1.0, -torch.inf)
    assert kind == "nothing"
    return torch.full((1, 1, 1, tokens), -torch.inf)


MASKS = ("additive", "shared additive", "padding", "per row", "only exact", "one token", "per head", "nothing")


@pytest.mark.parametrize(("kind", "sinks"), [*((kind, False) for kind in MASKS), *((kind, True) for kind in MASKS[3::2])])
def test_masks_and_sink_logits(kind: str, sinks: bool) -> None:
    case = Case(torch.bfloat16, batch=2, heads=2, rows=2)
    case.bias = masks(case, kind)
    if sinks:
        case.sinks = torch.randn(1, case.heads, case.rows, generator=torch.Generator().manual_seed(3)) + 2
    made = check(case)
    if kind == "nothing":
        assert bool((made.result == 0).all()) and bool((made.norm == 0).all())
    if kind == "per row":
        assert bool((made.result[:, 1] == 0).all()) and bool((made.result[:, 0] != 0).any())


def test_sink_logits_of_any_size() -> None:
    for logit in (-1e4, 0.0, 60.0, 800.0):
        case = Case(heads=1, rows=2, sinks=torch.full((1, 1, 2), logit))
        made = check(case)
        assert bool((made.result == 0).all()) == (logit == 800.0)


def test_a_mask_hides_what_is_no_number_in_keys_but_no_bound_is_finite() -> None:
    for number in (torch.nan, torch.inf, -torch.inf):
        case = Case()
        case.bias = masks(case, "padding")
        case.bias[..., 3] = -torch.inf
        case.keys[0, 1, 3, 5] = number
        made = launch(case)
        assert bool(torch.isfinite(made.result[0]).all()) and bool(torch.isfinite(made.bound[0]).all())
        assert bool(torch.isfinite(made.result[1]).all()) and not bool(torch.isfinite(made.bound[1]).any())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "place"), [("keys", 40), ("keys", 85), ("values", 2)])
def test_no_finite_bound_of_originals_that_are_no_numbers(number: float, place: int, kind: str) -> None:
    case = Case(torch.float16, rows=1)
    getattr(case, kind)[0, 0, place, 7] = number
    made = launch(case)
    assert not bool(torch.isfinite(made.bound[0]).any()) and bool(torch.isfinite(made.bound[1]).all())
    if kind == "values" or math.isnan(number):
        assert not bool(torch.isfinite(made.norm[0]).any())
    assert made.trouble == [0, 0, 0]


def test_no_finite_bound_of_an_output_that_overflows() -> None:
    case = Case(torch.float32, heads=1, rows=1, softcap=0.01)
    case.values = torch.full_like(case.values, 3e38)
    made = launch(case)
    assert not bool(torch.isfinite(made.bound).any())


def test_no_finite_bound_of_products_that_may_overflow() -> None:
    case = Case(heads=1, rows=1)
    case.bias = masks(case, "only exact")
    case.keys[..., : case.blocks * case.block, :] *= 1e37
    made = launch(case)
    assert bool(torch.isfinite(made.result).all()) and bool((made.bound == torch.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_flagged_units(dtype: torch.dtype) -> None:
    case = Case(dtype, batch=2, heads=2, rows=2, dense=[0, 1, 7, 0], sinks=torch.ones(2, 2, 2))
    some = check(case)
    every = check(replace(case, dense=None))
    for unit in (1, 2):  # neighbours change nothing
        assert torch.equal(some.result[unit], every.result[unit]) and torch.equal(some.bound[unit], every.bound[unit])


@pytest.mark.parametrize(("kind", "dtype"), [(0, torch.float32), (1, torch.float32), (0, torch.bfloat16), (1, torch.float16)])
def test_a_damaged_page(kind: int, dtype: torch.dtype) -> None:
    """One bit of any number of a page: its unit is NaN, and said to be; others are as they were."""
    case = Case(dtype, batch=2, heads=2, rows=1, dense=[0, 1, 0, 1], block=64, widths=(48, 80), exact=1)
    whole = check(case)
    made = torch.Generator().manual_seed(5)
    count = case.block * case.widths[kind] * dtype.itemsize
    for byte in (count - 1, int(torch.randint(0, count, (1,), generator=made))):
        block, bit = byte % case.blocks, byte % 8

        def flip(
            slabs: list[Tensor], pages: triton_dense.HostPages, byte: int = byte, block: int = block, bit: int = bit
        ) -> None:
            start = (pages.value_offset if kind else 0) + ((block % pages.rows) * 4 + 3) * count
            slabs[block // pages.rows][start + byte] ^= 1 << bit

        found = launch(case, flip)
        assert found.trouble == [1 | kind << 1, 3, block]
        for part in (found.result, found.norm, found.bound):
            assert not bool(torch.isfinite(part[3]).any())
        assert bool(torch.isnan(found.result[3]).all()) and bool(torch.isnan(found.norm[3]).all())
        for unit in range(3):
            assert torch.equal(found.result[unit], whole.result[unit]) and torch.equal(found.bound[unit], whole.bound[unit])


def test_damage_is_seen_where_nothing_is_attended() -> None:
    """Of a page that no row attends to, too, and where a sink logit outweighs every score."""
    for sinks in (None, torch.full((1, 2, 3), 800.0)):
        case = Case(sinks=sinks)
        case.bias = masks(case, "only exact")

        def flip(slabs: list[Tensor], pages: triton_dense.HostPages) -> None:
            slabs[1][0] ^= 16

        found = launch(case, flip)
        assert found.trouble == [1, 0, 2]
        assert bool(torch.isnan(found.result[0]).all()) and bool(torch.isfinite(found.result[1]).all())


def test_damage_of_a_unit_that_is_not_flagged_is_not_looked_for() -> None:
    case = Case(dense=[0, 1])

    def flip(slabs: list[Tensor], pages: triton_dense.HostPages) -> None:
        slabs[0][0] ^= 1

    check(case, launch(case, flip))


def test_trouble_that_there_is_already_stays() -> None:
    case = Case()
    pages, slabs = case.pages()
    slabs[0][0] ^= 1
    made = call(case, pages, torch.tensor([5, 6, 7], dtype=torch.int32))
    assert made.trouble == [5, 6, 7] and bool(torch.isnan(made.result[0]).all())


def test_plans_cover_every_item() -> None:
    sizes = product((0, 1, 7, 100, 2000), (16, 64, 128), (0, 1, 200), (1, 8, 256), (4, 20), ((64, 64), (256, 192)), (1, 132))
    for blocks, block, exact_tokens, units, rows, widths, processors in sizes:
        plan = triton_dense.plan(blocks, block, exact_tokens, units, rows, widths, processors)
        items = blocks + -(-exact_tokens // block)
        assert (plan.programs - 1) * plan.span < max(items, 1) <= plan.programs * plan.span
        assert plan.tile >= 16 and block % plan.tile == 0 and plan.programs <= max(1, processors)
        assert plan.chain >= plan.span * block and plan.rescalings == plan.span * (block // plan.tile) + 1


def test_what_does_not_fit_is_refused() -> None:
    case = Case()
    pages, _ = case.pages()
    nothing = torch.zeros(())
    for rows, bias in ((65, None), (3, nothing)):
        result = torch.zeros(2, rows, 96)
        with pytest.raises(ValueError, match="is no result of keys"):
            triton_dense.launch(
                nothing, nothing, pages, case.keys, case.values, 1.0, None, bias, None, None, nothing, nothing, nothing,
                nothing, result, nothing, nothing, lambda name, size, dtype: torch.empty(size, dtype=dtype), 4,
            )  # fmt: skip


@triton.jit
def _tanh(x, y, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(y + at, triton_dense.tanh32(tl.load(x + at)))


def test_tanh() -> None:
    """Over all magnitudes: within the 4u that its docstring says, half of what section 5 allows."""
    bits = torch.arange(0, 0x7F800000, 19999, dtype=torch.int64)
    dense = torch.linspace(0, 12, 2**16)
    x = torch.cat([bits.int().view(torch.float32), dense, torch.tensor([torch.inf, 0.0])])
    x = torch.cat([x, -x])
    x = x[: len(x) // 4096 * 4096]
    y = torch.empty_like(x, device=DEVICE)
    _tanh[(len(x) // 4096,)](x.to(DEVICE), y, 4096)
    y = y.cpu()
    assert float((y.double() - torch.tanh(x.double())).abs().max()) < 2.0**-22
    assert bool((y.abs() <= 1).all())
    edge = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0] * 1024)
    y = torch.empty_like(edge, device=DEVICE)
    _tanh[(1,)](edge.to(DEVICE), y, 4096)
    assert bool(torch.isnan(y[0])) and y[1:4].tolist() == [1.0, -1.0, 0.0]


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_certkv.kernels import triton_dense as dense

FLOATS = {"scaling", "scaling_rest", "softcap", "softcap_rest", "lean", "relative", "absolute"}
TYPED = [("model", ["query", "exact_keys", "exact_values", "result"]), ("i32", ["dense", "trouble"]),
         ("i64", ["slabs", "sums", "key_multipliers", "value_multipliers"]),
         ("fp32", ["block_bias", "exact_bias", "maxima", "totals", "outputs", "sinks"]),
         ("fp64", ["key_norm", "value_norm", "bias_size", "norm", "bound"])]
STRIDES = {part + axis for part in ("key_", "value_") for axis in ("batch", "head", "token", "offset")}
POINTERS = {name: "*" + of for of, names in TYPED for name in names}

def build(function, kind, arch, **constants):
    names = list(inspect.signature(function.fn).parameters)
    signature = {n: POINTERS.get(n, "fp32" if n in FLOATS else "i32").replace("model", kind) for n in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    whole = [n for n in names if n in POINTERS or n in STRIDES]
    source = ASTSource(function, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in whole})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8, "num_stages": 1})

for kind, arch in (("bf16", 90), ("fp32", 90), ("fp16", 80)):
    sizes = {"USED": 4, "CHANNELS": 64, "WIDE": 64, "WIDTH": 48, "WIDE_VALUES": 64, "SOFTCAP": True}
    made = build(dense.split, kind, arch, BIAS=True, ROWS=16, BLOCK=64, TILE=32, **sizes)
    tile = "tensor<32x64x!tt.ptr<" + kind.replace("fp", "f") + ">"
    loads = [line for line in made.asm["ttgir"].splitlines() if " tt.load " in line and tile in line]
    assert len(loads) == 4, loads  # keys and values of a page, and of exact tokens: each read once
    assert made.metadata.shared <= 48 * 1024, made.metadata.shared
    ptx = made.asm["ptx"]
    assert "mma" not in ptx and "fma.rn.f32" in ptx  # float32 products, not TF32 ones
    assert "ld.global.v4" in ptx and "ld.global.b16" not in ptx
    build(dense.merge, kind, arch, SINKS=True, **sizes)
"""


def test_kernels_compile_without_a_gpu() -> None:
    """The only evidence here that they run on a GPU; and each number of a page is read by one load."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
