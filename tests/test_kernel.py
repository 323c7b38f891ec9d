"""What the reference kernel says of each block, against float64: masses, mean steps, distances from the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_certkv.codecs import KeyCodec, ValueCodec, token_steps
from hf_certkv.kernels import reference as kernel

BLOCK, CHANNELS, ROWS = 16, 12, 3


def wanted(query: Tensor, keys: Tensor, values: Tensor, steps: Tensor) -> dict[str, Tensor]:
    """The same from tokens `[batch, kv_heads, blocks, block, channels]` in float64; the last block has the exact tokens."""
    scores = (query.double() @ keys.double().flatten(2, 3).mT).unflatten(-1, (-1, BLOCK))
    weights = torch.softmax(scores.flatten(-2), dim=-1).unflatten(-1, (-1, BLOCK))
    output = torch.einsum("bhrnt,bhntd->bhrd", weights, values.double())
    apart = (values.double().unsqueeze(2) - output[:, :, :, None, None]).square().sum(-1)
    mass, square = weights.sum(-1), weights.square().sum(-1)
    stepped = weights * steps.double().unsqueeze(2)
    return {
        "output": output,
        "mass": mass,
        "root_square_mass": square.sqrt(),
        "step": stepped.sum(-1) / mass,
        "root_square_step": (stepped.square().sum(-1) / square).sqrt(),
        "moment": (weights * apart).sum(-1) / mass,
        "square_moment": (weights.square() * apart).sum(-1) / square,
    }


@pytest.mark.parametrize("promoted", [False, True])
def test_what_the_kernel_says_of_each_block(promoted: bool) -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        shape = (2, 2, 5, BLOCK, CHANNELS)
        keys, values = torch.randn(shape, generator=g), torch.randn(shape, generator=g) + seed
        values *= 10.0 ** torch.randn(*shape[:-1], 1, generator=g)
        query = torch.randn(2, 2, ROWS, CHANNELS, generator=g)
        key_codec, value_codec = KeyCodec(True), ValueCodec(4, 4, True)
        coded = key_codec.encode(keys[:, :, :-1]), value_codec.encode(values[:, :, :-1])
        exact = (keys[:, :, -1], values[:, :, -1])
        found = kernel.decode_pass(query, *coded, *exact, None, None, key_codec, value_codec)
        steps = torch.cat([token_steps(coded[1].scale), torch.zeros(2, 2, 1, BLOCK)], dim=2)
        read_keys = key_codec.decode(coded[0].codes, None, coded[0].scale, coded[0].offset)
        read = value_codec.decode(coded[1].codes, None, coded[1].scale, coded[1].offset, CHANNELS)
        read_keys, read = torch.cat([read_keys, exact[0].unsqueeze(2)], dim=2), torch.cat([read, exact[1].unsqueeze(2)], dim=2)
        if promoted:
            index = (torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), torch.tensor([2, 0, 3]))
            kernel.redo_blocks(found, index, query, keys[index], values[index], steps[index], None)
            read_keys[index], read[index] = keys[index], values[index]
        made = kernel.combine(found)
        for name, exactly in wanted(query, read_keys, read, steps).items():
            got, off = getattr(made, name).double(), 1e-4 * exactly.abs() + 1e-5 * values.norm(dim=-1).amax().square()
            assert bool(((got - exactly).abs() <= (off if "moment" in name else 1e-4 * exactly.abs() + 1e-4)).all()), name
