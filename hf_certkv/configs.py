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
