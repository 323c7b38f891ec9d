"""The check of this machine's arithmetic: it accepts a real backend, and names every planted fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_certkv import codecs
from hf_certkv.bounds import EXP_ERROR, TANH_ERROR, TINY
from hf_certkv.precision import full_precision
from hf_certkv.verify import arithmetic, rounding
from hf_certkv.verify.arithmetic import CHAINS, KINDS, weigh_sum
from hf_certkv.verify.parts import Clock, Part
from hf_certkv.verify.rounding import PAGE, Sweep, flushing, low_half, page_bits, run, special_points

CPU = torch.device("cpu")
PAGE_OF = np.arange(PAGE, dtype=np.uint32) << np.uint32(16)  # with its low half to be filled in
EXP, TANH, SUM, MATMUL, EINSUM = torch.exp, torch.tanh, torch.Tensor.sum, torch.Tensor.__matmul__, torch.einsum
SUBTRACT = torch.Tensor.__sub__


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """As `run` has it: overflow of a reference is no news. The flush mode is that of every other test afterwards."""
    with np.errstate(all="ignore"):
        yield
    torch.set_flush_denormal(False)


def new_part() -> Part:
    """An empty part."""
    return Part("rounding", "", "")


def generator() -> torch.Generator:
    """A new generator with a fixed seed."""
    return torch.Generator().manual_seed(3)


def swept(*pages: np.ndarray) -> tuple[Part, Sweep]:
    """The given inputs through every function, one page with a low half of 0x5a5a if there are none."""
    part = new_part()
    sweep = Sweep(part, CPU)
    for page in pages or (PAGE_OF | np.uint32(0x5A5A),):
        sweep.page(page)
    return part, sweep


def all_chains() -> Part:
    """Every sum on every kind of input, two shapes each."""
    part, g = new_part(), generator()
    for name in CHAINS:
        for kind in KINDS:
            for _ in range(2):
                arithmetic.one_chain(part, CPU, g, name, kind)
    return part


def only(dtype: torch.dtype, changed: Callable[[Tensor], Tensor], real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`real` with its result changed where that is of a dtype."""

    def planted(*args: object, **options: object) -> Tensor:
        y = real(*args, **options)
        return changed(y) if y.dtype == dtype else y

    return planted


# --- a real backend -------------------------------------------------------------------------------------------------------


def test_this_backend_passes_and_says_how_much_was_covered() -> None:
    told: list[str] = []
    part = run(Clock(0.0, lambda share, text: told.append(text)), CPU, seed=1)
    assert part.passed, part.failures
    assert part.figures["float32_numbers"] == rounding.FIRST_PAGES * PAGE and not part.figures["exhaustive"]
    # Nobody rounds every value of exp correctly, and nobody needs the whole allowance to the last bit.
    assert 0.5 < part.figures["exp_error_u"] < EXP_ERROR * 2**24
    assert 0.4 < part.figures["tanh_error_u"] < TANH_ERROR * 2**24
    chains = part.figures["chains_error_over_gamma"]
    assert set(chains) == set(CHAINS) and all(set(kinds) == set(KINDS) for kinds in chains.values())
    assert max(kinds["just under half a unit"] for kinds in chains.values()) > 0.3, "no roundings lined up"
    assert part.seconds > 0


def test_every_float32_number_comes_once_if_the_clock_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_bits(7, seed=12345)
    assert np.array_equal(page >> np.uint32(16), np.arange(PAGE)) and (page & np.uint32(0xFFFF) == low_half(7, 12345)).all()
    lows = {seed: [low_half(index, seed) for index in range(PAGE)] for seed in (0, 1)}
    assert sorted(lows[0]) == sorted(lows[1]) == list(range(PAGE)) and lows[0][:9] != lows[1][:9]

    pages: list[tuple[int, ...]] = []
    monkeypatch.setattr(rounding, "PAGE", 512)  # a small world: 512 pages of 512 numbers
    monkeypatch.setattr(rounding, "special_points", lambda: np.zeros(1, dtype=np.uint32))
    monkeypatch.setattr(Sweep, "page", lambda self, bits: pages.append(tuple(bits.tolist())))
    for name in ("codes", "one_chain"):
        monkeypatch.setattr(rounding, name, lambda *_: None)
    part = run(Clock(math.inf), CPU, seed=12345)
    seen = [number for page in pages[1:] for number in page]
    assert sorted(seen) == [high << 16 | low for high in range(512) for low in range(512)]
    assert part.figures["exhaustive"] and part.figures["float32_numbers"] == 512 * 512


