"""The storage formats: packing, rounding, and that what is measured of a block bounds what its decoding really yields."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_certkv import codecs
from hf_certkv.codecs import EncodedBlocks, KeyCodec, ValueCodec, token_steps
from hf_certkv.store import BlockStore

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
DTYPES = list(BITS)


def raw_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Finite numbers of every size, from random bits."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(BITS[dtype])
    x = bits.view(dtype)
    return torch.where(torch.isfinite(x), x, torch.ones((), dtype=dtype))


def block_of(kind: str, dtype: torch.dtype, tokens: int, channels: int, seed: int) -> Tensor:
    """One block `[tokens, channels]` of a regime."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    largest = torch.finfo(dtype).max
    if kind == "raw":
        return raw_bits((tokens, channels), dtype, seed)
    if kind == "subnormal":
        return (x.double() * torch.finfo(dtype).smallest_normal / 8).to(dtype)
    if kind == "huge":
        return (x.clamp(-3, 3).double() * (largest / 4)).to(dtype)
    if kind == "constant channels":
        x[:, ::2] = x[0, ::2]
    elif kind == "duplicates":
        x[:] = x[0]
    elif kind == "outlier":
        x[:, 1] *= 1000
    elif kind == "offset":
        x = x * 1e-2 + 300
    elif kind == "zeros":
        x = x * 0
    elif kind == "single":
        x = torch.zeros(tokens, channels).index_put_((torch.tensor(3), torch.tensor(1)), torch.tensor(0.7))
    elif kind == "below the smallest float16":
        x = torch.full_like(x, -1.0) * 60000 - 500 * x.abs()
        if dtype != torch.float16:
            x = x * 2
    elif kind == "rank one":
        x = x[:, :1] * x[:1, :]
    elif kind != "normal":
        raise ValueError(kind)
    return x.to(dtype)


