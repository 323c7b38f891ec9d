"""Makes the embedded ``retriever``: a Llama whose weights are computed, not trained, to find facts in its context.

It is an induction head built by hand. The residual stream of 128 channels has slots:

    current [32]   the token's code, a random unit vector
    previous [32]  the previous token's code, written by layer 0
    copied [32]    the code that is read out, written by layer 1
    scratch [31]   what all other heads and the MLPs read and write
    constant [1]   the same for every token; it dominates the norm, so that every RMSNorm is nearly a constant

Layer 0, head 0 looks one token back: its query and its key do not depend on the token, and rotary embedding turns them
so that their product peaks at distance 1. Layer 1, head 0 compares the current code with the previous-token codes and
copies the current code of where they match: what followed the last time. The output matrix holds the same codes.

Of the 32 channel pairs that rotary embedding turns, the 16 fast ones tell positions apart; with theta = 1e12 the 16
slow ones turn by at most 0.13 rad in 128K tokens and carry codes. Everything else is random, so that the cache holds keys
and values of uneven channels with offsets and outliers, like those of trained models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_certkv.embedded import CONTENT_LAYER, EOS_ID, UNK_ID, VOCAB_SIZE, ask, make_haystack, set_margin

HIDDEN, HEAD, HEADS, KV_HEADS, MLP, CONTEXT = 128, 64, 4, 2, 64, 131072
CODE = 32
CURRENT, PREVIOUS, COPIED = (slice(CODE * i, CODE * (i + 1)) for i in range(3))
SCRATCH, CONSTANT = slice(96, 127), 127
THETA = 1e12
FAST = 16
FREQUENCY = THETA ** (-np.arange(HEAD // 2) / (HEAD // 2))
# Llama's rotary embedding turns channel i together with channel i + 32.
FAST_CHANNELS = np.r_[0:FAST, HEAD // 2 : HEAD // 2 + FAST]
SLOW_CHANNELS = np.r_[FAST : HEAD // 2, HEAD // 2 + FAST : HEAD]

CONSTANT_SIZE = 4.0
COHERENCE = 0.6
POSITION_MARGIN = 20.0
# Fast pairs tell neighbours apart, slow ones stop the fast ones from matching again after whole turns. At this ratio no
# distance below 128K scores above the neighbours, and errors in the keys are averaged best.
POSITION_DECAY = 0.8
CODE_SIZE = 4.0
LOGIT_SIZE = 20.0
DEFAULT_MARGIN = 30.0
CHECK_CONTEXTS = [512, 2048, 8192]
SWEEP_MARGINS = (30.0, 20.0, 14.0, 12.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0)
SWEEP_BITS = (None, 8, 4, 3, 2)

VERBS = """walk talk climb jump call wait rest turn follow gather paint wander whisper listen answer watch visit help
play wash cook bake plant harvest mend sail fish hunt row knock open close lift pull push carry lower raise borrow
return reach touch point count measure weigh pour fill empty boil roast salt sweeten taste swallow chew laugh smile
frown sigh murmur shout whistle march kneel lean stretch rush hurry linger stay remain gaze stare blink wink wonder
ponder guess learn explain suggest offer accept refuse allow insist demand request order guard protect defend attack
conquer surrender repair hammer polish sharpen fold pack load unload deliver mail print record sketch color stain comb
scrub float drift splash hover soar crawl creak rattle rustle sparkle glow flicker glimmer dazzle vanish"""
NOUNS = """river valley meadow garden window bottle candle lantern basket blanket pillow mirror ladder wagon bridge
tunnel harbor village market tavern kitchen cellar attic corridor staircase doorway courtyard fountain orchard pasture
fence barrel bucket kettle teapot saucer napkin ribbon button needle thread jacket slipper mitten bonnet apron pocket
letter novel poem ballad painter miller farmer sailor tailor weaver shepherd merchant soldier captain neighbor cousin
uncle daughter brother sister doctor lawyer teacher student singer dancer actor pilot engine carriage saddle bridle
canoe anchor paddle mountain canyon glacier island peninsula desert forest thicket clearing pebble boulder crystal
feather acorn mushroom petal blossom cherry apricot lemon almond pumpkin carrot turnip onion pepper biscuit pancake
dumpling sausage cloud thunderstorm rainbow sunset shadow evening morning cottage castle palace temple chapel tower
cannon arrow shield banner trumpeter piper jester wizard giant dwarf dragon unicorn squirrel rabbit hedgehog beaver
sparrow robin pigeon pelican lobster oyster turtle beetle spider cricket lizard pony kitten puppet marionette magnet
pulley violet tulip"""
ADJECTIVES = """quiet loud gentle bold brave calm clever careful careless cheerful bright dim sharp blunt smooth rough
swift slow warm cool mild damp fresh rare proud modest humble honest secret sudden strange silent patient pleasant
polite rude serious solemn stern strict subtle tender thorough timid vivid weak wise absent abrupt actual awkward blind
brief broad cautious civil clear constant correct cruel curious deep direct dear definite eager earnest exact faint
fair famous fierce final firm fluent fond formal frank frequent generous glad grand grave great gross harsh hoarse keen
large late lavish light loyal lucid mellow mature"""
KEY_FIRST = """amber ashen autumn azure bramble bronze cedar cobalt copper coral crimson dusty ebony emerald frosty
golden hazel indigo ivory jade lilac maple marble misty ochre olive onyx pearl ruby russet sable saffron"""
KEY_LAST = "otter falcon badger heron lynx raven tiger walrus bison cobra gecko hornet jackal lemur panther stork"
VALUE_FIRST = """lunar solar polar stellar rural urban royal noble ancient modern hollow wooden iron velvet cotton
woolen paper glass stone clay silver tin brass linen leather wicker crooked painted carved gilded woven folded hidden
lost"""
VALUE_LAST = """trumpet violin compass hourglass helmet chalice dagger crown locket telescope anvil abacus kite sundial
lute"""


def vocabulary() -> list[str]:
    """The 2048 words in the order of their ids: ``<eos>``, ``<unk>``, filler, keys, values."""

    def forms(verb: str) -> list[str]:
        stem = verb.removesuffix("e")
        third = verb + ("es" if verb.endswith(("s", "sh", "ch")) else "s")
        past = stem + "ed"
        if verb[-1] == "y" and verb[-2] not in "aeiou":
            third, past = verb[:-1] + "ies", verb[:-1] + "ied"
        return [verb, third, past, stem + "ing"]

    filler = [form for verb in VERBS.split() for form in forms(verb)]
    filler += [form for noun in NOUNS.split() for form in (noun, noun[:-1] + "ies" if noun.endswith("ry") else noun + "s")]
    filler += [form for word in ADJECTIVES.split() for form in (word, word[:-1] + "y" if word.endswith("le") else word + "ly")]
    keys = [f"{first}-{last}" for first in KEY_FIRST.split() for last in KEY_LAST.split()]
    values = [f"{first}-{last}" for first in VALUE_FIRST.split() for last in VALUE_LAST.split()]
    return ["<eos>", "<unk>", *filler, *keys, *values]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words between spaces; a word outside the vocabulary becomes ``<unk>``."""
    words = {word: index for index, word in enumerate(vocabulary())}
    if len(words) != VOCAB_SIZE or words["<eos>"] != EOS_ID or words["<unk>"] != UNK_ID:
        raise AssertionError(f"the vocabulary has {len(words)} distinct words, not {VOCAB_SIZE}, or its ids moved")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_codes(rng: np.random.RandomState) -> np.ndarray:
    """Random unit vectors ``[vocabulary, 32]``, float64, no two with a product above ``COHERENCE``.

    So the wanted key stands above every other one by at least ``(1 - COHERENCE) * margin`` nats.
    """
    codes = np.empty((0, CODE))
    while len(codes) < VOCAB_SIZE:
        candidate = rng.standard_normal(CODE)
        candidate /= np.linalg.norm(candidate)
        if not len(codes) or (codes @ candidate).max() <= COHERENCE:
            codes = np.vstack([codes, candidate])
    return codes


