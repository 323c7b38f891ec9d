"""The compiled writer against the codecs: the same codes bit for bit, and numbers that bound what the bytes stand for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
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
from transformers import LlamaConfig

from hf_certkv import CertifiedQuantizedCache, codecs, store
from hf_certkv.checksums import block_checksum
from hf_certkv.codecs import KEY_SPECTRAL, LENGTHS, PER_LEVEL, VALUE_SPECTRAL, EncodedBlocks, KeyCodec, ValueCodec
from hf_certkv.store import PARTS, BlockStore

pytest.importorskip("numba")

from hf_certkv.kernels import compiling, cpu, cpu_write, cpu_write_row, micro_integers

Codec = KeyCodec | ValueCodec
Array = np.ndarray[Any, Any]
WAYS = [False, True] if micro_integers.supported() else [False]  # of the first product: floats, bytes
CODECS: list[Codec] = [KeyCodec(True), KeyCodec(False)]
CODECS += [ValueCodec(bits, group, refine) for bits in (4, 8) for group in (0, 7, 16, 32) for refine in (True, False)]


@compiling.kernel()
def _rounded(x: Array, near: Array, bits: Array, magic: Array, magic_bits: Array, out: Array) -> None:
    cpu_write_row._half_down(x, near, bits, magic, magic_bits, len(x))
    cpu_write_row.half_bits(x, near, bits, out)


@compiling.kernel()
def _spectral(
    rows: Array, tokens: int, channels: int, norm: float, squarings: int, integers: bool,
    narrowed: Array, sums: Array, turned: Array, one: Array, two: Array,
) -> float:  # fmt: skip
    return cpu_write_row.spectral(rows, tokens, channels, norm, squarings, integers, narrowed, sums, turned, one, two)


def compiled(x: Tensor, codec: Codec) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of blocks `[batch, heads, blocks, block, channels]` as the compiled writer leaves them, and which it left out."""
    batch, heads, blocks, tokens, channels = x.shape
    shapes = store.part_shapes(codec, tokens, channels)
    data = {name: torch.full((batch, heads, blocks + 3, *shape), 7).to(dtype) for name, (shape, dtype) in shapes.items()}
    left = cpu_write.write(x, codec, data, 2)
    for part in data.values():
        edges = part[:, :, [0, 1, -1]]
        assert bool((edges == torch.full_like(edges, 7)).all()), "written beyond the blocks' places"
    return {name: part[:, :, 2:-1] for name, part in data.items()}, left


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return x.contiguous().view(-1).view(torch.uint8)


def check(x: Tensor, codec: Codec) -> int:
    """The compiled writer against the codec; returns how many blocks it left out."""
    parts, left = compiled(x, codec)
    made = codec.encode(x)
    for name in ("codes", "plane", "scale", "offset"):
        expected = getattr(made, name)
        assert (expected is None) == (name not in parts)
        if expected is not None:
            assert parts[name].dtype == expected.dtype and parts[name].shape == expected.shape
            assert torch.equal(bits(parts[name][~left]), bits(expected[~left])), name
    if made.lengths is not None:  # squares are added up in another order
        near = (parts["lengths"][~left].int() & LENGTHS) - (made.lengths[~left].int() & LENGTHS)
        assert parts["lengths"].dtype == made.lengths.dtype and int(near.abs().max() if near.numel() else 0) <= 1
    got, expected = parts["numbers"][~left].double(), made.numbers[~left].double()
    assert_near(got, expected, codec)
    return int(left.sum())


def assert_near(got: Tensor, expected: Tensor, codec: Codec) -> None:
    """Numbers of the compiled writer and of the codec: their sums are added up in another order.

    Spectral numbers made with a product of bytes are larger by what the bytes lost, or smaller, being measured otherwise.
    """
    off = torch.full((got.shape[-1],), 1e-5, dtype=torch.float64)
    if cpu.INTEGERS and micro_integers.supported():
        spectral = KEY_SPECTRAL if isinstance(codec, KeyCodec) else VALUE_SPECTRAL
        off[spectral : PER_LEVEL * codec.levels : PER_LEVEL] = 0.1
    assert bool((got <= expected * (1 + off)).all()) and bool((got >= expected * (1 - off)).all())


