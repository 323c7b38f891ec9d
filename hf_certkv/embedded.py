"""The two small models the package carries, and the haystacks the first of them searches.

``retriever`` finds facts in its context by construction; ``prose`` was trained on books and continues English. Both
are ordinary ``transformers`` checkpoints, so that every feature of the package can be tried without a download.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = ("retriever", "prose")

# The retriever's vocabulary of 2048, by token id: 0 ends a text, 1 is an unknown word, then come three kinds of words.
VOCAB_SIZE = 2048
EOS_ID = 0
UNK_ID = 1
FILLER_IDS = range(2, 1026)
KEY_IDS = range(1026, 1538)
VALUE_IDS = range(1538, 2048)

# Where the retriever's content head lives: layer 1 (counted from 0), query head 0, head size 64.
CONTENT_LAYER = 1
CONTENT_HEAD = 0


def embedded_path(name: str) -> Path:
    """The folder of an embedded model, ready for ``from_pretrained``.

    Args:
        name: one of ``EMBEDDED``.

    Raises:
        ValueError: the name is not one of ``EMBEDDED``.
        FileNotFoundError: the installation lacks the model's files.
    """
    if name not in EMBEDDED:
        raise ValueError(f"no embedded model is called {name!r}; there are {', '.join(map(repr, EMBEDDED))}")
    folder = Path(__file__).resolve().parent / "models" / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model {name!r} is not installed: {folder} has no config.json")
    return folder


def resolve_model(name_or_path: str | os.PathLike[str]) -> str:
    """What to give ``from_pretrained``: an embedded model's folder for its name, anything else unchanged.

    A local folder called ``retriever`` or ``prose`` is reached as ``./retriever``.

    Raises:
        ValueError: the name is empty.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise ValueError(
            f"a model is needed, got {name_or_path!r}; give {', '.join(map(repr, EMBEDDED))}, a folder or a Hub name"
        )
    return str(embedded_path(name)) if name in EMBEDDED else name