def test_special_points_hold_both_signs_of_zero_infinity_and_nan_and_the_ends_of_exp() -> None:
    points = special_points()
    found = set(points.tolist())
    assert len(found) == len(points) and {0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0, 0x80000000} <= found
    for end in (-104.0, -103.97208, -87.33654, 88.72284, -7 * math.log(2)):
        at = int(np.array([end], dtype=np.float32).view(np.uint32)[0])
        assert {at - 1, at, at + 1} <= found, end


# --- functions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "refused"), [(1 + 2.0**-20, True), (1 - 2.0**-20, True), (1 + 2.0**-21, True), (1 + 2.0**-23, False)]
)
def test_relative_error_of_exp(factor: float, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "exp", only(torch.float32, lambda y: (y.double() * factor).float(), EXP))
    part, sweep = swept()
    assert (part.failed > 1000) is refused, part.failures
    assert all("exp(" in line and "contiguous" in line for line in part.failures)
    # What float64 says of the worst input, balls confirm.
    before, share = part.failed, sweep.figures()["exp"]["normal"]["error_over_allowed"]
    assert (share > 1) is refused and (part.failed > before) is refused
    own = 0.25 + 2 * 2.0**-24 / EXP_ERROR  # of this backend, and of rounding the planted result
    assert abs(share - abs(factor - 1) / EXP_ERROR) < own


def test_exp_that_is_wrong_only_in_tails_or_only_in_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout, chosen in (("rows of seven", lambda x: x.dim() == 2), ("every second", lambda x: x.stride() == (2,))):
        monkeypatch.setattr(torch, "exp", lambda x, chosen=chosen: EXP(x) * (1 + 2.0**-19 * chosen(x)))
        part, sweep = swept()
        differ = sweep.figures()["exp"]["differ_from_contiguous"]
        assert part.failed > 1000 and all(layout in line for line in part.failures)
        others = differ.keys() - {layout, "flushed"}  # the plant's product is flushed too
        assert differ[layout] > 1000 and len(others) == 1 and not any(differ[name] for name in others)


def test_one_wrong_number_of_all_is_found_on_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    at = np.array([0xC0A91234], dtype=np.uint32).view(np.float32)  # -5.28
    victim = torch.from_numpy(at)
    monkeypatch.setattr(torch, "exp", lambda x: torch.where(x == victim.to(x.dtype), EXP(x) * (1 + 2.0**-21), EXP(x)))
    assert swept(PAGE_OF | np.uint32(0x1235))[0].failed == 0
    part, _ = swept(PAGE_OF | np.uint32(0x1234))
    assert part.failed == 1 and repr(float(at[0])) in part.failures[0]


@pytest.mark.parametrize(("limit", "refused"), [(2.0**-126, False), (2.0**-125, True), (1e-30, True)])
def test_exp_may_lose_what_is_below_the_normal_numbers_and_no_more(
    limit: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "exp", only(torch.float32, lambda y: torch.where(y < limit, 0.0, y), EXP))
    x = np.arange(0xC2700000, 0xC2DC0000, 64, dtype=np.uint32).view(np.float32)  # -60 to -110
    part, sweep = swept(x.view(np.uint32))
    assert (part.failed > 0) is refused, part.failures
    if not refused:
        assert 0.9 * TINY < sweep.figures()["exp"]["subnormal"]["error"] <= TINY
        assert part.failed == 0, part.failures


@pytest.mark.parametrize(
    ("at", "gives"), [(0.0, 1 - 2.0**-24), (-0.0, 1 + 2.0**-23), (-math.inf, 2.0**-149), (math.nan, 0.0), (math.inf, 1e38)]
)
def test_what_must_be_exact(at: float, gives: float, monkeypatch: pytest.MonkeyPatch) -> None:
    part = new_part()
    Sweep(part, CPU).special_values()
    assert part.failed == 0 and part.checked > 100

    def planted(x: Tensor) -> Tensor:
        here = torch.isnan(x) if math.isnan(at) else (x == at) & (torch.signbit(x) == (math.copysign(1, at) < 0))
        return torch.where(here, gives, EXP(x))

    monkeypatch.setattr(torch, "exp", planted)
    Sweep(part, CPU).special_values()
    assert part.failed >= 9


