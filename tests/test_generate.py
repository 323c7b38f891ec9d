"""The cache inside `generate`: bit-identical to DynamicCache at zero tolerance, certified at the default one."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from conftest import (
    PAD,
    assert_certified,
    assert_same_generation,
    build_model,
    generate,
    new_cache,
    prompt,
    served,
    shared_model,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_certkv import CertifiedQuantizedCache, InputError
from hf_certkv.attention import certkv_attention

LENGTH, STEPS = 330, 64
KINDS = ["llama", "llama80", "qwen3", "mistral", "mistral_sliding", "gemma3"]
DTYPES = [torch.float32, torch.bfloat16]
no_full_layer = pytest.mark.filterwarnings("ignore:No layer of MistralConfig is full attention:UserWarning")


def exact_cache(model: PreTrainedModel, **settings: Any) -> CertifiedQuantizedCache:
    """A cache at zero tolerance: every step is dense on the originals."""
    return new_cache(model, rtol=0.0, atol=0.0, **settings)


def quantised_layers(cache: CertifiedQuantizedCache) -> int:
    """How many layers hold quantised blocks."""
    return sum(layer.store.blocks > 0 for layer in cache.certified_layers)


@no_full_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_tolerance_is_bit_identical(kind: str, dtype: torch.dtype) -> None:
    model, ids = shared_model(kind, dtype), prompt(LENGTH)
    expected = generate(model, ids, STEPS, DynamicCache(config=model.config))
    cache = exact_cache(model)
    assert_same_generation(generate(model, ids, STEPS, cache), expected)
    assert len(set(expected.sequences[0, LENGTH:].tolist())) > 1, "a constant continuation proves little"
    assert quantised_layers(cache) == len(cache.certified_layers) == {"mistral_sliding": 0, "llama80": 3}.get(kind, 2)
    assert cache.get_seq_length() == LENGTH + STEPS - 1
    rungs = served(cache)
    assert rungs["dense_layer"] == sum(rungs.values()) == len(cache.certified_layers) * (STEPS - 1) * 4


@no_full_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_at_zero_tolerance_is_bit_identical(kind: str, dtype: torch.dtype) -> None:
    model, ids = shared_model(kind, dtype, "eager"), prompt(LENGTH)
    expected = generate(model, ids, STEPS // 2, DynamicCache(config=model.config))
    cache = exact_cache(model)
    assert_same_generation(generate(model, ids, STEPS // 2, cache), expected)
    report = cache.report().to_dict()
    assert report["materialised_operations"] == {} and sum(served(cache).values()) == 0
    assert report["exact_head_steps"] == len(cache.certified_layers) * (STEPS // 2 - 1) * 4


@pytest.mark.filterwarnings("ignore:hf_certkv. .* is computed on the exact originals:UserWarning")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beam", "lookup"])
def test_attention_weights_that_are_asked_for_are_exact(options: dict[str, Any]) -> None:
    """They are computed when somebody looks at them, or when the tokens that they are of change; the cache is gone by then."""
    model = shared_model("llama", torch.float32, "eager")
    ids = periodic_prompt() if "prompt_lookup_num_tokens" in options else prompt(LENGTH)
    made = [
        generate(model, ids, 6, cache, output_attentions=True, **options).attentions
        for cache in (DynamicCache(config=model.config), exact_cache(model))
    ]
    for theirs, ours in zip(*made, strict=True):
        for their, our in zip(theirs, ours, strict=True):
            assert torch.equal(our.clone(), their)


@no_full_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_is_certified(kind: str, dtype: torch.dtype) -> None:
    model, ids = shared_model(kind, dtype, "eager"), prompt(LENGTH)
    cache = new_cache(model, audit=True)
    generate(model, ids, STEPS // 2, cache)
    report = cache.report().to_dict()
    assert report["materialised_operations"] == {}
    assert report["overall"]["head_steps"] == len(cache.certified_layers) * (STEPS // 2 - 1) * 4
    if cache.certified_layers:
        assert_certified(cache, share=0.9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mistral_sliding"])
def test_default_tolerance_is_certified(kind: str, dtype: torch.dtype) -> None:
    model, ids = shared_model(kind, dtype), prompt(LENGTH)
    cache = new_cache(model, audit=True)
    generate(model, ids, STEPS // 2, cache)
    assert_certified(cache, share=0.9)
    overall = cache.report().to_dict()["overall"]
    assert overall["head_steps"] == len(cache.certified_layers) * (STEPS // 2 - 1) * 4
    assert overall["relative"]["bound"]["max"] <= 0.02
    assert overall["relative"]["error"]["max"] <= overall["relative"]["bound"]["max"]
    assert overall["relative"]["error"]["max"] > 0


def periodic_prompt(length: int = LENGTH, period: int = 24) -> Tensor:
    """A prompt that repeats itself, so that looking up its n-grams finds continuations."""
    return prompt(period, seed=3).repeat(1, length // period + 1)[:, :length]


@cache
def drafter(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    """An assistant that agrees with the model often and not always: the model itself, its weights disturbed."""
    model = build_model(kind, dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(dtype)
        parameter.data.add_(noise * parameter.data.float().std().nan_to_num(0.0).to(dtype) * 0.03)
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of these lengths and their mask."""
    ids, mask = prompt(max(lengths), len(lengths)), torch.ones(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = PAD
        mask[row, : max(lengths) - length] = 0
    return ids, mask


def mode_arguments(mode: str, kind: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Prompt and options of one way to generate."""
    ids = prompt(LENGTH)
    if mode == "sampling":
        return ids, {"do_sample": True, "temperature": 0.8, "top_k": 30}
    if mode == "beam":
        return ids, {"num_beams": 3}
    if mode == "beam_several":
        return prompt(LENGTH, 2), {"num_beams": 3, "num_return_sequences": 2}
    if mode == "return_two":
        return ids, {"do_sample": True, "num_return_sequences": 2}
    if mode == "assisted":
        # A Llama drafts for every model: transformers 5.17 cannot draft with a sliding-window model, whatever the cache.
        return ids, {"assistant_model": drafter("llama", dtype)}
    if mode == "prompt_lookup":
        return periodic_prompt(), {"prompt_lookup_num_tokens": 5}
    if mode == "padded":
        ids, mask = padded((LENGTH, 200, 17))
        return ids, {"attention_mask": mask}
    if mode == "chunked":
        return ids, {"prefill_chunk_size": 96}
    if mode == "padded_chunked":
        ids, mask = padded((LENGTH, 150))
        return ids, {"attention_mask": mask, "prefill_chunk_size": 100}
    raise ValueError(mode)


MODES = [
    "sampling",
    "beam",
    "beam_several",
    "return_two",
    "assisted",
    "prompt_lookup",
    "padded",
    "chunked",
    "padded_chunked",
]
MODE_STEPS = 24


def run_mode(model: PreTrainedModel, mode: str, kind: str, dtype: torch.dtype, cache: Any) -> Any:
    """One generation, from a fixed random state."""
    ids, options = mode_arguments(mode, kind, dtype)
    torch.manual_seed(11)
    return generate(model, ids, MODE_STEPS, cache, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gemma3", torch.float32)], ids=str
)
def test_every_mode_is_bit_identical_at_zero_tolerance(mode: str, kind: str, dtype: torch.dtype) -> None:
    model = shared_model(kind, dtype)
    expected = run_mode(model, mode, kind, dtype, DynamicCache(config=model.config))
    cache = exact_cache(model)
    assert_same_generation(run_mode(model, mode, kind, dtype, cache), expected)
    assert quantised_layers(cache) == 2
    assert cache.report().to_dict()["materialised_operations"] == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gemma3", torch.float32)], ids=str
)
def test_every_mode_is_certified_at_the_default_tolerance(mode: str, kind: str, dtype: torch.dtype) -> None:
    model = shared_model(kind, dtype)
    cache = new_cache(model, audit=True)
    run_mode(model, mode, kind, dtype, cache)
    assert_certified(cache, share=0.5)
    assert cache.report().to_dict()["overall"]["relative"]["bound"]["max"] <= 0.02


def test_assistant_drafts_are_partly_accepted() -> None:
    """The assisted mode above really rolls back some drafts and keeps others."""
    model = shared_model("llama")
    cache = exact_cache(model)
    crops: list[int] = []
    original = cache.crop

    def crop(tokens_to_remove: int) -> None:
        crops.append(tokens_to_remove)
        original(tokens_to_remove)

    cache.crop = crop  # type: ignore[method-assign]
    run_mode(model, "assisted", "llama", torch.float32, cache)
    assert min(crops) < 0
    assert len(crops) < MODE_STEPS - 1  # some rounds produced more than one token


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversation_of_several_turns(kind: str, dtype: torch.dtype) -> None:
    model = shared_model(kind, dtype)
    caches = [DynamicCache(config=model.config), exact_cache(model)]
    transcripts = [prompt(200), prompt(200)]
    for turn in range(4):
        outs = [generate(model, ids, 20, cache) for ids, cache in zip(transcripts, caches, strict=True)]
        assert_same_generation(outs[1], outs[0])
        transcripts = [torch.cat([out.sequences, prompt(40 + turn, seed=50 + turn)], dim=1) for out in outs]
    assert quantised_layers(caches[1]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_by_hand(kind: str, dtype: torch.dtype) -> None:
    """Chunks of many, few and single tokens, over the length where quantising starts."""
    model, ids = shared_model(kind, dtype), prompt(450, 2)
    oracle, cache = DynamicCache(config=model.config), exact_cache(model)
    certified = new_cache(model, audit=True)
    start = 0
    with torch.no_grad():
        for count in [100, 1, 1, 60, 95, 1, 1, 16, 2, 17, 40, 1, 5, 64, 1, 1]:
            chunk = ids[:, start : start + count]
            expected, actual, near = (
                model(chunk, past_key_values=past, use_cache=True).logits for past in (oracle, cache, certified)
            )
            assert torch.equal(actual, expected), f"{count} tokens at {start}"
            assert torch.isfinite(near).all()
            start += count
            for past in (cache, certified):
                assert past.get_seq_length() == oracle.get_seq_length() == start
    assert_certified(certified)


def test_reset_cache_serves_again() -> None:
    """One cache object, reset between prompts of different lengths and batch sizes, gives what a new one gives."""
    model, cache = shared_model("llama"), exact_cache(shared_model("llama"))
    for length, batch in [(330, 1), (330, 1), (280, 3), (40, 2), (400, 1)]:
        ids = prompt(length, batch, seed=length)
        expected = generate(model, ids, 8, DynamicCache(config=model.config))
        assert_same_generation(generate(model, ids, 8, cache), expected)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_repeated_runs_are_deterministic() -> None:
    model, ids = shared_model("llama", torch.bfloat16), prompt(LENGTH)
    first, second = (generate(model, ids, 24, new_cache(model)) for _ in range(2))
    assert_same_generation(second, first)


def test_two_caches_interleaved() -> None:
    """Nothing is shared: two conversations taken in turns give what each gives alone."""
    model = shared_model("llama")
    prompts = [prompt(LENGTH, seed=seed) for seed in (1, 2)]
    alone = [generate(model, ids, 16, new_cache(model)) for ids in prompts]
    caches = [new_cache(model), new_cache(model)]
    fed = list(prompts)
    logits: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for _ in range(16):
            for i in range(2):
                last = model(fed[i], past_key_values=caches[i], use_cache=True, logits_to_keep=1).logits[:, -1]
                logits[i].append(last)
                fed[i] = last.argmax(-1, keepdim=True)
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(logits[i], alone[i].logits, strict=True))


def test_tiny_tolerance_tracks_the_dense_model() -> None:
    """In float32 the certified logits approach the dense ones as the tolerance shrinks."""
    model, ids = shared_model("llama"), prompt(LENGTH)
    forced = generate(model, ids, 16, DynamicCache(config=model.config))
    dense = torch.stack(forced.logits)

    def deviation(rtol: float) -> float:
        cache, out = new_cache(model, rtol=rtol, audit=True), []
        with torch.no_grad():
            out.append(model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1])
            for token in forced.sequences[0, LENGTH:-1]:
                out.append(model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[:, -1])
        return float((torch.stack(out) - dense).abs().max() / dense.abs().max())

    coarse, fine = deviation(0.2), deviation(0.005)
    assert 0 < fine < coarse < 0.2
    assert deviation(0.0) == 0.0


class TestNamedImplementation:
    """`attn_implementation="certkv"`."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_llama_equals_sdpa_at_zero_tolerance(self, dtype: torch.dtype) -> None:
        ids = prompt(LENGTH)
        sdpa, certkv = shared_model("llama", dtype), shared_model("llama", dtype, "certkv")
        expected = generate(sdpa, ids, STEPS, DynamicCache(config=sdpa.config))
        assert_same_generation(generate(certkv, ids, STEPS, exact_cache(certkv)), expected)
        assert_same_generation(generate(certkv, ids, STEPS, DynamicCache(config=certkv.config)), expected)

    def test_llama_is_certified(self) -> None:
        model = shared_model("llama", torch.bfloat16, "certkv")
        for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 96}):
            cache = new_cache(model, audit=True)
            generate(model, prompt(LENGTH), 16, cache, **options)
            assert_certified(cache, share=0.9)

    def test_padded_batch_agrees_with_sdpa(self) -> None:
        ids, mask = padded((LENGTH, 200, 17))
        sdpa, certkv = shared_model("llama"), shared_model("llama", torch.float32, "certkv")
        expected = generate(sdpa, ids, 24, DynamicCache(config=sdpa.config), attention_mask=mask)
        actual = generate(certkv, ids, 24, exact_cache(certkv), attention_mask=mask)
        assert torch.equal(actual.sequences, expected.sequences)
        for ours, theirs in zip(actual.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("chunk", [None, 100])
    @pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
    def test_softcap_and_sinks_agree_with_eager(self, kind: str, chunk: int | None) -> None:
        """Float32, the same tokens fed to both; the feature itself moves the logits a thousand times further."""
        eager, certkv = (shared_model(kind, torch.float32, name) for name in ("eager", "certkv"))
        tokens = prompt(LENGTH + 24, 2)

        def logits(model: PreTrainedModel, cache: Any) -> Tensor:
            out = []
            with torch.no_grad():
                for part in tokens[:, :LENGTH].split(chunk or LENGTH, dim=1):
                    out.append(model(part, past_key_values=cache, use_cache=True).logits)
                for i in range(LENGTH, tokens.shape[1]):
                    out.append(model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
            return torch.cat(out, dim=1)

        expected = logits(eager, DynamicCache(config=eager.config))
        cache = exact_cache(certkv)
        actual = logits(certkv, cache)
        assert quantised_layers(cache) == 1 and served(cache)["dense_layer"] == 24 * 2 * 4
        size = expected.abs().max()
        assert (actual - expected).abs().max() <= 2e-5 * size
        without = copy.deepcopy(eager)
        for name, module in without.named_modules():
            if kind == "gemma2" and hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
            if kind == "gpt_oss" and name.endswith("self_attn"):
                module.sinks.data.fill_(-1e4)  # type: ignore[union-attr]
        changed = logits(without, DynamicCache(config=eager.config))
        assert (changed - expected).abs().max() > 2e-2 * size

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
    def test_softcap_and_sinks_are_certified(self, kind: str, dtype: torch.dtype) -> None:
        model = shared_model(kind, dtype, "certkv")
        for ids, options in [
            (prompt(LENGTH, 2), {}),
            (padded((LENGTH, 100))[0], {"attention_mask": padded((LENGTH, 100))[1]}),
            (prompt(LENGTH), {"num_beams": 2}),
            (periodic_prompt(), {"prompt_lookup_num_tokens": 4}),
        ]:
            cache = new_cache(model, audit=True)
            generate(model, ids, 12, cache, **options)
            assert_certified(cache, share=0.25)

    @pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
    def test_bfloat16_is_as_close_to_float32_as_eager_is(self, kind: str) -> None:
        """One decode step of attention in bfloat16 against float64, beside eager's own error."""
        models = {name: shared_model(kind, torch.bfloat16, name) for name in ("eager", "certkv")}
        ids = prompt(LENGTH + 1, 2)
        layer = models["eager"].config.layer_types.index("full_attention")
        outputs: dict[str, Tensor] = {}
        for name, model in models.items():
            cache = DynamicCache(config=model.config) if name == "eager" else exact_cache(model)
            module = model.model.layers[layer].self_attn
            with torch.no_grad():
                model(ids[:, :LENGTH], past_key_values=cache, use_cache=True)
                generator = torch.Generator().manual_seed(9)
                hidden = torch.randn(2, 1, 64, generator=generator).to(torch.bfloat16)
                position = torch.full((2, 1), LENGTH)
                angles = _rotary(model, hidden, position, "full_attention")
                for before in range(layer):  # a step begins with the first layer
                    held = cache.layers[before]
                    cache.update(held.keys[:, :, -1:], held.values[:, :, -1:], before)
                outputs[name] = module(hidden, position_embeddings=angles, attention_mask=None, past_key_values=cache)[
                    0
                ].double()
        size = outputs["eager"].abs().max()
        assert (outputs["certkv"] - outputs["eager"]).abs().max() <= 2**-5 * size

    def test_unknown_keyword_is_refused(self) -> None:
        model = shared_model("llama", torch.float32, "certkv")
        with torch.no_grad(), pytest.raises(InputError, match="strange_mask"):
            model(prompt(20), past_key_values=new_cache(model), use_cache=True, strange_mask=torch.ones(1))
        with torch.no_grad():
            model(prompt(20), past_key_values=new_cache(model), use_cache=True, strange_mask=None)

    def test_unknown_keyword_while_decoding_undoes_the_step(self) -> None:
        model = shared_model("llama", torch.float32, "certkv")
        cache, oracle = exact_cache(model), DynamicCache(config=model.config)
        with torch.no_grad():
            for past in (cache, oracle):
                model(prompt(LENGTH), past_key_values=past, use_cache=True)
            with pytest.raises(InputError, match="strange_mask"):
                model(prompt(1), past_key_values=cache, use_cache=True, strange_mask=torch.ones(1))
            assert [layer.get_seq_length() for layer in cache.layers] == [LENGTH, LENGTH]
            ours, theirs = (model(prompt(1), past_key_values=past, use_cache=True).logits for past in (cache, oracle))
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("name", ["logit_bias", "head_mask", "block_table", "cu_seq_lens_q", "max_length_q"])
    def test_unknown_keyword_is_refused_directly(self, name: str) -> None:
        part = torch.randn(1, 2, 4, 8)
        module = torch.nn.Identity()
        with pytest.raises(InputError, match=name):
            certkv_attention(module, part, part, part, None, **{name: torch.ones(1)})
        output, weights = certkv_attention(module, part, part, part, None, **{name: None})
        assert weights is None
        exact = torch.nn.functional.scaled_dot_product_attention(part, part, part, is_causal=True)
        assert torch.equal(output, exact.transpose(1, 2))

    def test_output_weights_are_refused(self) -> None:
        part = torch.randn(1, 2, 4, 8)
        with pytest.raises(InputError, match="output_attentions"):
            certkv_attention(torch.nn.Identity(), part, part, part, None, output_attentions=True)


def _rotary(model: PreTrainedModel, hidden: Tensor, position: Tensor, kind: str) -> Any:
    """The position embeddings that a full-attention layer of the model gets."""
    rotary = model.model.rotary_emb
    try:
        return rotary(hidden, position, kind)
    except TypeError:
        return rotary(hidden, position)


def test_all_layers_sliding_says_so() -> None:
    model = shared_model("mistral_sliding")
    with pytest.warns(UserWarning, match="No layer of MistralConfig is full attention"):
        cache = new_cache(model)
    assert cache.certified_layers == [] and all(cache.is_sliding)
    assert cache.report().exact_layers == dict.fromkeys(range(2), "DynamicSlidingWindowLayer")


def test_mixed_layers_are_told_apart() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = new_cache(shared_model("gemma3"))
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "CertifiedLayer"] * 2
    assert cache.is_sliding == [True, False, True, False]
