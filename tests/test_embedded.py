"""The embedded models load, are small, do what their cards say, and can be made again."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_certkv.embedded import (
    EMBEDDED,
    FILLER_IDS,
    KEY_IDS,
    VALUE_IDS,
    VOCAB_SIZE,
    ask,
    embedded_path,
    load_embedded,
    make_haystack,
    resolve_model,
    set_margin,
)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def make_retriever() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_retriever", EXAMPLES / "make_retriever.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_models_fit_in_16_megabytes() -> None:
    sizes = {name: sum(file.stat().st_size for file in embedded_path(name).iterdir()) for name in EMBEDDED}
    assert sizes["retriever"] <= 5_000_000
    assert sum(sizes.values()) <= 16_000_000


@pytest.mark.parametrize("name", EMBEDDED)
def test_loads_with_a_tokenizer_of_its_vocabulary(name: str) -> None:
    model, tokenizer = load_embedded(name)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.vocab_size == len(tokenizer) == VOCAB_SIZE
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 700])
def test_retriever_finds_every_needle_at_2k(dtype: torch.dtype, chunk: int | None) -> None:
    model, tokenizer = load_embedded("retriever", dtype=dtype)
    haystack = make_haystack(tokenizer, 2048, 20, seed=1)
    assert ask(model, haystack, chunk=chunk) == [needle.value_id for needle in haystack.needles]


def test_generate_and_ask_agree() -> None:
    model, tokenizer = load_embedded("retriever", dtype=torch.float32)
    haystack = make_haystack(tokenizer, 512, 3, seed=2)
    for index, answer in enumerate(ask(model, haystack)):
        prompt = haystack.prompt(index)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
        assert out[0, -1] == answer
        assert tokenizer.decode(out[0, -1:]) == haystack.needles[index].value


def test_retriever_reads_words() -> None:
    model, tokenizer = load_embedded("retriever", dtype=torch.float32)
    text = "the quiet river amber-otter lunar-trumpet walking loudly ruby-stork iron-kite villages amber-otter"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert (ids == tokenizer.unk_token_id).sum() == 1  # "the"
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == "lunar-trumpet"


def test_retriever_is_made_again_bit_for_bit(make_retriever: ModuleType, tmp_path: Path) -> None:
    shipped, tokenizer = load_embedded("retriever")
    made = make_retriever.make_model().state_dict()
    weights = shipped.state_dict()
    assert made.keys() == weights.keys()
    for name, weight in weights.items():
        assert made[name].dtype == weight.dtype == torch.bfloat16
        assert torch.equal(made[name].view(torch.int16), weight.view(torch.int16)), name
    assert make_retriever.make_tokenizer().get_vocab() == tokenizer.get_vocab()
    make_retriever.make_tokenizer().save_pretrained(tmp_path)
    made_file, shipped_file = (folder / "tokenizer.json" for folder in (tmp_path, embedded_path("retriever")))
    assert made_file.read_text() == shipped_file.read_text()


def test_another_seed_makes_another_retriever(make_retriever: ModuleType) -> None:
    codes = [make_retriever.make_weights(seed, 30.0)["model.embed_tokens.weight"] for seed in (0, 1)]
    assert not torch.equal(*codes)


def test_codes_keep_their_distance(make_retriever: ModuleType) -> None:
    codes = load_embedded("retriever", dtype=torch.float32)[0].get_input_embeddings().weight[:, make_retriever.CURRENT]
    products = (codes @ codes.T).fill_diagonal_(0)
    # The codes were drawn below the limit in float64; bfloat16 moves a product by less than 2 ** -7 in all.
    assert products.max() <= make_retriever.COHERENCE + 2**-7


def test_keys_and_values_look_realistic(make_retriever: ModuleType) -> None:
    """They vary over tokens and are uneven over channels, as in trained models."""
    model, _ = load_embedded("retriever", dtype=torch.float32)
    states: list[torch.Tensor] = []
    ask(
        model,
        make_haystack(None, 512, 2),
        between=lambda cache: states.extend(state for layer in cache.layers for state in (layer.keys, layer.values)),
    )
    for index, state in enumerate(states):
        assert state.shape == (1, 2, 512, 64)
        spread = state.std(dim=2)
        if index == 0:
            # The position head's key is the same for every token; only rotation moves it, and the slow pairs hardly.
            spread[0, 0, make_retriever.FAST_CHANNELS] = 1.0
        assert (spread > 0.05).all()
        size = state.abs().mean(dim=2)
        assert (size.amax(-1) > 4 * size.amin(-1)).all()


def test_set_margin_is_absolute_and_matters() -> None:
    model, _ = load_embedded("retriever", dtype=torch.float32)
    haystack = make_haystack(None, 1024, 10, seed=3)
    wanted = [needle.value_id for needle in haystack.needles]
    before = model.model.layers[1].self_attn.q_proj.weight.clone()
    assert set_margin(model, 0.5) is model and model.config.retrieval_margin == 0.5
    assert ask(model, haystack) != wanted
    set_margin(model, 30.0)
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, before, rtol=1e-6, atol=0)
    assert ask(model, haystack) == wanted


def test_prose_continues_text() -> None:
    model, tokenizer = load_embedded("prose", dtype=torch.float32)
    text = "It was a cold evening in the month of November, and the old man had not yet come home to his supper."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    loss = model(ids, labels=ids).loss.item()
    assert math.isfinite(loss) and loss < 5.0 < math.log(VOCAB_SIZE)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 16)
    assert any(letter.isalpha() for letter in tokenizer.decode(out[0, ids.shape[1] :]))


def test_bad_names_say_what_is_possible() -> None:
    for function in (embedded_path, load_embedded):
        with pytest.raises(ValueError, match=r"'retreiver'.*'retriever', 'prose'"):
            function("retreiver")
    with pytest.raises(ValueError, match=r"got ''.*'retriever', 'prose'"):
        resolve_model("")


def test_resolve_model_passes_other_names_through(tmp_path: Path) -> None:
    assert resolve_model("prose") == str(embedded_path("prose"))
    assert resolve_model("some-owner/some-model") == "some-owner/some-model"
    assert resolve_model("./prose") == "./prose"
    assert resolve_model(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(("n_tokens", "n_needles"), [(3, 1), (41, 20), (512, 7), (4096, 510)])
def test_haystack_properties(n_tokens: int, n_needles: int) -> None:
    haystack = make_haystack(None, n_tokens, n_needles, seed=5)
    assert haystack.input_ids.shape == (1, n_tokens) and haystack.input_ids.dtype == torch.int64
    assert len(haystack.needles) == n_needles
    rest = haystack.input_ids[0].tolist()
    for needle in haystack.needles:
        assert needle.key_id in KEY_IDS and needle.value_id in VALUE_IDS and needle.position >= 1
        assert rest[needle.position : needle.position + 2] == [needle.key_id, needle.value_id]
        rest[needle.position : needle.position + 2] = [-1, -1]
    assert len({needle.key_id for needle in haystack.needles}) == n_needles
    assert len({needle.value_id for needle in haystack.needles}) == n_needles
    assert all(token == -1 or token in FILLER_IDS for token in rest) and rest.count(-1) == 2 * n_needles
    prompt = haystack.prompt(n_needles - 1)
    assert torch.equal(prompt[:, :-1], haystack.input_ids)
    assert prompt[0, -1] == haystack.needles[-1].key_id


def test_needles_stand_at_varied_depths() -> None:
    positions = [needle.position for needle in make_haystack(None, 1001, 10).needles]
    assert [(position - 1) // 100 for position in positions] == list(range(10))
    assert len({(position - 1) % 100 for position in positions}) > 5


def test_haystack_depends_on_its_seed_only() -> None:
    _, tokenizer = load_embedded("retriever")
    first, again, other = (make_haystack(tokenizer, 256, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids) and first.needles == again.needles
    assert not torch.equal(first.input_ids, other.input_ids)
    assert torch.equal(first.input_ids, make_haystack(None, 256, 4, 0).input_ids)
    assert tokenizer.convert_tokens_to_ids(first.needles[0].key) == first.needles[0].key_id


def test_haystack_refuses_what_cannot_be() -> None:
    for n_tokens, n_needles in ((2, 1), (100, 0), (100, 50), (10_000, 511)):
        with pytest.raises(ValueError, match=f"{n_needles} needles for {n_tokens} tokens; between 1 and"):
            make_haystack(None, n_tokens, n_needles)
    haystack = make_haystack(None, 100, 2)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"needle {index} of a haystack with 2 needles"):
            haystack.prompt(index)
    prose = load_embedded("prose")[0]
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="margin must be above 0"):
            set_margin(prose, margin)
    with pytest.raises(ValueError, match="only a retriever has a margin"):
        set_margin(prose, 10.0)
    with pytest.raises(ValueError, match="at least one token"):
        ask(prose, haystack, chunk=0)
