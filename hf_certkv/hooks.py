"""accelerate hooks on the decoder layers: fetch before a layer, flush behind it. Chained, reversible.

Without them everything is correct as well: `update` and the decode step do the same, only later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .layers import CertifiedLayer

if TYPE_CHECKING:
    from .cache import CertifiedQuantizedCache


class CertKVHook(ModelHook):
    """Before a layer: let the next layer prepare its originals. Behind it: settle the copies of the layer itself."""

    no_grad = False

    def __init__(self, cache: CertifiedQuantizedCache, layer_idx: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Start fetching what the following layer is likely to promote."""
        layers = self.cache.layers
        following = layers[(self.layer_idx + 1) % len(layers)]
        if kwargs.get("past_key_values") is self.cache and isinstance(following, CertifiedLayer):
            following.prefetch()
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Flush: checksums of blocks whose copy to the host has arrived."""
        layer = self.cache.layers[self.layer_idx]
        if isinstance(layer, CertifiedLayer):
            layer.flush()
        return output


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of decoder layers: the longest `ModuleList` whose length is the config's number of layers.

    Raises: UnsupportedModelError: there is none.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for _, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no module list of {count} decoder layers to attach to. Build the cache from "
        "`model.config` instead: it works without hooks."
    )


def attach(model: PreTrainedModel, cache: CertifiedQuantizedCache) -> None:
    """Put one hook on each decoder layer, behind those that are already there (`device_map`, offloading).

    Attaching twice replaces nothing and raises. `detach(cache)` restores the modules exactly.
    """
    if cache.handles is not None:
        raise UnsupportedModelError("This cache is attached to a model already; call `detach(cache)` first.")
    modules = decoder_layers(model)
    hooked: list[tuple[torch.nn.Module, CertKVHook, ModelHook | None]] = []
    for i, module in enumerate(modules):
        hook, before = CertKVHook(cache, i), getattr(module, "_hf_hook", None)
        add_hook_to_module(module, hook, append=before is not None)
        hooked.append((module, hook, before))
    cache.handles = hooked


def detach(cache: CertifiedQuantizedCache) -> None:
    """Take the hooks of this cache off; hooks that were there before, or were added since, stay."""
    for module, hook, before in cache.handles or []:
        current = getattr(module, "_hf_hook", None)
        if current is hook:
            remove_hook_from_module(module)
        elif isinstance(current, SequentialHook):
            _without(module, current, hook, before)
    cache.handles = None


def _without(module: torch.nn.Module, current: SequentialHook, hook: CertKVHook, before: ModelHook | None) -> None:
    """Take one hook out of a chain; a chain of one is that one again."""
    rest = _flatten(current, hook)
    if len(rest) == len(_flatten(current, None)):
        return
    if before is not None and rest == _flatten(before, None):
        module._hf_hook = before
    else:
        module._hf_hook = rest[0] if len(rest) == 1 else SequentialHook(*rest)


def _flatten(hook: ModelHook, leave_out: ModelHook | None) -> list[ModelHook]:
    if hook is leave_out:
        return []
    if isinstance(hook, SequentialHook):
        return [part for inner in hook.hooks for part in _flatten(inner, leave_out)]
    return [hook]