def test_exp_of_nan_and_overflow_are_judged_on_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    for changed in (lambda y: y.nan_to_num(nan=1.0, posinf=math.inf), lambda y: y.clamp(max=1e38)):
        monkeypatch.setattr(torch, "exp", only(torch.float32, changed, EXP))
        assert swept()[0].failed > 100
    monkeypatch.setattr(torch, "exp", only(torch.float32, lambda y: torch.where(y > 1e30, math.nan, y), EXP))
    assert swept()[0].failed > 100


def test_exp_that_is_wrong_only_when_subnormal_numbers_are_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    torch.set_flush_denormal(False)
    flushes = lambda: bool(torch.full((1,), TINY) * 0.5 == 0)  # noqa: E731
    monkeypatch.setattr(torch, "exp", lambda x: EXP(x) * (1 + 2.0**-19 * flushes()))
    part, _ = swept()
    assert part.failed > 1000 and all("flushed" in line for line in part.failures)


@pytest.mark.parametrize(("offset", "refused"), [(2.0**-20, True), (-(2.0**-20), True), (2.0**-22, False)])
def test_absolute_error_of_tanh(offset: float, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "tanh", only(torch.float32, lambda y: y + offset, TANH))
    part, sweep = swept()
    assert (part.failed > 1000) is refused, part.failures
    assert (sweep.figures()["tanh"]["normal"]["error_over_allowed"] > 1) is refused


