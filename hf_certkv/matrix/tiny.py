"""Tiny models of any architecture: the sizes of a default config replaced by small ones that agree with one another.

What belongs to the architecture stays: kinds of layers, head grouping, rotary factors, softcaps, sinks. Sizes are known by the
names that transformers gives them.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .hints import FIRST, HINTS, WEIGHTS

HEADS, KV_HEADS, CHANNELS = 4, 2, 32
HIDDEN = HEADS * CHANNELS
VOCABULARY = 256
LAYERS = 4
POSITIONS = 2560

# The first pattern that matches a whole name gives its size.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", KV_HEADS),
    (r"((en|de)coder_|(swa_|conf_)?num_|num_(en|de)coder_)?attention_heads|n_heads?|num_heads|index_n_heads", HEADS),
    (r"linear_num(_key|_value)?_heads", HEADS),
    (r"(swa_|index_|linear_|linear_key_|linear_value_|mamba_)?head_dim|d_head|kv_channels|dim_head", CHANNELS),
    (r"attention_head_size|query_pre_attn_scalar", CHANNELS),
    (r"mamba_d_head|mamba_headdim", CHANNELS),
    (r"n_mamba_heads|mamba_n_heads|mamba_num_heads", 2 * HEADS),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|word_embed_proj_dim|lru_width|backbone_hidden_size", HIDDEN),
    (r"hidden_size_global|(input_|output_)?embedding_size|embedding_dim|adapter_(in_dim|out_dim|input_size)", HIDDEN),
    (r"attention_hidden_size|mamba_d_ssm", 2 * HIDDEN),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(dim|hidden_size)|feed_forward_size", 2 * HIDDEN),
    (r"d_inner|n_inner|dff|dim_ff|mlp_dim", 2 * HIDDEN),
    (r"(.*_)?vocab_size(_per_layer_input|_base)?|codebook_size|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks|depth", LAYERS),
    (r"(moe_|num_|n_|num_local_|moe_num_|n_routed_)experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts", 1),
    (r"qk_nope_head_dim|v_head_dim", CHANNELS),
    (r"qk_rope_head_dim", CHANNELS // 2),
    (r"qk_head_dim", CHANNELS + CHANNELS // 2),
    (r"q_lora_rank|kv_lora_rank", 64),
    (r"sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size|local_attention", 48),
    (r"rotary_dim", CHANNELS // 2),
    (r"index_block_size", 32),
    (r"index_topk_blocks|zero_expert_num", 2),
    (r"max_position_embeddings|n_positions|max_target_positions|model_max_length|context_length|n_ctx|max_seq_len", POSITIONS),
)  # fmt: skip
# Lists that say of each layer what it is.
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "attn_layers", "indexer_types")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
# Settings of a run, not of an architecture: some sub-configs do not take them.
RUN = ("_name_or_path", "output_attentions")
# Values that a default config may have or not.
FIXED: dict[str, Any] = {
    "is_decoder": True,
    "add_cross_attention": False,
    "use_cache": True,
    "forced_eos_token_id": None,
    "w_init_variance_scale": 1.0,
}
# Weights this large give attention scores that differ from one another.
SPREAD = 1.5 / HIDDEN**0.5
SPREADS = ("initializer_range", "init_std", "initializer_factor")


def architectures() -> list[str]:
    """All model types that the installed transformers can build for causal language modelling."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type with small sizes."""
    kind = CONFIG_MAPPING[model_type]
    return kind.from_dict(_shrunk(kind(**copy.deepcopy(FIRST.get(model_type, {}))).to_dict()))


def tiny_model(
    config: PreTrainedConfig, seed: int = 0, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A random model in evaluation mode; without a name of an attention implementation the model takes its default."""
    torch.manual_seed(seed)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            for ending, value in WEIGHTS.get(config.model_type, {}).items():
                if name.endswith(ending):
                    weights.fill_(value)
    return model


def _shrunk(given: dict[str, Any]) -> dict[str, Any]:
    """A config's dictionary with small sizes; of its sub-configs too."""
    kept = _layers_kept(given)
    before = next((given[name] for name in COUNTS if given.get(name)), None)
    out: dict[str, Any] = {}
    for name, value in given.items():
        if name in RUN:
            continue
        if isinstance(value, dict) and "model_type" in value:
            out[name] = _shrunk(value)
        elif isinstance(value, (list, tuple)) and before is not None and len(value) == before:
            out[name] = [_size(name, value[i], len(kept)) for i in kept]
        else:
            out[name] = _size(name, value, len(kept))
    for name, value in given.items():
        if re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, (int, list)):
            out[name] = _token(name, value)
    out |= {name: value for name, value in FIXED.items() if name in given}
    out |= {name: SPREAD for name in SPREADS if name in given}
    _relate(given, out)
    if isinstance(given.get("per_layer_config"), dict):
        out["per_layer_config"] = _layers_changed(given, out, kept)
    return _hinted(out, HINTS.get(given.get("model_type", ""), {}))


def _layers_kept(given: dict[str, Any]) -> list[int]:
    """Layers that stay: one of each kind at least, and the first ones."""
    lists = [given[name] for name in KINDS if isinstance(given.get(name), (list, tuple)) and given[name]]
    count = len(lists[0]) if lists else 0
    if not count:
        return list(range(LAYERS))
    kinds = [tuple(str(part[i]) for part in lists if len(part) == count) for i in range(count)]
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    kept = set(first.values())
    for i in range(count):
        if len(kept) >= min(LAYERS, count):
            break
        kept.add(i)
    return sorted(kept)


def _layers_changed(given: dict[str, Any], out: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """What single layers have of their own: as many times the value of the other layers as before."""
    return {
        str(kept.index(int(i))): {
            name: value * out[name] // given[name] if isinstance(value, int) and given.get(name) else value
            for name, value in part.items()
        }
        for i, part in given["per_layer_config"].items()
        if int(i) in kept
    }


def _relate(given: dict[str, Any], out: dict[str, Any]) -> None:
    """Sizes that follow from others."""
    if out.get("kv_lora_rank"):
        out["num_key_value_heads"] = out["num_attention_heads"]
        if "head_dim" in out and given["head_dim"] == given["qk_rope_head_dim"]:
            out["head_dim"] = out["qk_rope_head_dim"]
    if "attention_head_dim" in out:
        out["attention_head_dim"] = out["attention_hidden_size"] // out["num_attention_heads"]


def _hinted(out: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """The dictionary with hints put in; kinds of layers set their number."""
    for name, value in hints.items():
        if isinstance(value, dict) and isinstance(out.get(name), dict) and "model_type" in out[name]:
            _hinted(out[name], value)
        else:
            out[name] = copy.deepcopy(value)
        if name in KINDS:
            out |= {count: len(value) for count in COUNTS if count in out}
    return out


def _size(name: str, value: Any, layers: int) -> Any:
    """The small size that goes with a name; other values stay."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if size == LAYERS and "layer" in name:
                return layers
            return size if size == POSITIONS else min(size, value) if value > 0 else value
    return value


def _token(name: str, value: int | list[int]) -> int | list[int]:
    """A special token within the small vocabulary: the few that matter in front, others at the end."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name in known:
        return known[name]
    whole = value if isinstance(value, int) else value[0]
    return whole if whole < VOCABULARY else VOCABULARY - 6 + whole % 6
