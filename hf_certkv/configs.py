"""What a model's config says of one layer. Newer models say it layer by layer, and refuse to be asked for all at once."""

from __future__ import annotations

from transformers import PreTrainedConfig


def layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """The config of a layer of the text model: the text config itself where all layers are alike, or for one beyond them."""
    text = config.get_text_config(decoder=True)
    if not getattr(text, "is_heterogeneous", False) or not 0 <= index < text.num_hidden_layers:
        return text
    layer: PreTrainedConfig = text.per_layer_config[index]
    return layer


def query_groups(config: PreTrainedConfig, index: int) -> int | None:
    """Query heads of each KV head of a layer; None where the config does not say."""
    layer = layer_config(config, index)
    heads, shared = (getattr(layer, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    return heads // shared if isinstance(heads, int) and isinstance(shared, int) and shared else None
