"""What the default config of an architecture leaves out or has otherwise than the published models."""

from __future__ import annotations

from typing import Any

FULL, SLIDING, LINEAR, CONV, HYBRID = "full_attention", "sliding_attention", "linear_attention", "conv", "hybrid"
# Where the default scale of attention scores is 1.
SCALE = {"attention_multiplier": 0.125}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Layers 2 and 3 take the keys and values of layers 0 and 1.
SHARED: dict[str, Any] = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2}
# Every layer takes the keys and values of another model.
ASSISTANT: dict[str, Any] = {"num_kv_shared_layers": 4}
NO_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "enable_moe_block": False}
QWEN4 = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 32, "indexer_compress_ratio": 4}

# Arguments without which a default config cannot be made.
FIRST: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **NO_LAYER_INPUT, "use_double_wide_mlp": False}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
}

# Changes to the small config, by model type (of a sub-config too).
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "bloom": {"hidden_size": 128, "n_head": 4, "n_layer": 4},
    "blt": {"num_hidden_layers": 4},
    "cohere_compass_text": {
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "rope_parameters": {SLIDING: {**ROPE, "mrope_section": [8, 4, 4]}, FULL: None},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 500000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 64},
    "falcon_h1": {"mamba_d_head": 32},
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4_text": {**SHARED, "per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 64}}},
    "gemma4_unified_assistant": {"text_config": ASSISTANT},
    "granite": SCALE,
    "granite_swa": SCALE,
    "granitemoe": SCALE,
    "granitemoe_swa": SCALE,
    "granitemoehybrid": {**SCALE, "layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "granitemoeshared": SCALE,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"swa_num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": [FULL, SLIDING, SLIDING, FULL], "num_attention_heads_per_layer": [4, 6, 6, 4]},
    "lfm2": {"layer_types": [CONV, FULL, CONV, FULL], "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV, FULL]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "mimo_v2_flash": {"head_dim": 48},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse", FULL, "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "ministral": {"head_dim": 32, "layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "moshi": {"sliding_window": 2560},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": QWEN4,
    "reformer": {"axial_pos_embds_dim": [32, 96], "axial_pos_shape": [40, 64]},
    "rwkv": {"attention_hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID]},
    "zamba2": {"layers_block_type": [LINEAR, HYBRID, LINEAR, HYBRID], "hybrid_layer_ids": [1, 3]},
    "zaya": {"layer_types": ["hybrid_sliding", HYBRID, "hybrid_sliding", HYBRID], "sliding_window": 48},
}

# Weights by the end of their names, where the initial value leaves attention without effect.
WEIGHTS: dict[str, dict[str, float]] = {"zaya": {".temp": 1.0}}