KINDS = [
    "normal",
    "raw",
    "subnormal",
    "huge",
    "constant channels",
    "duplicates",
    "outlier",
    "offset",
    "zeros",
    "single",
    "below the smallest float16",
    "rank one",
]


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 17, 20, 64, 80, 127])
def test_pack_and_unpack(channels: int) -> None:
    codes = torch.randint(0, 16, (2, 3, 4, channels), dtype=torch.uint8)
    packed = codecs.pack_nibbles(codes)
    assert packed.shape == (2, 3, 4, (channels + 1) // 2) and packed.dtype == torch.uint8
    assert torch.equal(codecs.unpack_nibbles(packed, channels), codes)


def test_every_pair_of_nibbles() -> None:
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack([low.flatten(), high.flatten()], dim=-1).to(torch.uint8)
    packed = codecs.pack_nibbles(codes)
    assert len(set(packed.flatten().tolist())) == 256
    assert torch.equal(codecs.unpack_nibbles(packed, 2), codes)


def half_neighbours() -> Tensor:
    """Every finite float16, the doubles right beside it, and the middle to the next one."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    exact = halves[torch.isfinite(halves)].double().unique()
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    middles = (exact[1:] + exact[:-1]) / 2
    parts = [exact, middles]
    for centre in (exact, middles):
        parts += [torch.nextafter(centre, infinity), torch.nextafter(centre, -infinity)]
    return torch.cat(parts)


@pytest.mark.parametrize("seed", range(3))
def test_rounding_bounds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** (torch.rand(20000, generator=generator, dtype=torch.float64) * 24 - 16)
    x = torch.cat([half_neighbours(), torch.randn(20000, generator=generator, dtype=torch.float64) * spread])
    x = x[(x.abs() <= codecs.HALF_MAX)]
    down, up = codecs.round_half_down(x), codecs.round_half_up(x)
    assert down.dtype == up.dtype == torch.float16
    assert bool((down.double() <= x).all()) and bool((up.double() >= x).all())
    # At most two units in the last place away, so that no range is given away.
    room = (x.abs() * 2.0**-9).clamp_min(2.0**-23)
    assert bool((x - down.double() <= room).all()) and bool((up.double() - x <= room).all())


@pytest.mark.parametrize(
    ("x", "down", "up"),
    [
        (0.0, 0.0, 0.0),
        (1e300, 65504.0, 65504.0),
        (-1e300, -65504.0, -65504.0),
        (torch.inf, 65504.0, 65504.0),
        (-torch.inf, -65504.0, -65504.0),
        (1e-300, 0.0, 2.0**-24),
        (-1e-300, -(2.0**-24), 0.0),
        (65504.0, 65504.0, 65504.0),
        (65503.0, 65440.0, 65504.0),  # two units down: the nearest was above
    ],
)
def test_rounding_of_extremes(x: float, down: float, up: float) -> None:
    given = torch.tensor([x], dtype=torch.float64)
    assert float(codecs.round_half_down(given)) == down
    assert float(codecs.round_half_up(given)) == up


def test_rounding_keeps_nan() -> None:
    given = torch.tensor([torch.nan], dtype=torch.float64)
    assert bool(codecs.round_half_down(given).isnan()) and bool(codecs.round_half_up(given).isnan())


@pytest.mark.parametrize("seed", range(3))
def test_round_up_is_above(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 10.0 ** (torch.rand(50000, generator=generator, dtype=torch.float64) * 700 - 350)
    up = codecs.round_up(x)
    assert up.dtype == torch.float32 and bool((up.double() >= x).all())
    normal = (x > 1e-30) & (x < 1e38)
    assert bool((up.double()[normal] <= x[normal] * 1.0001).all())
    special = codecs.round_up(torch.tensor([0.0, torch.inf, torch.nan, 5e-324], dtype=torch.float64))
    assert float(special[0]) == 0 and float(special[1]) == torch.inf and bool(special[2].isnan()) and float(special[3]) > 0


def exact_rows(x: Tensor) -> list[list[Fraction]]:
    """A matrix of finite floats as rationals."""
    return [[Fraction(number) for number in row] for row in x.double().tolist()]


def decoded_exactly(codec: KeyCodec | ValueCodec, encoded: EncodedBlocks, level: int, channels: int) -> list[list[Fraction]]:
    """What the stored bytes of one block stand for at a level, as rationals, by the format's own definition."""
    stored = codecs.unpack_nibbles(encoded.plane, channels) if encoded.plane is not None else None
    low = stored.tolist() if level == 1 and stored is not None else None
    codes = encoded.codes
    eight = isinstance(codec, ValueCodec) and codec.bits == 8
    if isinstance(codec, ValueCodec) and not eight:
        codes = codecs.unpack_nibbles(codes, channels)
    scale, offset = encoded.scale.double().tolist(), encoded.offset.double().tolist()
    out = []
    for t, row in enumerate(codes.tolist()):
        numbers = []
        for c, code in enumerate(row):
            if isinstance(codec, ValueCodec):
                group = c // codec.group_size(channels)
                step, start = Fraction(scale[t][group]), Fraction(offset[t][group])
            else:
                step, start = Fraction(scale[c]), Fraction(offset[c])
            if eight:
                place = Fraction(code, 16)
            elif low is not None:
                place = code + Fraction(low[t][c], 16)
            else:
                place = code + Fraction(15, 32)
            numbers.append(start + step * place)
        out.append(numbers)
    return out


def squares(row: list[Fraction]) -> Fraction:
    """Sum of squares."""
    return sum((x * x for x in row), Fraction(0))


def spectral_at_least(rows: list[list[Fraction]], steps: list[Fraction] | None = None) -> Fraction:
    """The square of a lower bound of the spectral norm: the exact Rayleigh quotient of numpy's best direction.

    Args: steps: squares of what each row is divided by first; 0 leaves a row out.
    """
    steps = steps if steps is not None else [Fraction(1)] * len(rows)
    rows, steps = [r for r, s in zip(rows, steps, strict=True) if s > 0], [s for s in steps if s > 0]
    largest = max((abs(x) for row in rows for x in row), default=Fraction(0))
    if largest == 0:
        return Fraction(0)
    widths = [float(max(steps) / step) ** 0.5 for step in steps]
    scaled = [[float(x / largest) * width for x in row] for row, width in zip(rows, widths, strict=True)]
    exact = [Fraction(float(x)) for x in np.linalg.svd(np.array(scaled))[2][0]]
    along = [sum((a * b for a, b in zip(row, exact, strict=True)), Fraction(0)) for row in rows]
    return sum((x * x / step for x, step in zip(along, steps, strict=True)), Fraction(0)) / squares(exact)


def above(number: float, square: Fraction) -> bool:
    """Whether a stored number is at least the root of an exact square. NaN is not; infinity always is."""
    return number == float("inf") or (np.isfinite(number) and number >= 0 and Fraction(number) ** 2 >= square)


def check_floats(decoded: Tensor, exact: list[list[Fraction]], scale_size: Fraction) -> None:
    """The reference's float32 decoding is within one rounding of the exact grid point."""
    assert decoded.dtype == torch.float32
    for row, wanted in zip(decoded.double().tolist(), exact, strict=True):
        for got, want in zip(row, wanted, strict=True):
            assert abs(Fraction(got) - want) <= abs(want) * Fraction(1, 2**24), (got, float(want), float(scale_size))


def check_keys(x: Tensor, refine: bool) -> None:
    """Every number stored of a key block against rationals, without slack."""
    codec, channels = KeyCodec(refine=refine), x.shape[1]
    encoded = codec.encode(x)
    assert encoded.scale.dtype == encoded.offset.dtype == torch.float16
    numbers = encoded.numbers.double().tolist()
    assert len(numbers) == codec.levels * 3 + 1
    original, steps = exact_rows(x), [Fraction(s) for s in encoded.scale.double().tolist()]
    radius = max(squares(row) for row in original)
    for level in range(codec.levels):
        exact = decoded_exactly(codec, encoded, level, channels)
        plane = encoded.plane if level else None
        check_floats(codec.decode(encoded.codes, plane, encoded.scale, encoded.offset), exact, max(steps))
        errors = [[a - b for a, b in zip(got, true, strict=True)] for got, true in zip(exact, original, strict=True)]
        kappa, epsilon, spectral = numbers[level * 3 : level * 3 + 3]
        radius = max(radius, *(squares(row) for row in exact))
        exact_enough = all(step > 0 or error == 0 for row in errors for step, error in zip(steps, row, strict=True))
        if not exact_enough:
            assert not any(np.isfinite(number) for number in (kappa, epsilon, spectral)), "a multiple of step 0 covers nothing"
            continue
        relative = [[e / s if s > 0 else Fraction(0) for e, s in zip(row, steps, strict=True)] for row in errors]
        assert above(kappa, max(r * r for row in relative for r in row))
        assert above(epsilon, max(squares(row) for row in relative))
        assert above(spectral, spectral_at_least(relative))
    assert above(numbers[-1], radius)


def check_lengths(made: EncodedBlocks, exact: list[list[Fraction]]) -> None:
    """Squared norms of the values as level 0 reads them: at least those, and at most a 65535th of the radius's square more."""
    assert made.lengths is not None and made.lengths.dtype == torch.int16
    most = Fraction(float(made.numbers[-1])) ** 2
    for code, row in zip(made.lengths.tolist(), exact, strict=True):
        stored = (code % 2**16) * most / codecs.LENGTHS
        assert squares(row) <= stored <= squares(row) + most * Fraction(1001, 1000 * codecs.LENGTHS)
    read = codecs.read_lengths(made.lengths, made.numbers[-1])
    assert bool((read >= torch.tensor([float(squares(row)) for row in exact], dtype=torch.float64) * (1 - 2.0**-50)).all())


def check_values(x: Tensor, codec: ValueCodec) -> None:
    """Every number stored of a value block against rationals, without slack; the mean square within its tolerance."""
    channels = x.shape[1]
    encoded = codec.encode(x)
    assert encoded.scale.dtype == encoded.offset.dtype == torch.float16
    numbers = encoded.numbers.double().tolist()
    original = exact_rows(x)
    steps = [sum((Fraction(s) ** 2 for s in row), Fraction(0)) for row in encoded.scale.double().tolist()]
    for square, step in zip(steps, token_steps(encoded.scale).double().tolist(), strict=True):
        assert square <= Fraction(step) ** 2 <= square * Fraction(1001, 1000)
    radius = max(squares(row) for row in original)
    for level in range(codec.levels):
        exact = decoded_exactly(codec, encoded, level, channels)
        plane = encoded.plane if level else None
        decoded = codec.decode(encoded.codes, plane, encoded.scale, encoded.offset, channels)
        check_floats(decoded, exact, Fraction(0))
        if level == 0 and np.isfinite(numbers[-1]):
            check_lengths(encoded, exact)
        errors = [[a - b for a, b in zip(got, true, strict=True)] for got, true in zip(exact, original, strict=True)]
        eta, spectral, rms = numbers[level * 3 : level * 3 + 3]
        radius = max(radius, *(squares(row) for row in exact))
        if any(step == 0 and any(row) for step, row in zip(steps, errors, strict=True)):
            assert not any(np.isfinite(number) for number in (eta, spectral)), "a multiple of step 0 covers nothing"
            continue
        shares = [squares(row) / step if step > 0 else Fraction(0) for step, row in zip(steps, errors, strict=True)]
        assert above(eta, max(shares))
        # NaN is "not certified"; it may only come of norms that float32 cannot hold.
        assert (eta == float("inf") and np.isnan(spectral)) or above(spectral, spectral_at_least(errors, steps))
        mean = float(sum(shares)) / len(errors)
        if np.isfinite(mean) and mean**0.5 < 1e38:
            assert rms == pytest.approx(mean**0.5, rel=1e-4, abs=1e-37)
    assert above(numbers[-1], radius)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_numbers_bound_what_decode_yields(kind: str, dtype: torch.dtype) -> None:
    for seed, (channels, refine) in enumerate([(5, True), (8, False), (16, True)]):
        check_keys(block_of(kind, dtype, 16, channels, seed), refine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_numbers_bound_what_decode_yields(kind: str, dtype: torch.dtype) -> None:
    formats = [(4, 0, True), (4, 3, True), (4, 32, False), (8, 0, True), (8, 4, False), (4, 8, True)]
    for seed, (bits, group, refine) in enumerate(formats):
        check_values(block_of(kind, dtype, 16, 10, seed), ValueCodec(bits, group, refine))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_step_is_negative(kind: str, dtype: torch.dtype) -> None:
    """Sums of |q| * step bound score errors only if no step can make them smaller."""
    x = block_of(kind, dtype, 16, 8, 0)
    assert bool((KeyCodec(True).encode(x).scale >= 0).all())
    assert bool((ValueCodec(4, 0, True).encode(x).scale >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_belong_to_the_stored_grid(dtype: torch.dtype) -> None:
    """Codes were computed against the rounded scale and offset: each original is within half a step of its grid point."""
    for seed in range(4):
        x = block_of("normal", dtype, 32, 12, seed)
        encoded = KeyCodec(True).encode(x)
        step = encoded.scale.double()
        fine = KeyCodec(True).decode(encoded.codes, encoded.plane, encoded.scale, encoded.offset).double()
        coarse = KeyCodec(True).decode(encoded.codes, None, encoded.scale, encoded.offset).double()
        rounding = 2.0**-22 * (1 + x.double().abs())
        assert bool(((fine - x.double()).abs() <= step / 32 + rounding).all())
        assert bool(((coarse - x.double()).abs() <= step * 0.5 + rounding).all())
        kappa = encoded.numbers.double()
        assert 0.4 < kappa[0] <= 0.5001 and 0.02 < kappa[3] <= 1 / 32 + 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_refinement_is_nested(bits: int) -> None:
    x = torch.randn(32, 32)
    codec = ValueCodec(bits, 0, True)
    encoded = codec.encode(x)
    plain = ValueCodec(4, 0, False).encode(x)
    assert torch.equal(encoded.scale, plain.scale)
    fine = codec.decode(encoded.codes, encoded.plane, encoded.scale, encoded.offset, 32)
    assert bool(((fine - x).abs() <= encoded.scale.float() / 32 + 1e-6).all())
    if bits == 4:
        assert torch.equal(encoded.codes, plain.codes)
        assert float(encoded.numbers[3]) < float(encoded.numbers[0]) / 10
    else:
        assert float(encoded.numbers[0]) < float(plain.numbers[0]) / 10


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_never_measures_finite(what: float, dtype: torch.dtype) -> None:
    x = torch.randn(16, 8)
    x[3, 2] = what
    encoded = KeyCodec(True).encode(x.to(dtype))
    assert not bool(torch.isfinite(encoded.numbers).any())
    for bits in (4, 8):
        numbers = ValueCodec(bits, 4, True).encode(x.to(dtype)).numbers
        bounds = [i for i in range(len(numbers)) if i % 3 != 2 or i == len(numbers) - 1]  # the mean square is an estimate
        assert not bool(torch.isfinite(numbers[bounds]).any())


def test_a_constant_channel_is_exact_or_infinite() -> None:
    exact = torch.full((16, 4), 0.25)
    encoded = KeyCodec(False).encode(exact)
    assert bool((encoded.scale == 0).all()) and bool((encoded.numbers[:3] == 0).all())
    below = KeyCodec(False).encode(torch.full((16, 4), -70000.0))
    assert not bool(torch.isfinite(below.numbers[:3]).any())
    mixed = torch.full((16, 4), 0.25)
    mixed[:, 1] = 1 / 3  # no float16: its step cannot be 0
    encoded = KeyCodec(False).encode(mixed)
    assert float(encoded.scale[1]) > 0 and bool(torch.isfinite(encoded.numbers).all())


def matrices() -> dict[str, Tensor]:
    """Matrices whose spectral norm is a hard case."""
    torch.manual_seed(0)
    normal, row, column = torch.randn(64, 24), torch.randn(1, 20), torch.randn(16, 1)
    return {
        "random": normal,
        "wide": torch.randn(16, 128),
        "square": torch.randn(64, 64),
        "rank one": column @ row,
        "equal rows": row.expand(64, 20).clone(),
        "identity": torch.eye(16),
        "orthogonal": torch.linalg.qr(torch.randn(32, 32))[0],
        "tiny": normal * 1e-30 * 1e-10,
        "small": normal * 1e-28,
        "huge": normal * 1e30,
        "zero": torch.zeros(16, 8),
        "one row": torch.randn(1, 8),
        "one channel": torch.randn(16, 1),
        "mixed": normal * torch.logspace(-30, 0, 64)[:, None],
        "ones": torch.ones(128, 16),
        "signs": torch.randn(128, 64).sign(),
    }


MATRICES = matrices()


def measured(rows: Tensor) -> tuple[Fraction, Fraction]:
    """The squares of `spectral_bound` and of a lower bound of the true norm."""
    norm = codecs.round_up(torch.linalg.vector_norm(rows.double(), dim=-1)).amax(dim=-1)
    return Fraction(float(codecs.spectral_bound(rows, norm))) ** 2, spectral_at_least(exact_rows(rows))


@pytest.mark.parametrize("name", MATRICES)
def test_spectral_bound_is_above_the_norm(name: str) -> None:
    bound, true = measured(MATRICES[name])
    assert bound >= true
    if name in ("random", "wide", "square"):
        assert bound <= Fraction(169, 100) * true


def test_spectral_bound_of_many() -> None:
    rows = torch.randn(200, 16, 12)
    rows[100:] = torch.randn(100, 16, 1) @ torch.randn(100, 1, 12)
    norm = codecs.round_up(torch.linalg.vector_norm(rows.double(), dim=-1)).amax(dim=-1)
    bound = codecs.spectral_bound(rows, norm)
    true = torch.linalg.matrix_norm(rows.double(), ord=2)
    assert bool((bound.double() >= true).all())


@pytest.mark.parametrize(("squarings", "least", "most"), [(1, 1.12, 1.15), (2, 1.025, 1.04)])
def test_spectral_bound_of_random_residuals(squarings: int, least: float, most: float) -> None:
    """As near to the true norm as docs/certificate.md says."""
    rows = torch.rand(64, 64, 128, generator=torch.Generator().manual_seed(0)) - 0.5
    norm = codecs.round_up(torch.linalg.vector_norm(rows.double(), dim=-1)).amax(dim=-1)
    ratio = codecs.spectral_bound(rows, norm, squarings).double() / torch.linalg.matrix_norm(rows.double(), ord=2)
    assert least < float(ratio.median()) < most


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_spectral_bound_of_what_is_not_finite(what: float) -> None:
    rows = torch.randn(16, 8)
    rows[2, 3] = what
    norm = codecs.round_up(torch.linalg.vector_norm(rows.double(), dim=-1)).amax(dim=-1)
    assert not bool(torch.isfinite(codecs.spectral_bound(rows, norm)))


@contextlib.contextmanager
def lowered(how: str) -> Iterator[None]:
    """A process-wide setting that makes float32 products less exact; restored."""
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("how", ["autocast", "medium"])
@pytest.mark.parametrize("channels", [8, 16, 64, 128])
def test_numbers_do_not_depend_on_what_the_process_has_set(how: str, channels: int) -> None:
    """The precision of the model's products must not reach what is measured: rank one leaves no room for it."""
    for seed in range(10):
        torch.manual_seed(seed)
        column = torch.randn(1, 2, 3, 32, 1) if seed % 2 else torch.ones(1, 2, 3, 32, 1)
        x = column * torch.randn(1, 2, 3, 1, channels)
        made = []
        for context in (contextlib.nullcontext(), lowered(how)):
            store = BlockStore(KeyCodec(True), ValueCodec(4, 0, True), "device")
            with context:
                store.append(x, x)
            made.append([part.numbers for part in store.encoded()])
        assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])
