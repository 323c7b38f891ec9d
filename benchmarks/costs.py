"""What a decode step costs on paper: bytes and vector operations for a token and KV head, counted from the kernel's code.

The shape is that of `benchmarks/candidates.py`: 4 query rows a KV head, 128 channels, blocks of 64 tokens, value groups of 32.
"""

from __future__ import annotations

from hf_certkv.codecs import PER_LEVEL

ROWS, CHANNELS, BLOCK, GROUP, DIGITS = 4, 128, 64, 32, 3
LANES, TILE, STRIP = 16, 4, 4  # floats a vector, tokens a tile of scores, vectors of channels a strip: as in kernels/micro.py
FLOAT, HALF, DOUBLE = 4, 2, 8


def coded_bytes(value_bits: int = 4, key_levels: int = 2) -> dict[str, float]:
    """Bytes of the quantised cache that a step reads, for a token and KV head."""
    groups, value_levels = (CHANNELS // GROUP, 2) if value_bits == 4 else (1, 1)
    numbers = (PER_LEVEL * key_levels + 1) + (PER_LEVEL * value_levels + 1)
    return {
        "key codes": CHANNELS,
        "key steps and offsets, by channel and block": 2 * HALF * CHANNELS / BLOCK,
        "value codes": CHANNELS * value_bits / 8,
        "value steps and offsets, by token and group": 2 * HALF * groups,
        "block numbers": FLOAT * numbers / BLOCK,
        "squared norms of values": HALF,
    }


def scratch_bytes() -> dict[str, float]:
    """Bytes that the pass leaves for the certificate, for a token and KV head. Written once; outputs are read twice."""
    return {
        "outputs of the block, float32": FLOAT * ROWS * CHANNELS / BLOCK,
        "maxima, eight sums, norms, query weights, roundings": FLOAT * (ROWS * (1 + 8 + 3) + 2) / BLOCK,
        "masses, shifts, parts, steps, float64": DOUBLE * 5 * ROWS / BLOCK,
    }


def dense_bytes(width: int) -> float:
    """Bytes of dense keys and values for a token and KV head. Args: width: of a number."""
    return 2.0 * CHANNELS * width


def coded_operations() -> dict[str, float]:
    """Operations on vectors of sixteen floats (loads that convert count once), for a token and KV head, 4-bit values."""
    vectors = CHANNELS / LANES
    strips = vectors / STRIP
    return {
        "keys: load, to float, add the middle, scale": 4 * vectors,
        "keys: load query, steps, offsets, once a tile of four tokens": (ROWS + 2) * vectors / TILE,
        "keys: products, a row each": ROWS * vectors,
        "keys: lanes folded into scores": 3 * (ROWS * TILE - 1) / TILE,
        "values: load, nibble, to float, add the middle, scale": 7 * vectors,
        "values: weights spread over lanes": ROWS * strips,
        "values: products, a row each": ROWS * vectors,
        **_either(),
    }


def _either() -> dict[str, float]:
    """What both ways of reading codes do."""
    return {
        "softmax: maximum, exp, eight sums": (2 + 22 + 10) * ROWS / LANES,
        "values: steps from float16, and their norm": 2 * 2 * (CHANNELS / GROUP) / LANES + 19 / LANES,
    }


def integer_operations() -> dict[str, float]:
    """The same where codes are multiplied as integers: vectors of 64 bytes."""
    chunks, pieces, groups = CHANNELS / (4 * LANES), CHANNELS / 2 / LANES, CHANNELS / GROUP
    return {
        "keys: sixteen tokens loaded, transposed, put down and taken up": chunks * (LANES + 4 * LANES + 2 * LANES) / LANES,
        "keys: products, a row and digit each": chunks * ROWS * DIGITS,
        "keys: scores from sums": 6 * ROWS / LANES,
        "keys: digits of the query, once a block": (10 + 13) * ROWS * (CHANNELS / LANES) / BLOCK,
        "values: four tokens loaded and interleaved, nibbles": pieces * 9 / 4,
        "values: products, a row and digit each": 2 * pieces * ROWS * DIGITS / 4,
        "values: digits of the weights": 9 * ROWS * groups / LANES,
        "values: outputs from sums, once a block": 6 * ROWS * (CHANNELS / LANES) / BLOCK,
        **_either(),
    }


def dense_operations(width: int) -> dict[str, float]:
    """The least that dense attention does: products, and a load with a conversion of each number narrower than float32."""
    vectors = CHANNELS / LANES
    convert = {"load, to float": 2.0 * vectors} if width < FLOAT else {"load": 2.0 * vectors}
    return {**convert, "products, a row each": 2.0 * ROWS * vectors, "softmax: maximum, exp, sum": (2 + 22 + 1) * ROWS / LANES}