def uneven(rng: np.random.RandomState, rows: int) -> np.ndarray:
    """Random input weights ``[rows, 128]``: outputs of size about 1 with uneven gains, offsets and a few outliers."""
    weight = np.zeros((rows, HIDDEN))
    weight[:, : COPIED.start] = rng.standard_normal((rows, COPIED.start)) * 0.6
    weight[:, SCRATCH] = rng.standard_normal((rows, SCRATCH.stop - SCRATCH.start)) * 0.6
    weight[:, CONSTANT] = rng.standard_normal(rows) * 0.5 / CONSTANT_SIZE
    gain = np.exp(0.5 * rng.standard_normal(rows))
    gain[rng.permutation(rows)[: rows // 32]] *= 3.0
    return weight * gain[:, None]


def position_weights(rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Query and key of the head that looks one token back, each ``[32 fast channels]``, before rotation.

    Rotary embedding turns pair i by ``frequency[i]`` radians a token. A query that lags its key by one such turn gives
    the score ``sum_i amplitude[i] * cos((distance - 1) * frequency[i])``, which peaks at distance 1.
    """
    frequency = FREQUENCY[:FAST]
    decay = POSITION_DECAY ** np.arange(FAST)
    amplitude = decay * POSITION_MARGIN / np.sum(decay * (1 - np.cos(frequency)))
    phase = rng.uniform(0, 2 * np.pi, FAST)
    size = np.exp(0.5 * rng.standard_normal(FAST))
    key = np.r_[size * np.cos(phase), size * np.sin(phase)]
    # Attention divides scores by the root of the head size; the query makes up for it.
    lag = phase - frequency
    query = math.sqrt(HEAD) * np.r_[amplitude / size * np.cos(lag), amplitude / size * np.sin(lag)]
    return query, key


def make_attention(rng: np.random.RandomState, layer: int, margin: float) -> dict[str, np.ndarray]:
    """Weights of a layer's attention by projection, each ``[out, in]``, float64: head 0 by design, others random."""
    query, key, value = uneven(rng, HEADS * HEAD), uneven(rng, KV_HEADS * HEAD), uneven(rng, KV_HEADS * HEAD)
    output = np.zeros((HIDDEN, HEADS * HEAD))
    output[SCRATCH] = rng.standard_normal((SCRATCH.stop - SCRATCH.start, HEADS * HEAD)) * 0.008
    # KV head 0 carries a code in half of its values; only query head 0 may read that half.
    head = slice(0, HEAD)
    codes = slice(0, CODE)
    value[codes] = 0
    value[codes, CURRENT] = np.eye(CODE) * CODE_SIZE
    output[:, codes] = 0
    query[head] = 0
    if layer == CONTENT_LAYER:
        query[SLOW_CHANNELS, CURRENT] = np.eye(CODE) * math.sqrt(HEAD) * margin / CODE_SIZE
        key[SLOW_CHANNELS] = 0
        key[SLOW_CHANNELS, PREVIOUS] = np.eye(CODE) * CODE_SIZE
        output[COPIED, codes] = np.eye(CODE) / CODE_SIZE
    else:
        key[FAST_CHANNELS] = 0
        query[FAST_CHANNELS, CONSTANT], key[FAST_CHANNELS, CONSTANT] = (
            weights / CONSTANT_SIZE for weights in position_weights(rng)
        )
        output[PREVIOUS, codes] = np.eye(CODE) / CODE_SIZE
    return {"q_proj": query, "k_proj": key, "v_proj": value, "o_proj": output}


def make_weights(seed: int, margin: float) -> dict[str, torch.Tensor]:
    """The model's state, bfloat16, by parameter name; the same on every machine for the same arguments."""
    # NumPy freezes this generator's numbers for good, which torch does not promise.
    rng = np.random.RandomState(seed)
    codes = make_codes(rng)
    scratch = rng.standard_normal((VOCAB_SIZE, SCRATCH.stop - SCRATCH.start))
    embedding = np.zeros((VOCAB_SIZE, HIDDEN))
    embedding[:, CURRENT] = codes
    embedding[:, SCRATCH] = scratch / np.linalg.norm(scratch, axis=1, keepdims=True)
    embedding[:, CONSTANT] = CONSTANT_SIZE
    weights: dict[str, np.ndarray] = {"model.embed_tokens.weight": embedding}

    # Constant, current code and scratch are there from the start; each layer adds a code. A norm's weight undoes it.
    square = CONSTANT_SIZE**2 + 2
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, weight in make_attention(rng, layer, margin).items():
            weights[f"{prefix}self_attn.{name}.weight"] = weight
        for name in ("gate_proj", "up_proj"):
            weights[f"{prefix}mlp.{name}.weight"] = uneven(rng, MLP)
        down = np.zeros((HIDDEN, MLP))
        down[SCRATCH] = rng.standard_normal((SCRATCH.stop - SCRATCH.start, MLP)) * 0.008
        weights[f"{prefix}mlp.down_proj.weight"] = down
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = np.full(HIDDEN, math.sqrt(square / HIDDEN))
            square += name == "input_layernorm"
    weights["model.norm.weight"] = np.full(HIDDEN, math.sqrt(square / HIDDEN))
    head = np.zeros((VOCAB_SIZE, HIDDEN))
    head[:, COPIED] = LOGIT_SIZE * codes
    weights["lm_head.weight"] = head
    return {name: torch.from_numpy(weight).to(torch.bfloat16) for name, weight in weights.items()}


def make_model(seed: int = 0, margin: float = DEFAULT_MARGIN) -> LlamaForCausalLM:
    """The retriever in bfloat16, to be saved; casting rounds its rotary frequencies, loading does not.

    Args:
        seed: of the codes and of the random heads.
        margin: attention score, in nats, of a matching key above an unrelated one.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    config.update({"retrieval_margin": margin})
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(make_weights(seed, margin))
    return model.eval()


def round_cache(cache: Any, bits: int, block: int = 64) -> None:
    """Rounds a DynamicCache in place to ``bits`` bits: keys by channel and block of tokens, values by token.

    Each group's grid reaches from its smallest to its largest entry. Tokens after the last whole block stay exact.
    """
    for layer in cache.layers:
        whole = layer.keys.shape[2] // block * block
        for tensor, axis in ((layer.keys, -2), (layer.values, -1)):
            groups = tensor[:, :, :whole].float().unflatten(2, (-1, block))
            low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
            step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
            rounded = ((groups - low) / step).round() * step + low
            tensor[:, :, :whole] = rounded.flatten(2, 3).to(tensor.dtype)


def retrieved(model: PreTrainedModel, context: int, needles: int, seeds: int, bits: int | None = None) -> tuple[int, int]:
    """Needles found and needles asked for, over ``seeds`` haystacks of ``context`` tokens, the cache rounded or not."""
    found = 0
    for seed in range(seeds):
        haystack = make_haystack(None, context, needles, seed)
        answers = ask(model, haystack, between=None if bits is None else lambda cache: round_cache(cache, bits))
        found += sum(answer == needle.value_id for answer, needle in zip(answers, haystack.needles, strict=True))
    return found, seeds * needles


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the model and its tokenizer to.")],
    margin: Annotated[float, typer.Option(min=0.1, help="Score of a match above an unrelated key, in nats.")] = (
        DEFAULT_MARGIN
    ),
    seed: Annotated[int, typer.Option(help="Of the codes and of the random heads.")] = 0,
    check: Annotated[bool, typer.Option(help="Look for needles in bfloat16 and in float32.")] = False,
    sweep: Annotated[bool, typer.Option(help="Look for needles at several margins with a rounded cache.")] = False,
    context: Annotated[
        list[int], typer.Option(help="Context length of --check and --sweep; may be repeated.")
    ] = CHECK_CONTEXTS,
    needles: Annotated[int, typer.Option(min=1, help="Needles a haystack.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Haystacks of each length.")] = 2,
) -> None:
    """Writes the retriever, and with --check or --sweep measures what it finds."""
    logging.disable_progress_bar()
    console = Console()
    model = make_model(seed, margin)
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(f"{model.num_parameters():,} parameters, margin {margin:g} nats, seed {seed}: {size:,} bytes in {out}")
    if check:
        table = Table("context", "dtype", "found", title=f"Retrieval, DynamicCache, margin {margin:g}")
        for length in context:
            for dtype in (torch.bfloat16, torch.float32):
                found, asked = retrieved(LlamaForCausalLM.from_pretrained(out, dtype=dtype), length, needles, seeds)
                table.add_row(f"{length:,}", str(dtype).removeprefix("torch."), f"{found} of {asked}")
        console.print(table)
    if sweep:
        for length in context:
            table = Table("margin", *("exact" if bits is None else f"{bits} bits" for bits in SWEEP_BITS))
            table.title = f"Found of {needles * seeds} with a rounded cache, {length:,} tokens, float32"
            for blunter in SWEEP_MARGINS:
                blunt = set_margin(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), blunter)
                counts = (retrieved(blunt, length, needles, seeds, bits)[0] for bits in SWEEP_BITS)
                table.add_row(f"{blunter:g}", *map(str, counts))
            console.print(table)


if __name__ == "__main__":
    typer.run(main)