def stacked(kinds: list[str], dtype: torch.dtype, tokens: int, channels: int) -> Tensor:
    """Two blocks of every regime, `[regimes, 1, 2, tokens, channels]`."""
    made = [[block_of(kind, dtype, tokens, channels, seed) for seed in range(2)] for kind in kinds]
    return torch.stack([torch.stack(blocks) for blocks in made]).unsqueeze(1)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integers", WAYS)
def test_the_same_blocks(codec: Codec, dtype: torch.dtype, integers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "INTEGERS", integers)
    for tokens, channels in [(16, 20), (32, 33), (64, 80), (64, 128), (128, 64), (16, 5)]:
        check(stacked(KINDS, dtype, tokens, channels), codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordinary_blocks_are_not_left_to_the_codec(dtype: torch.dtype) -> None:
    kinds = ["normal", "constant channels", "duplicates", "outlier", "offset", "zeros", "single", "rank one"]
    for codec in CODECS:
        assert check(stacked(kinds, dtype, 32, 24), codec) == 0


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_left_to_the_codec(what: float, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, 16, 20).to(dtype)
    x[0, 1, 2, 5, 19] = what
    for codec in CODECS:
        _, left = compiled(x, codec)
        assert left.nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """As one constant channel each, and many to a block."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    every = torch.cat([every, every[: -len(every) % 2048]])
    for x in (every.view(1, 1, -1, 16, 128), every.view(1, 1, -1, 1, 128).expand(-1, -1, -1, 16, -1)):
        for codec in (KeyCodec(True), ValueCodec(4, 16, True), ValueCodec(8, 0, False)):
            check(x, codec)


def rounded(x: Tensor) -> Tensor:
    """`round_half_down` of the compiled writer, float64, then its bits."""
    numbers, near = x.numpy().copy(), np.empty(len(x), dtype=np.float32)
    magic = np.empty_like(near)
    out = np.empty(len(x), dtype=np.int16)
    _rounded(numbers, near, near.view(np.int32), magic, magic.view(np.int32), out)
    halves = torch.from_numpy(out).view(torch.float16)
    assert torch.equal(halves.double(), torch.from_numpy(numbers))
    return halves


def test_rounding_to_half() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = 10.0 ** (torch.rand(20000, generator=generator, dtype=torch.float64) * 40 - 30)
    random = torch.randn(20000, generator=generator, dtype=torch.float64) * spread
    x = torch.cat([half_neighbours(), random, torch.tensor([1e300, -1e300, 0.0, 5e-324, -5e-324], dtype=torch.float64)])
    assert torch.equal(rounded(x), codecs.round_half_down(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_bound_what_the_bytes_stand_for(kind: str, dtype: torch.dtype) -> None:
    """In rationals, without slack, by the formats' own definition."""
    formats: list[Codec] = [KeyCodec(True), ValueCodec(4, 0, True), ValueCodec(4, 3, True), ValueCodec(8, 4, False)]
    for seed, codec in enumerate(formats):
        for tokens, channels in ((16, 10), (16, 21)):
            x = block_of(kind, dtype, tokens, channels, seed)
            parts, left = compiled(x[None, None, None], codec)
            if not bool(left):
                one = {name: part[0, 0, 0] for name, part in parts.items() if name != "checksum"}
                check_numbers(x, codec, EncodedBlocks(**{"plane": None, **one}))


def check_numbers(x: Tensor, codec: Codec, made: EncodedBlocks) -> None:
    """What is stored of one block against rationals."""
    keyed, numbers = isinstance(codec, KeyCodec), made.numbers.double().tolist()
    original, scale = exact_rows(x), exact_rows(made.scale if made.scale.dim() == 2 else made.scale[None])
    radius = max(squares(row) for row in original)
    for level in range(codec.levels):
        exact = decoded_exactly(codec, made, level, x.shape[1])
        errors = [[a - b for a, b in zip(got, true, strict=True)] for got, true in zip(exact, original, strict=True)]
        radius = max(radius, *(squares(row) for row in exact))
        if not keyed and level == 0:
            check_lengths(made, exact)
        if keyed:
            shares = [[e / s if s > 0 else Fraction(e != 0) * 10**99 for e, s in zip(r, scale[0], strict=True)] for r in errors]
            assert above(numbers[3 * level], max(e * e for row in shares for e in row))
            assert above(numbers[3 * level + 1], max(map(squares, shares)))
            assert above(numbers[3 * level + 2], spectral_at_least(shares))
        else:
            steps = [squares(row) for row in scale]
            ratios = [squares(e) / s if s > 0 else Fraction(any(e)) * 10**99 for e, s in zip(errors, steps, strict=True)]
            assert above(numbers[3 * level], max(ratios))
            assert above(numbers[3 * level + 1], spectral_at_least(errors, steps))
    assert above(numbers[-1], radius)


def test_spectral_numbers_bound_the_norm() -> None:
    """Of what the writer itself calls the residuals, in float64: ranks one to full, rows of one size and of many."""
    generator = torch.Generator().manual_seed(0)
    for tokens, channels in ((64, 128), (128, 64), (16, 33), (32, 5), (6, 9)):
        for rank in (1, 2, min(tokens, channels)):
            left, right = torch.randn(tokens, rank, generator=generator), torch.randn(rank, channels, generator=generator)
            for factor in (1.0, 1e-25, 1e25):
                x = ((left @ right) * factor).float()
                norm = float(codecs.round_up(torch.linalg.vector_norm(x.double(), dim=-1)).amax())
                deep, wide = -(-tokens // 16) * 16, -(-channels // 16) * 16
                rows, turned = np.zeros((deep, wide), np.float32), np.empty(deep * max(wide, 64), np.float32)
                rows[:tokens, :channels] = x.numpy()
                one, two = (np.empty((min(deep, wide),) * 2, dtype=np.float32) for _ in range(2))
                narrowed, sums = np.zeros((deep, -(-wide // 64) * 64), np.int8), np.empty(deep, np.int32)
                for squarings, integers in itertools.product((1, 2), WAYS):
                    given = (rows, tokens, channels, np.float32(norm), squarings, integers, narrowed, sums)
                    bound = float(_spectral(*given, turned, one, two))
                    assert bound >= float(torch.linalg.matrix_norm(x.double(), ord=2))
                    expected = float(codecs.spectral_bound(x, torch.tensor(norm), squarings))
                    assert bound == pytest.approx(expected, rel=0.1 if integers else 1e-5)


FREED = """
import torch
from hf_certkv import codecs, store
from hf_certkv.kernels import cpu_write
x = torch.randn(1, 2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
codec = codecs.KeyCodec(True)
shapes = store.part_shapes(codec, 64, 128)
data = {name: torch.zeros((1, 2, 3, *shape)).to(dtype) for name, (shape, dtype) in shapes.items()}
assert not bool(cpu_write.write(x, codec, data, 0).any())
print(data["numbers"].double().sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
def test_nothing_is_read_that_was_freed() -> None:
    """Memory that is overwritten once it is free, as another thread may do at any time: the same numbers."""
    found = set()
    for perturb in ("0", "1", "165"):
        environment = {**os.environ, "MALLOC_PERTURB_": perturb}
        found.add(subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, env=environment).stdout)
    assert len(found) == 1


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels outside": lambda x: x.mT.contiguous().mT,
    "a part": lambda x: torch.cat([x, x], dim=2)[:, :, 1:-2],
    "one head for all": lambda x: x[:, :1].expand(-1, 3, -1, -1, -1),
    "every other token": lambda x: x[..., ::2, :],
}


def test_originals_whose_bits_are_not_their_numbers() -> None:
    """The imaginary part of a conjugate is a view that torch negates as it is read."""
    z = torch.randn(1, 2, 300, 32, 2, generator=torch.Generator().manual_seed(0))
    lazy, plain = torch.view_as_complex(z).conj().imag, -z[..., 1]
    assert lazy.is_neg() and torch.equal(lazy, plain)
    made = []
    for x in (lazy, plain):
        cache = CertifiedQuantizedCache(LlamaConfig(num_hidden_layers=1))
        cache.update(x, x, 0)
        cache.update(x[:, :, :70], x[:, :, :70], 0)
        layer = cache.certified_layers[0]
        made.append((layer.materialise(0), layer.store.keys["codes"].view.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_originals_may_lie_in_any_way(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 2, 3, 32, 24))
    for codec in CODECS:
        assert check(x, codec) == 0


@pytest.mark.parametrize("channels", [5, 20, 33, 64])
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_checksums_are_those_of_the_other_way(codec: Codec, channels: int) -> None:
    parts, _ = compiled(torch.randn(2, 2, 3, 16, channels), codec)
    whole = {name: part.contiguous() for name, part in parts.items()}
    sums = torch.zeros(2, 2, 3, dtype=torch.int64)
    cpu_write.sign([whole.get(name) for name in PARTS], sums, 0, 3)
    assert torch.equal(sums, block_checksum([whole.get(name) for name in PARTS], 3, sums.device))


def stores(x: list[Tensor], monkeypatch: pytest.MonkeyPatch, refine: str = "device") -> list[BlockStore]:
    """The same blocks appended one part after another: by the compiled writer, and by the codecs."""
    made = []
    for way in (True, False):
        monkeypatch.setattr(store, "COMPILED", way)
        made.append(BlockStore(KeyCodec(refine != "off"), ValueCodec(4, 32, refine != "off"), refine))
        for part in x:
            made[-1].append(part, part)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("refine", ["device", "host", "off"])
def test_stores_hold_the_same(refine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.randn(2, 2, count, 16, 40) for count in (3, 1, 1, 5)]
    x[1][0, 1, 0, 3, 4] = torch.nan
    x[3][1, 0, 4] = -1e9
    fast, slow = stores(x, monkeypatch, refine)
    rows, heads, blocks = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(10)).unbind(1)
    for buffers, others in ((fast.keys, slow.keys), (fast.values, slow.values)):
        for name in PARTS:
            if buffers[name].data is None:
                assert others[name].data is None
            elif name == "lengths":
                near = (buffers[name].view.int() & LENGTHS) - (others[name].view.int() & LENGTHS)
                assert int(near.abs().max()) <= 1
            elif name == "numbers":
                finite = torch.isfinite(others[name].view)
                assert torch.equal(finite, torch.isfinite(buffers[name].view))
                got, expected = (torch.where(finite, part[name].view.double(), 0.0) for part in (buffers, others))
                assert_near(got, expected, fast.key_codec if buffers is fast.keys else fast.value_codec)
            else:
                assert torch.equal(bits(buffers[name].view), bits(others[name].view)), name
    assert not bool(fast.damaged((rows, heads, blocks)).any())
    whole = torch.cat(x, dim=2)
    before = [fast.keys["checksum"].view.clone(), fast.values["checksum"].view.clone()]
    fast.keys["codes"].view[1, 1, 4, 2, 3] ^= 1
    assert int(fast.damaged((rows, heads, blocks)).sum()) == 1
    fast.rewrite((rows, heads, blocks), whole[rows, heads, blocks], whole[rows, heads, blocks])
    assert not bool(fast.damaged((rows, heads, blocks)).any())
    assert torch.equal(before[0], fast.keys["checksum"].view) and torch.equal(before[1], fast.values["checksum"].view)


def test_a_block_does_not_depend_on_its_neighbours_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 7, 32, 48)
    made = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        made.append(compiled(x, KeyCodec(True))[0])
    single = [compiled(x[:, :, n : n + 1], KeyCodec(True))[0] for n in range(7)]
    for name in ("codes", "plane", "scale", "offset", "numbers"):
        joined = torch.cat([part[name] for part in single], dim=2)
        assert all(torch.equal(joined, other[name]) for other in made), name


def test_two_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.randn(1, 2, 4, 32, 64) for _ in range(4)]
    expected = [compiled(part, ValueCodec(4, 32, True))[0]["numbers"] for part in x]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found: list[bool] = []

    def work(place: int) -> None:
        for _ in range(20):
            found.append(torch.equal(compiled(x[place], ValueCodec(4, 32, True))[0]["numbers"], expected[place]))

    callers = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 80 and all(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 4, 32, 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # torch's own threads do not survive a fork
    expected = compiled(x, KeyCodec(True))[0]["numbers"]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(compiled(x, KeyCodec(True))[0]["numbers"], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_at_all() -> None:
    for shape in ((0, 2, 3, 16, 8), (1, 2, 0, 16, 8)):
        assert compiled(torch.randn(shape), KeyCodec(True))[1].shape == shape[:3]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_any_mode(mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        x = torch.randn(1, 2, 3, 16, 24)
        made = BlockStore(KeyCodec(True), ValueCodec(4, 32, True), "device")
        made.append(x, x)
    made.append(x.clone(), x.clone())
    assert not bool(made.damaged((torch.tensor([0]), torch.tensor([1]), torch.tensor([4]))).any())


def test_without_numba_the_codecs_write(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.compiled_writer(torch.zeros(1)) is cpu_write
    assert store.compiled_writer(torch.zeros(1, dtype=torch.float64)) is None
    monkeypatch.setattr(cpu, "installed", lambda: False)
    assert store.compiled_writer(torch.zeros(1)) is None


def test_one_line_when_something_is_compiled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_announced", False)
    compiled(torch.randn(1, 1, 1, 16, 8), KeyCodec(True))
    capsys.readouterr()
    assert compiling.is_kept(cpu_write._write)
    compiling.announce(cpu_write._write)
    assert capsys.readouterr().err == ""
    new = type("Other", (), {"signatures": ()})()
    assert not compiling.is_kept(new)
    compiling.announce(new)
    compiling.announce(new)
    assert capsys.readouterr().err.count("\n") == 1


def test_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    real = numba.njit

    def refusing(**options: object) -> object:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", refusing)
    assert compiling.kernel()(lambda x: x + 1)(1) == 2


def test_what_is_on_disk_belongs_to_these_sources() -> None:
    """A kernel's name in the cache has a digest of all kernels and of the codecs in it."""
    assert cpu_write._write.py_func.__qualname__.endswith(compiling.version())
    assert compiling.version() in cpu_write._write._cache._cache_file._index_name


def test_inner_functions_are_no_machine_code() -> None:
    """They are linked into the kernel, which alone is run."""
    inner = compiling.part(lambda x: x * 3 + 1)
    outer = compiling.kernel()(lambda x: inner(x) + 1)
    assert outer(5) == 17
    library = next(iter(inner.overloads.values())).library
    assert type(library).__name__ == "Linked"
    name = next(iter(inner.overloads.values())).fndesc.mangled_name
    assert library.get_pointer_to_function(name) == 0
    alone = compiling.kernel()(lambda x: x * 3 + 1)
    assert alone(5) == 16
    found = next(iter(alone.overloads.values()))
    assert found.library.get_pointer_to_function(found.fndesc.mangled_name) != 0


def test_nothing_is_compiled_where_numba_is_told_not_to() -> None:
    code = (
        "import torch; from hf_certkv import CertifiedQuantizedCache as Cache; from hf_certkv.bench.model import model_config\n"
        "x = torch.randn(1, 8, 300, 128); cache = Cache(model_config(128, layers=1)); held = cache.update(x, x, 0)\n"
        "held = cache.update(x[:, :, :1], x[:, :, :1], 0)\n"
        "torch.nn.functional.scaled_dot_product_attention(torch.randn(1, 32, 1, 128), *held, enable_gqa=True)\n"
        "assert set(cache.report().to_dict()['overall']['kernels']) <= {'reference', 'none'}, cache.report()"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_imported_only_when_it_is_needed() -> None:
    code = "import sys, hf_certkv; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
