"""Haystacks with facts at given depths: in words of the embedded retriever, or in English for any model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..embedded import FILLER_IDS, KEY_IDS, VALUE_IDS
from ..errors import InputError
from .texts import opening

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PLACES = (
    "Aberdeen", "Bologna", "Cracow", "Dakar", "Edinburgh", "Fukuoka", "Granada", "Helsinki", "Istanbul", "Jakarta", "Kampala",
    "Lisbon", "Montreal", "Nairobi", "Oslo", "Porto", "Quito", "Reykjavik", "Seville", "Tallinn", "Utrecht", "Valencia",
    "Warsaw", "Yerevan", "Zagreb",
)  # fmt: skip
DIGITS = 6
MOST_NEEDLES = len(PLACES)


@dataclass(frozen=True)
class Question:
    """ids: int64 `[1, tokens]`, asked after the haystack; depth: of its needle, 0 to 1; right: whether an answer is."""

    ids: Tensor
    depth: float
    right: Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Hidden:
    """A haystack int64 `[1, tokens]` with its questions, and the most tokens that an answer takes."""

    ids: Tensor
    questions: tuple[Question, ...]
    answer_tokens: int


def words(tokens: int, depths: Sequence[float], seed: str) -> Hidden:
    """Random filler words of the retriever; each fact is a key word with a value word after it, each answer one token.

    Raises: InputError: so many facts do not fit.
    """
    if tokens < 4 * len(depths) + 2:
        raise InputError(f"--context {tokens}: {len(depths)} facts need at least {4 * len(depths) + 2} words.")
    rng = random.Random(seed)
    ids = rng.choices(FILLER_IDS, k=tokens)
    keys, values = rng.sample(KEY_IDS, len(depths)), rng.sample(VALUE_IDS, len(depths))
    # Pairs of places, so that no fact writes over another; the first token stays filler.
    pairs = (tokens - 1) // 2
    taken: set[int] = set()
    questions = []
    for depth, key, value in zip(depths, keys, values, strict=True):
        pair = next(p for p in _nearest(round(depth * (pairs - 1)), pairs) if p not in taken)
        taken.add(pair)
        ids[1 + 2 * pair : 3 + 2 * pair] = [key, value]
        questions.append(Question(torch.tensor([[key]]), depth, partial(_is_word, value)))
    return Hidden(torch.tensor([ids]), tuple(questions), 1)


def _is_word(value: int, found: Sequence[int]) -> bool:
    return list(found[:1]) == [value]


def english(tokenizer: PreTrainedTokenizerBase, tokens: int, depths: Sequence[float], seed: str, text: str | None) -> Hidden:
    """Sentences of a text (or a few that repeat) with six-digit numbers of places among them, `tokens` or a few fewer.

    Raises: InputError: the text is too short, the facts do not fit, or there are more than 25.
    """
    if len(depths) > MOST_NEEDLES:
        raise InputError(f"--needles {len(depths)}: at most {MOST_NEEDLES}.")
    rng = random.Random(seed)
    places = rng.sample(PLACES, len(depths))
    numbers = [str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in depths]
    facts = [f"The secret number of {place} is {number}." for place, number in zip(places, numbers, strict=True)]

    def count(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)

    before = opening(tokenizer)
    room = tokens - len(before) - sum(count(" " + fact) + 1 for fact in facts)
    sentences = _sentences(text, count, room, tokens)
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda pair: -pair[0]):
        sentences.insert(round(depth * len(sentences)), fact)  # from the end on: earlier places stay where they are
    whole = tokenizer(" ".join(sentences), add_special_tokens=False, verbose=False).input_ids
    ids = torch.cat([before, torch.tensor(whole, dtype=torch.long)])[None]
    questions = []
    for depth, place, number in zip(depths, places, numbers, strict=True):
        asked = f"\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of {place} is"
        question = torch.tensor([tokenizer(asked, add_special_tokens=False).input_ids])
        questions.append(Question(question, depth, partial(_is_number, tokenizer, number)))
    longest = max(count(" " + number + ".") for number in numbers)
    return Hidden(ids, tuple(questions), longest + 2)


def _is_number(tokenizer: PreTrainedTokenizerBase, number: str, found: Sequence[int]) -> bool:
    """Whether the first number of an answer is the right one."""
    return re.findall(r"\d+", tokenizer.decode(list(found), skip_special_tokens=True))[:1] == [number]


def _nearest(place: int, count: int) -> list[int]:
    """All places, the nearest first."""
    return sorted(range(count), key=lambda other: abs(other - place))


def _sentences(text: str | None, count: Callable[[str], int], room: int, tokens: int) -> list[str]:
    """Sentences of so many tokens in all, or a few fewer."""
    if room < 1:
        raise InputError(f"--context {tokens}: the facts alone take more.")
    if text is None:
        each = count(" " + FILLER)
        found = [FILLER] * (room // each)
    else:
        found, used = [], 0
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            used += count(" " + sentence)
            if used > room:
                break
            found.append(sentence)
        else:
            raise InputError(f"--text: its {used:,} tokens are fewer than the {room:,} that --context {tokens} needs.")
    if not found:
        raise InputError(f"--context {tokens}: not even one sentence fits beside the facts.")
    return found
