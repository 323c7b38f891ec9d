"""accelerate hooks on the decoder layers: fetch before a layer, flush behind it. Chained, reversible.

Without them everything is correct as well: `update` and the decode step do the same, only later. On CUDA the hot slots of the
next layer are refilled on a side stream while this layer is computed.
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


_INHERITED = object()  # the module had no `forward` of its own, only its class's


class CertKVHook(ModelHook):
    """Before a layer: let the next layer prepare its originals. Behind it: settle the copies of the layer itself."""

    no_grad = False

    def __init__(self, cache: CertifiedQuantizedCache, layer_idx: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx
        self.hook_before: ModelHook | None = None  # the module's, before the first hook of this kind came
        self.forward_before: Any = _INHERITED

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Start fetching what the following layer is likely to promote."""
        layers = self.cache.layers
        following = layers[(self.layer_idx + 1) % len(layers)]
        if kwargs.get("past_key_values") is self.cache and isinstance(following, CertifiedLayer):
            with self.cache.step_guard(), self.cache.ranks.together(wait=False):
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
    hooked: list[tuple[torch.nn.Module, CertKVHook]] = []
    for i, module in enumerate(decoder_layers(model)):
        hook, present = CertKVHook(cache, i), getattr(module, "_hf_hook", None)
        hook.hook_before, hook.forward_before = present, module.__dict__.get("forward", _INHERITED)
        for other in _flatten(present):
            if isinstance(other, CertKVHook):
                hook.hook_before, hook.forward_before = other.hook_before, other.forward_before
                break
        add_hook_to_module(module, hook, append=present is not None)
        hooked.append((module, hook))
    cache.handles = hooked


def detach(cache: CertifiedQuantizedCache) -> None:
    """Take the hooks of this cache off; hooks that were there before, or were added since, stay."""
    for module, hook in cache.handles or []:
        present = _flatten(getattr(module, "_hf_hook", None))
        if hook not in present:
            continue
        rest = [other for other in present if other is not hook]
        if rest != _flatten(hook.hook_before):
            module._hf_hook = rest[0] if len(rest) == 1 else SequentialHook(*rest)
            continue
        # As it was. accelerate leaves, or makes anew, an instance attribute `forward` that does the same.
        if hook.hook_before is None:
            remove_hook_from_module(module)
        else:
            module._hf_hook = hook.hook_before
        if hook.forward_before is _INHERITED:
            module.__dict__.pop("forward", None)
        else:
            module.forward = hook.forward_before
    cache.handles = None


def _flatten(hook: ModelHook | None) -> list[ModelHook]:
    """The single hooks of a chain, in their order."""
    if hook is None:
        return []
    if isinstance(hook, SequentialHook):
        return [part for inner in hook.hooks for part in _flatten(inner)]
    return [hook]
