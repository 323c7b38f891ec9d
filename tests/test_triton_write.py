"""The Triton writer against the codecs: the same codes bit for bit, and numbers that bound what the bytes stand for.

In Triton's interpreter where there is no GPU: a small block takes a tenth of a second there, so there are few.
"""

from __future__ import annotations

import where  # isort: skip  # before anything imports triton
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import pytest
import quick_interpreter
import torch
from test_codecs import (
    DTYPES,
    KINDS,
    above,
    block_of,
    check_lengths,
    decoded_exactly,
    exact_rows,
    half_neighbours,
    spectral_at_least,
    squares,
)
from torch import Tensor

from hf_certkv import codecs, store
from hf_certkv.checksums import block_checksum
from hf_certkv.codecs import LENGTHS, EncodedBlocks, KeyCodec, ValueCodec
from hf_certkv.store import PARTS, BlockStore

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from hf_certkv.kernels import triton_common, triton_write, triton_write_parts  # noqa: E402

pytestmark = [
    pytest.mark.skipif(where.DEVICE == "cpu" and not triton_common.interpreted(), reason="no GPU, and not interpreted"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
quick_interpreter.install()
Codec = KeyCodec | ValueCodec
CODECS: list[Codec] = [KeyCodec(True), KeyCodec(False)]
CODECS += [ValueCodec(4, group, refine) for group, refine in ((0, True), (7, True), (16, False), (32, True))]
CODECS += [ValueCodec(8, group, False) for group in (0, 5, 32)]
NEAR = 1e-4  # spectral numbers: another order of products, squared twice; what is promised is 1e-3


def on_device(x: Tensor) -> Tensor:
    return x.to(where.DEVICE)


def written(x: Tensor, codec: Codec) -> dict[str, Tensor]:
    """Parts of blocks `[batch, heads, blocks, block, channels]` as the writer leaves them, on the CPU."""
    batch, heads, blocks, tokens, channels = x.shape
    shapes = store.part_shapes(codec, tokens, channels)
    data = {name: torch.full((batch, heads, blocks + 3, *shape), 7).to(dtype) for name, (shape, dtype) in shapes.items()}
    data = {name: on_device(part) for name, part in data.items()}
    triton_write.write(x, codec, data, 2, 2)
    made = {}
    for name, part in data.items():
        edges = part[:, :, [0, 1, -1]]
        assert bool((edges == torch.full_like(edges, 7)).all()), "written beyond the blocks' places"
        made[name] = part[:, :, 2:-1].cpu()
    return made


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor; every NaN has the same."""
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    return x.contiguous().view(-1).view(torch.uint8)


def check(x: Tensor, codec: Codec) -> None:
    """The writer against the codec, on the CPU."""
    parts, made = written(x, codec), codec.encode(x.cpu())
    for name in ("codes", "plane", "scale", "offset"):
        expected = getattr(made, name)
        assert (expected is None) == (name not in parts)
        if expected is not None:
            assert parts[name].dtype == expected.dtype and parts[name].shape == expected.shape
            assert torch.equal(bits(parts[name]), bits(expected)), name
    if made.lengths is not None:  # squares are added up in another order: a code may differ where it is that near to a step
        near = ((parts["lengths"].int() & LENGTHS) - (made.lengths.int() & LENGTHS)).abs()
        assert int(near.max()) <= 1 and float(near.double().mean()) < 0.01
    got, expected = parts["numbers"].double(), made.numbers.double()
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(got))
    got, expected = torch.where(finite, got, 0.0), torch.where(finite, expected, 0.0)
    off = torch.full((got.shape[-1],), 1e-6, dtype=torch.float64)
    off[codecs.KEY_SPECTRAL if isinstance(codec, KeyCodec) else codecs.VALUE_SPECTRAL : 3 * codec.levels : 3] = NEAR
    assert bool(((got - expected).abs() <= off * expected).all())


def stacked(kinds: list[str], dtype: torch.dtype, tokens: int, channels: int, seed: int = 0) -> Tensor:
    """A block of every regime, `[regimes, 1, 1, tokens, channels]`."""
    return on_device(torch.stack([block_of(kind, dtype, tokens, channels, seed) for kind in kinds])[:, None, None])


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_the_same_blocks(codec: Codec, turn: int) -> None:
    shape = [(16, 20), (32, 33), (32, 16), (16, 5)][(turn + CODECS.index(codec)) % 4]
    check(stacked(KINDS[turn::3], DTYPES[(turn + CODECS.index(codec)) % 3], *shape), codec)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_keys_of_every_kind_and_dtype(kind: str) -> None:
    for dtype in DTYPES:
        check(stacked([kind], dtype, 16, 24, seed=1), KeyCodec(True))


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 80), (128, 128), (16, 260)], ids=str)
def test_the_same_large_blocks(shape: tuple[int, int]) -> None:
    for codec in (KeyCodec(True), ValueCodec(4, 32, True)):
        check(stacked(["normal"], torch.bfloat16, *shape), codec)


@pytest.mark.parametrize(("group", "channels"), [(1, 20), (3, 40), (24, 40), (40, 65), (48, 64), (63, 64), (64, 65), (100, 65)])
def test_any_group_of_values(group: int, channels: int) -> None:
    check(stacked(["normal"], torch.float32, 16, channels), ValueCodec(4, group, True))
    check(stacked(["outlier"], torch.float32, 32, 16), ValueCodec(4, group, True))


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_ends_in_numbers_that_are_not(what: float) -> None:
    for codec, dtype in zip((KeyCodec(True), ValueCodec(4, 16, True), ValueCodec(8, 0, False)), DTYPES, strict=True):
        x = torch.randn(3, 1, 1, 16, 20).to(dtype)
        x[0, 0, 0, 5, 19] = x[1, 0, 0, 0, 0] = what
        x[2] = -what
        check(on_device(x), codec)
        assert not bool(torch.isfinite(codec.encode(x).numbers).all(dim=-1).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_numbers_of_every_size(dtype: torch.dtype) -> None:
    """Side by side, and as a constant channel each."""
    every = torch.arange(-(2**15), 2**15, 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)][:4096]
    codec = KeyCodec(True) if dtype == torch.bfloat16 else ValueCodec(8, 32, False)
    check(on_device(every.view(1, 1, -1, 32, 128)), codec)
    check(on_device(every[::32].view(1, 1, 1, 1, -1).expand(-1, -1, -1, 16, -1)), codec)


@triton.jit
def _rounded(x, out, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    tl.store(out + place, triton_write_parts._half_down(tl.load(x + place)))


def test_rounding_to_half() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = 10.0 ** (torch.rand(20000, generator=generator, dtype=torch.float64) * 40 - 30)
    random = torch.randn(20000, generator=generator, dtype=torch.float64) * spread
    special = torch.tensor([1e300, -1e300, 0.0, 5e-324, -5e-324, torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    x = torch.cat([half_neighbours(), random, special])
    x = on_device(torch.cat([x, x[: -len(x) % 4096]]))
    out = torch.empty_like(x)
    _rounded[(len(x) // 4096,)](x, out, WIDE=4096, enable_fp_fusion=False)
    assert torch.equal(bits(out.cpu()), bits(codecs.round_half_down(x.cpu()).double()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_bound_what_the_bytes_stand_for(kind: str, dtype: torch.dtype) -> None:
    """In rationals, without slack, by the formats' own definition."""
    turn = DTYPES.index(dtype) + KINDS.index(kind)
    values = [ValueCodec(4, 0, True), ValueCodec(4, 3, True), ValueCodec(8, 4, False)][turn % 3]
    for seed, codec in enumerate((KeyCodec(True), values)):
        x = block_of(kind, dtype, 16, (10, 21)[turn % 2], seed)
        parts = {name: part[0, 0, 0] for name, part in written(on_device(x)[None, None, None], codec).items()}
        parts.pop("checksum")
        check_numbers(x, codec, EncodedBlocks(**{"plane": None, **parts}))


def check_numbers(x: Tensor, codec: Codec, made: EncodedBlocks) -> None:
    """What is stored of one block against rationals. A number that is not finite bounds everything."""
    keyed, numbers = isinstance(codec, KeyCodec), made.numbers.double().nan_to_num(torch.inf, torch.inf).tolist()
    original, scale = exact_rows(x), exact_rows(made.scale if made.scale.dim() == 2 else made.scale[None])
    radius = max(squares(row) for row in original)
    for level in range(codec.levels):
        exact = decoded_exactly(codec, made, level, x.shape[1])
        errors = [[a - b for a, b in zip(got, true, strict=True)] for got, true in zip(exact, original, strict=True)]
        radius = max(radius, *(squares(row) for row in exact))
        if not keyed and level == 0 and numbers[-1] < torch.inf:
            check_lengths(made, exact)
        if keyed:
            shares = [[e / s if s > 0 else Fraction(e != 0) * 10**99 for e, s in zip(r, scale[0], strict=True)] for r in errors]
            true = [max(e * e for row in shares for e in row), max(map(squares, shares)), spectral_at_least(shares)]
        else:
            steps = [squares(row) for row in scale]
            ratios = [squares(e) / s if s > 0 else Fraction(any(e)) * 10**99 for e, s in zip(errors, steps, strict=True)]
            true = [max(ratios), spectral_at_least(errors, steps)]
        assert all([above(number, least) for number, least in zip(numbers[3 * level :], true, strict=False)])
    assert above(numbers[-1], radius)


LARGE: list[tuple[Codec, int, int]] = [(KeyCodec(True), 64, 128), (KeyCodec(True), 64, 32)]
LARGE += [(ValueCodec(4, 48, True), 64, 80), (ValueCodec(8, 0, True), 32, 64)]


@pytest.mark.parametrize(("codec", "tokens", "channels"), LARGE, ids=str)
def test_numbers_of_large_blocks_bound_them_in_float64(codec: Codec, tokens: int, channels: int) -> None:
    """By singular values, without slack: what the bounds leave is more than float64 loses."""
    x = stacked(["normal", "rank one"], torch.float16, tokens, channels)
    parts = written(x, codec)
    for i in range(len(x)):
        check_floats(x[i].cpu().double(), codec, {name: part[i] for name, part in parts.items()})


def check_floats(x: Tensor, codec: Codec, one: dict[str, Tensor]) -> None:
    """Numbers of blocks `[heads, blocks, block, channels]`, which are finite."""
    channels, numbers = x.shape[-1], one["numbers"].double()
    assert bool(torch.isfinite(numbers).all())
    scale, offset = one["scale"].double(), one["offset"].double()
    if isinstance(codec, KeyCodec):
        codes, scale, offset = one["codes"], scale[..., None, :], offset[..., None, :]
        unit = scale
    else:
        codes = one["codes"] if codec.bits == 8 else codecs.unpack_nibbles(one["codes"], channels)
        unit = torch.linalg.vector_norm(scale, dim=-1, keepdim=True)
        size = codec.group_size(channels)
        scale, offset = (part.repeat_interleave(size, dim=-1)[..., :channels] for part in (scale, offset))
    eight = isinstance(codec, ValueCodec) and codec.bits == 8
    for level in range(codec.levels):
        place = codes.double() / 16 if eight else codes.double() + 7.5 / 16
        if level == 1:
            place = codes.double() + codecs.unpack_nibbles(one["plane"], channels).double() / 16
        read = offset + scale * place
        share = torch.where(unit > 0, (read - x) / torch.where(unit > 0, unit, 1.0), read - x)
        assert bool((numbers[..., -1] >= torch.linalg.vector_norm(read, dim=-1).amax(dim=-1)).all())
        norms = torch.linalg.vector_norm(share, dim=-1).amax(dim=-1)
        found = [norms, torch.linalg.matrix_norm(share, ord=2)]
        if isinstance(codec, KeyCodec):
            found = [share.abs().amax(dim=(-1, -2)), *found]
        for i, true in enumerate(found):
            assert bool((numbers[..., 3 * level + i] >= true).all())
    assert bool((numbers[..., -1] >= torch.linalg.vector_norm(x, dim=-1).amax(dim=-1)).all())


@triton.jit
def _bounds(rows, norms, out, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
            SQUARINGS: tl.constexpr, GRAM: tl.constexpr, AGAIN: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    t, c = tl.arange(0, T), tl.arange(0, C)
    inside = (t < TOKENS)[:, None] & (c < CHANNELS)[None, :]
    x = tl.load(rows + t[:, None] * CHANNELS + c[None, :], mask=inside, other=0.0)
    norm = tl.load(norms)
    power = triton_write_parts.scale_down(norm)
    x = (x.to(tl.float64) * power).to(tl.float32)
    if TOKENS <= CHANNELS:
        gram = tl.dot(x, tl.trans(x), input_precision="ieee")
    else:
        gram = tl.dot(tl.trans(x), x, input_precision="ieee")
    rank: tl.constexpr = min(TOKENS, CHANNELS)
    tl.store(out, triton_write_parts.spectral(gram, norm, power, SQUARINGS, TOKENS, rank, N, 16, GRAM, AGAIN))


def test_spectral_numbers_bound_the_norm() -> None:
    """Ranks one to full, rows of one size and of many: against float64, and equal to the codec's."""
    generator = torch.Generator().manual_seed(0)
    for tokens, channels in ((64, 128), (128, 64), (16, 33), (32, 5), (6, 9)):
        for rank in (1, 2, min(tokens, channels)):
            left, right = torch.randn(tokens, rank, generator=generator), torch.randn(rank, channels, generator=generator)
            for factor in (1.0, 1e-25, 1e25, 1e-33)[: 4 if rank == 2 else 1]:
                x = ((left @ right) * factor).float()
                norm = codecs.round_up(torch.linalg.vector_norm(x.double(), dim=-1)).amax()
                sizes = [max(16, triton_common.power_of_two(n)) for n in (tokens, channels, min(tokens, channels))]
                roundings = codecs.gram_rounding(1.0, max(tokens, channels)), codecs.product_rounding(min(tokens, channels))
                for squarings in (1, 2):
                    out = on_device(torch.zeros(1))
                    given = (on_device(x), on_device(norm[None]), out, tokens, channels, *sizes, squarings, *roundings)
                    _bounds[(1,)](*given, enable_fp_fusion=False)
                    bound = float(out)
                    assert bound >= float(torch.linalg.matrix_norm(x.double(), ord=2))
                    assert bound == pytest.approx(float(codecs.spectral_bound(x, norm, squarings)), rel=1e-5)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels outside": lambda x: x.mT.contiguous().mT,
    "a part": lambda x: torch.cat([x, x], dim=2)[:, :, 1:-2],
    "one head for all": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
    "every other token": lambda x: x[..., ::2, :],
    "backwards": lambda x: torch.imag(torch.complex(x, x).conj()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_originals_may_lie_in_any_way(layout: str) -> None:
    x = LAYOUTS[layout](on_device(torch.randn(2, 1, 2, 32, 24)))
    check(x, KeyCodec(False))
    check(x[:1], ValueCodec(4, 8, False))
    if layout != "backwards":  # there are no complex numbers of bfloat16
        check(LAYOUTS[layout](on_device(torch.randn(1, 2, 2, 32, 24).bfloat16())), KeyCodec(False))


def test_what_fits() -> None:
    assert triton_write.fits(torch.zeros(1, 1, 1, 128, 512))
    assert not triton_write.fits(torch.zeros(1, 1, 1, 256, 64)) and not triton_write.fits(torch.zeros(1, 1, 1, 16, 513))
    assert not triton_write.fits(torch.zeros(1, 1, 1, 16, 16, dtype=torch.float64))


def test_nothing_at_all() -> None:
    for shape in ((0, 2, 3, 16, 8), (1, 2, 0, 16, 8)):
        written(on_device(torch.randn(shape)), KeyCodec(True))


@pytest.mark.parametrize("at_once", [1, 700, 2**24])
def test_checksums_are_those_of_the_other_way(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_write, "SIGNED_AT_ONCE", at_once)
    for codec in CODECS:
        parts = codec.encode(torch.randn(2, 2, 3, 16, 20))
        given = [getattr(parts, name) for name in PARTS]
        sums = torch.zeros(2, 2, 6, dtype=torch.int64)[:, :, 1:4]
        triton_write.sign(given, sums)
        assert torch.equal(sums, block_checksum(given, 3, sums.device))


def stores(x: list[Tensor], refine: str, monkeypatch: pytest.MonkeyPatch) -> list[BlockStore]:
    """The same blocks appended one part after another: by the Triton writer, and by the codecs."""
    made = []
    for way in ("triton", "codec"):
        monkeypatch.setattr(store, "WRITER", way)
        made.append(BlockStore(KeyCodec(refine != "off"), ValueCodec(4, 32, refine != "off"), refine))
        for part in x:
            made[-1].append(part, part)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize(("refine", "staged"), [("device", False), ("host", False), ("host", True), ("off", False)])
def test_stores_hold_the_same(refine: str, staged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [on_device(torch.randn(1, 1, count, 16, 40)) for count in (1, 2)]
    x[1][0, 0, 0, 3, 4] = torch.nan
    x[1][0, 0, 1] = -1e9
    with monkeypatch.context() as patch:
        if staged:  # as if planes lay elsewhere
            patch.setattr(triton_write, "_elsewhere", lambda plane, x: True)
        fast, slow = stores(x, refine, patch)
    for buffers, others in ((fast.keys, slow.keys), (fast.values, slow.values)):
        for name in PARTS:
            got, expected = (part[name].view if part[name].data is not None else None for part in (buffers, others))
            assert (got is None) == (expected is None)
            if got is None or expected is None:
                continue
            assert got.device == expected.device and got.shape == expected.shape
            if name == "lengths":
                assert int(((got.int() & LENGTHS) - (expected.int() & LENGTHS)).abs().max()) <= 1
            elif name == "numbers":
                assert torch.equal(torch.isfinite(got), torch.isfinite(expected))
                assert torch.allclose(got.nan_to_num(0, 0), expected.nan_to_num(0, 0), rtol=1e-3, atol=0)
            else:
                assert torch.equal(bits(got.cpu()), bits(expected.cpu())), name
    index = tuple(torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(3)).to(where.DEVICE).unbind(1))
    assert not bool(fast.damaged(index).any())
    whole = torch.cat(x, dim=2)
    before = [part["checksum"].view.clone() for part in (fast.keys, fast.values)]
    fast.keys["codes"].view[0, 0, 2, 2, 3] ^= 1
    assert int(fast.damaged(index).sum()) == 1
    monkeypatch.setattr(store, "WRITER", "triton")
    fast.rewrite(index, whole[index], whole[index])
    assert not bool(fast.damaged(index).any())
    assert all([torch.equal(a, b["checksum"].view) for a, b in zip(before, (fast.keys, fast.values), strict=True)])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_any_mode(mode: Callable[[], torch.no_grad], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "WRITER", "triton")
    with mode():
        x = on_device(torch.randn(1, 1, 1, 16, 24)).requires_grad_(mode is torch.enable_grad)
        made = BlockStore(KeyCodec(True), ValueCodec(4, 32, True), "device")
        made.append(x, x)
    made.append(x.detach().clone(), x.detach().clone())
    assert not bool(made.damaged(tuple(torch.tensor([i], device=x.device) for i in (0, 0, 1))).any())


def test_which_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, wide = torch.zeros(1, 1, 1, 16, 16), torch.zeros(1, 1, 1, 16, 600)
    assert store.compiled_writer(x) is not triton_write
    monkeypatch.setattr(store, "WRITER", "triton")
    assert store.compiled_writer(x, x) is triton_write
    assert store.compiled_writer(x, wide) is None and store.compiled_writer(x.double()) is None
    monkeypatch.setattr(triton_common, "interpreted", lambda: False)
    assert store.compiled_writer(x) is None
    monkeypatch.setattr(store, "WRITER", "codec")
    assert store.compiled_writer(x) is None
    monkeypatch.setattr(store, "WRITER", "auto")
    assert store.compiled_writer(torch.empty(1, 1, 1, 16, 16, device="meta")) is None


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_certkv.codecs import KeyCodec, ValueCodec
from hf_certkv.kernels import triton_write
POINTERS = {"x": "*i16", "codes": "*u8", "plane": "*u8", "scale": "*fp16", "offset": "*fp16", "lengths": "*i16"}
names = triton_write._write.arg_names
for codec, target in ((KeyCodec(True), 80), (ValueCodec(4, 32, True), 90)):
    fixed = triton_write.layout(codec, 16, 32)
    signature = {name: "constexpr" if name in fixed else {**POINTERS, "numbers": "*fp32"}.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=triton_write._write, signature=signature, constexprs=constants)
    options = {"num_warps": triton_write.warps(16), "enable_fp_fusion": False}
    print(triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles there")
def test_it_compiles_without_a_gpu() -> None:
    """And all is rounded as it is written: no contraction, no flushing to zero, no short product, no quick root."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".visible .entry") == 2
    for never in (r"fma\.\w+\.f64", r"\.ftz", r"mma\.", r"\.approx", r"div\.full", "tf32"):
        assert re.search(never, done.stdout) is None, never
