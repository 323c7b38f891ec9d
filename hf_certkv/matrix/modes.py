"""The ways to generate, each with any cache: `certkv matrix` compares this package's cache with transformers' own in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

PROMPT, STEPS, FEW = 100, 8, 5
FIRST_TOKEN, LAST_TOKEN = 3, 240  # of the small vocabulary: the rest is for special tokens


@dataclass
class Generated:
    """What a run gave. Attributes: tokens: int64; logits: of every step, as returned."""

    tokens: Tensor
    logits: list[Tensor]

    def same(self, other: Generated) -> bool:
        """Whether tokens and logits are equal bit by bit; NaN equals NaN."""
        if not torch.equal(self.tokens, other.tokens) or len(self.logits) != len(other.logits):
            return False
        return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(self.logits, other.logits, strict=True))

    def near(self, other: Generated, share: float) -> bool:
        """Whether logits agree within a share of their largest, and tokens do, as long as they do."""
        for a, b in zip(self.logits, other.logits, strict=False):
            if a.shape != b.shape or not (a - b).abs().nan_to_num().max() <= share * b.abs().nan_to_num(posinf=0.0).max():
                return False
        return self.tokens.shape == other.tokens.shape


Mode = Callable[[PreTrainedModel, Cache], Generated]


def prompt(length: int = PROMPT, batch: int = 1, seed: int = 0) -> Tensor:
    """Random tokens `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (batch, length), generator=generator)


def _generate(model: PreTrainedModel, cache: Cache | None, ids: Tensor, steps: int = STEPS, **options: Any) -> Generated:
    torch.manual_seed(1)
    given: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, **options}
    if cache is not None:
        given["past_key_values"] = cache
    found = model.generate(
        ids, max_new_tokens=steps, min_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **given
    )
    return Generated(found.sequences, list(found.logits or ()))


def greedy(model: PreTrainedModel, cache: Cache) -> Generated:
    """One prompt."""
    return _generate(model, cache, prompt(), attention_mask=torch.ones(1, PROMPT, dtype=torch.int64))


def sampling(model: PreTrainedModel, cache: Cache) -> Generated:
    """Drawn, two sequences of a prompt."""
    return _generate(model, cache, prompt(), do_sample=True, top_k=20, num_return_sequences=2)


def beam(model: PreTrainedModel, cache: Cache) -> Generated:
    """Beam search, two sequences returned."""
    return _generate(model, cache, prompt(), FEW, num_beams=3, num_return_sequences=2)


def beam_sampling(model: PreTrainedModel, cache: Cache) -> Generated:
    """Beams that are drawn, of two prompts."""
    return _generate(model, cache, prompt(batch=2), FEW, num_beams=2, do_sample=True)


def lookup(model: PreTrainedModel, cache: Cache) -> Generated:
    """Drafts looked up in a prompt that repeats itself."""
    ids = prompt(20, seed=3).repeat(1, 5)
    return _generate(model, cache, ids, prompt_lookup_num_tokens=4)


def assisted(model: PreTrainedModel, cache: Cache) -> Generated:
    """Drafts of an assistant: the model itself, so that all are right."""
    return _generate(model, cache, prompt(), assistant_model=model)


def chunked(model: PreTrainedModel, cache: Cache) -> Generated:
    """The prompt in pieces."""
    return _generate(model, cache, prompt(), FEW, prefill_chunk_size=32)


def padded(model: PreTrainedModel, cache: Cache) -> Generated:
    """Two prompts, the second shorter and padded on the left."""
    ids, mask = prompt(batch=2), torch.ones(2, PROMPT, dtype=torch.int64)
    ids[1, :40], mask[1, :40] = 0, 0
    return _generate(model, cache, ids, FEW, attention_mask=mask)


def turns(model: PreTrainedModel, cache: Cache) -> Generated:
    """A second turn on the cache of the first."""
    first = _generate(model, cache, prompt(), FEW)
    ids = torch.cat([first.tokens, prompt(10, seed=5)], dim=1)
    second = _generate(model, cache, ids, FEW)
    return Generated(second.tokens, first.logits + second.logits)


def by_hand(model: PreTrainedModel, cache: Cache) -> Generated:
    """`forward` with the cache: a batch padded on the right, then token by token, each row at its own positions."""
    ids, mask = prompt(batch=2), torch.ones(2, PROMPT, dtype=torch.int64)
    ids[1, 80:], mask[1, 80:] = 0, 0
    logits, tokens = [], []
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(torch.stack([out.logits[0, -1], out.logits[1, 79]]))
        for _ in range(FEW):
            token = logits[-1].argmax(-1, keepdim=True)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
    return Generated(torch.cat(tokens, dim=1), logits)


class _Kept(BaseStreamer):
    """Tokens as they came."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        """Nothing more comes."""


def streamed(model: PreTrainedModel, cache: Cache) -> Generated:
    """Token by token to a streamer."""
    kept = _Kept()
    found = _generate(model, cache, prompt(), FEW, streamer=kept)
    return Generated(torch.cat(kept.tokens), found.logits)


MODES: dict[str, Mode] = {
    "greedy": greedy,
    "sampling": sampling,
    "beam": beam,
    "beam sampling": beam_sampling,
    "prompt lookup": lookup,
    "assisted": assisted,
    "chunked prefill": chunked,
    "padded batch": padded,
    "second turn": turns,
    "forward by hand": by_hand,
    "streaming": streamed,
}