def load_embedded(
    name: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads an embedded model, in evaluation mode, and its tokenizer.

    Args:
        name: one of ``EMBEDDED``.
        dtype: of the weights; ``"auto"`` is the stored ``torch.bfloat16``.
        attn_implementation: as for ``from_pretrained``; None is transformers' default (``"sdpa"``).
        device: where to put the model; None leaves it on the CPU.

    Raises:
        ValueError: the name is not one of ``EMBEDDED``.
    """
    folder = embedded_path(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation)
    if device is not None:
        model = model.to(device)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def set_margin(model: PreTrainedModel, margin: float) -> PreTrainedModel:
    """Makes the retriever's search sharper or blunter, in place.

    The margin is the attention score, in nats, by which the wanted token stands above one with an unrelated code. The
    smaller it is, the more attention leaks to the filler and the sooner errors in the cache change the answer.

    Args:
        model: the retriever, in any dtype, on any device.
        margin: the new margin in nats, above 0; ``model.config.retrieval_margin`` is the present one.

    Returns:
        The same model.

    Raises:
        ValueError: the margin is not above 0, or the model is not a retriever.
    """
    if not margin > 0:
        raise ValueError(f"the margin must be above 0 nats, got {margin!r}")
    present = getattr(model.config, "retrieval_margin", None)
    if present is None:
        raise ValueError(f"only a retriever has a margin; {type(model).__name__} has no config.retrieval_margin")
    head_dim = model.config.head_dim
    rows = slice(CONTENT_HEAD * head_dim, (CONTENT_HEAD + 1) * head_dim)
    with torch.no_grad():
        model.get_parameter(f"model.layers.{CONTENT_LAYER}.self_attn.q_proj.weight")[rows] *= margin / present
    model.config.retrieval_margin = float(margin)
    return model


@dataclass(frozen=True)
class Needle:
    """One fact in a haystack: ``key`` stands at ``position`` and ``value`` right after it.

    ``key`` and ``value`` are words where the haystack was made with a tokenizer, and empty otherwise.
    """

    key_id: int
    value_id: int
    position: int
    key: str = ""
    value: str = ""


@dataclass(frozen=True)
class Haystack:
    """Filler words with needles among them; no question is asked in it.

    ``input_ids`` is ``[1, tokens]``, int64; ``needles`` are in the order of their positions.
    """

    input_ids: torch.Tensor
    needles: tuple[Needle, ...]

    def prompt(self, index: int) -> torch.Tensor:
        """The haystack followed by a needle's key, so that the next greedy token is that needle's value.

        Returns:
            ``[1, tokens + 1]``, int64, on the haystack's device.

        Raises:
            IndexError: there is no needle of that index.
        """
        return torch.cat([self.input_ids, self.question(index)], dim=1)

    def question(self, index: int) -> torch.Tensor:
        """Only what ``prompt`` adds: a needle's key as ``[1, 1]``, int64, for when a cache holds the haystack."""
        if not 0 <= index < len(self.needles):
            raise IndexError(f"needle {index} of a haystack with {len(self.needles)} needles")
        return self.input_ids.new_tensor([[self.needles[index].key_id]])


def make_haystack(tokenizer: PreTrainedTokenizerBase | None, n_tokens: int, n_needles: int, seed: int = 0) -> Haystack:
    """Hides facts at varied depths in random filler, the same for the same arguments everywhere.

    Each needle has its own stretch of the haystack, all of equal length, and stands at random in it. Keys are distinct,
    values are distinct, and neither occurs anywhere else in the haystack.

    Args:
        tokenizer: the retriever's, for the words beside the ids; None for ids alone.
        n_tokens: length of the haystack without a question.
        n_needles: how many facts; at most one for each value word and for each two tokens after the first.
        seed: of the choice of words and places.

    Raises:
        ValueError: so many needles do not fit, or the tokenizer is not the retriever's.
    """
    # The first token stays filler: it has no previous token, so the retriever takes it for its own predecessor.
    most = min(len(VALUE_IDS), (n_tokens - 1) // 2)
    if not 1 <= n_needles <= most:
        raise ValueError(f"{n_needles} needles for {n_tokens} tokens; between 1 and {most} are possible")
    if tokenizer is not None and len(tokenizer) != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {len(tokenizer)} words, the retriever's has {VOCAB_SIZE}")
    # Python's generator gives the same numbers on every platform and version.
    rng = random.Random(seed)
    ids = rng.choices(FILLER_IDS, k=n_tokens)
    keys, values = rng.sample(KEY_IDS, n_needles), rng.sample(VALUE_IDS, n_needles)
    edges = [1 + (n_tokens - 1) * i // n_needles for i in range(n_needles + 1)]
    needles = []
    for i, (key_id, value_id) in enumerate(zip(keys, values, strict=True)):
        position = rng.randrange(edges[i], edges[i + 1] - 1)
        ids[position : position + 2] = [key_id, value_id]
        words = ["", ""] if tokenizer is None else list(tokenizer.convert_ids_to_tokens([key_id, value_id]))
        needles.append(Needle(key_id, value_id, position, *words))
    return Haystack(torch.tensor([ids]), tuple(needles))


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    haystack: Haystack,
    make_cache: Callable[[], Any] = DynamicCache,
    chunk: int | None = None,
    between: Callable[[Any], Any] | None = None,
) -> list[int]:
    """Asks for every needle of a haystack that is read only once.

    Args:
        model: the retriever, or any model with its vocabulary, on any device.
        haystack: what to read.
        make_cache: makes the empty cache; it is filled with the haystack and deep-copied for each question.
        chunk: tokens to read at a time; None reads all at once, which is faster but needs more memory.
        between: called with the filled cache before the first question, to look at it or to change it.

    Returns:
        The greedy answer to each needle's question, as a token id; right where it is the needle's ``value_id``.

    Raises:
        ValueError: the chunk is not above 0.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one token, got {chunk}")
    cache = make_cache()
    for part in haystack.input_ids.to(model.device).split(chunk or haystack.input_ids.shape[1], dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if between is not None:
        between(cache)
    answers = []
    for index in range(len(haystack.needles)):
        question = haystack.question(index).to(model.device)
        logits = model(input_ids=question, past_key_values=copy.deepcopy(cache), use_cache=True).logits
        answers.append(int(logits[0, -1].argmax()))
    return answers