def test_casts_that_round_toward_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.to

    def toward_zero(x: Tensor, *args: object, **options: object) -> Tensor:
        if args and args[0] == torch.bfloat16 and x.dtype == torch.float32:
            return (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
        return real(x, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", toward_zero)
    part, _ = swept(PAGE_OF | np.uint32(0xC000))  # three quarters of a last place are cut off
    assert part.failed > 1000 and all("bfloat16" in line for line in part.failures)


# --- operations and sums --------------------------------------------------------------------------------------------------


def test_the_sums_of_this_backend_and_short_sums_planted_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = all_chains()
    assert honest.failed == 0 and honest.checked > 200, honest.failures
    plants: list[tuple[object, str, Callable[..., Tensor], set[str]]] = [
        (torch.Tensor, "__matmul__", lambda a, b: MATMUL(a.half(), b.half()).float(), {"scores", "values"}),
        (torch.Tensor, "__matmul__", lambda a, b: MATMUL(a.bfloat16().float(), b.bfloat16().float()), {"scores", "values"}),
        (torch.Tensor, "sum", lambda x, *a, **o: SUM(x.half(), *a, **o).float(), {"sums", "squares"}),
        (torch, "einsum", lambda e, a, b: EINSUM(e, a.half(), b.half()).float(), {"segments", "moments"}),
        (torch, "einsum", lambda e, a, b: EINSUM(e, a, b.where(b != b.max(), 0)), {"segments", "moments"}),  # an addend is lost
    ]
    for owner, name, short, chains in plants:
        real = getattr(owner, name)

        def planted(*args: object, real: object = real, short: object = short, **options: object) -> Tensor:
            single = all(x.dtype == torch.float32 for x in args if isinstance(x, Tensor))
            return (short if single else real)(*args, **options)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, planted)
            part = all_chains()
        assert {line.split(",")[0] for line in part.failures} <= chains
        failing = {chain for chain in chains if any(line.startswith(chain) for line in part.failures)}
        # The first twenty failures are kept, so at least the first of the chains is named.
        assert failing and part.failed > 20, (name, part.failures)


def test_products_that_the_process_has_cut_short() -> None:
    """No plant: torch itself computes float32 products from bfloat16 parts when told to, and the guard prevents it."""
    backend = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch cannot be told to")
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "bf16"
        a = torch.rand(64, 64, generator=generator())
        short = not torch.allclose((a @ a).double(), a.double() @ a.double(), rtol=1e-5)
        with full_precision("cpu"):
            guarded = all_chains()
        bare = all_chains()
    finally:
        backend.fp32_precision = before
    assert guarded.failed == 0, guarded.failures
    assert (bare.failed > 0) is short


def test_a_sum_is_weighed_without_tolerance() -> None:
    u = 2.0**-24
    one, two = torch.ones(1), torch.ones(2)
    assert weigh_sum(one, one, 1 - u, 1)[0] and not weigh_sum(one, one, 1 + 2 * u, 1)[0]
    assert weigh_sum(two, two, 2 + 4 * u, 2)[0] and not weigh_sum(two, two, 2 + 8 * u, 2)[0]
    assert weigh_sum(two, two, 2 - 4 * u, 2)[0] and not weigh_sum(two, two, 2 - 6 * u, 2)[0]
    assert weigh_sum(two, -two, -2.0, 0) == (True, 0.0) and not weigh_sum(two, -two, 2.0, 2)[0]
    small = torch.full((3,), 2.0**-64)  # three products of 2^-128 may be lost, and nothing much larger
    assert weigh_sum(small, small, 0.0, 3)[0] and not weigh_sum(small * 8, small, 0.0, 3)[0]
    for wrong in (math.nan, math.inf, -math.inf):
        assert weigh_sum(two, two, wrong, 2) == (False, math.inf)
    # Cancellation: the bound is of the sizes, not of the result.
    assert weigh_sum(torch.tensor([1.0, -1.0]), two, 2 * u, 2)[0]


def test_decoded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    part = new_part()
    arithmetic.codes(part, CPU, generator(), every=61)
    assert part.failed == 0 and part.checked > 10**6, part.failures
    real = codecs._decode_float
    plants: list[Callable[..., Tensor]] = [
        lambda codes, low, scale, offset: real(codes, low, scale, offset).to(torch.bfloat16).float(),
        lambda codes, low, scale, offset: real(codes, low, scale * (1 + 2.0**-23), offset),  # a step of 12 bits
        lambda codes, low, scale, offset: real(codes, low, scale, offset) * (1 + 2.0**-23),  # a second rounding
    ]
    for planted in plants:
        monkeypatch.setattr(codecs, "_decode_float", planted)
        part = new_part()
        arithmetic.codes(part, CPU, generator(), every=977)
        assert part.failed > part.checked // 10, part.failures


def test_basic_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    part = new_part()
    arithmetic.basic_operations(part, CPU, generator())
    assert part.failed == 0 and 0.5 < part.figures["scaled_by_a_number_u"] <= 2

    def truncated(a: Tensor, b: Tensor) -> Tensor:
        exact = SUBTRACT(a.double(), b.double())
        near = exact.float()
        return torch.where(near.double().abs() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)

    plants = {"difference": ("__sub__", truncated), "divided": ("__truediv__", lambda a, b: a * (1 / b) * (1 + 2.0**-22))}
    for name, (method, planted) in plants.items():
        real = getattr(torch.Tensor, method)
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.Tensor,
                method,
                lambda a, b, real=real, planted=planted: (planted if a.dtype == torch.float32 else real)(a, b),
            )
            part = new_part()
            arithmetic.basic_operations(part, CPU, generator())
        assert part.failed > 0 and all(line.startswith(name) for line in part.failures)


@pytest.mark.parametrize(("owner", "name"), [(torch, "exp"), (torch, "expm1"), (torch, "tanh"), (np, "exp"), (np, "tanh")])
def test_float64_functions_and_what_judges_by_them(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = new_part()
    arithmetic.float64_functions(part, CPU, generator())
    assert part.failed == 0 and part.checked > 1000, part.failures
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda x: real(x) * (1 + 2.0**-40))
    arithmetic.float64_functions(part, CPU, generator())
    label = f"float64 numpy {name}(" if owner is np else f"float64 {name}("
    assert part.failed > 1000 and all(line.startswith(label) for line in part.failures)


# --- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
def test_flushing_is_put_back(before: bool) -> None:
    if not torch.set_flush_denormal(before):
        pytest.skip("this CPU cannot flush subnormal numbers")
    flushes = lambda: bool(torch.full((1,), TINY) * 0.5 == 0)  # noqa: E731
    with flushing(not before):
        assert flushes() is not before
    assert flushes() is before
    part, _ = swept()
    assert flushes() is before and part.checked > 0
