"""`generate` with a certified quantised KV cache: transformers' own `generate`, given a `CertifiedQuantizedCache`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationMixin

from hf_certkv import CertifiedQuantizedCache, CertKVConfig, ConfigError, InputError

SETTINGS = frozenset(field.name for field in dataclasses.fields(CertKVConfig))
# What says where this file comes from: transformers hands it on with everything else, and `generate` does not know it.
ORIGIN = frozenset(("revision", "token", "cache_dir", "force_download", "proxies", "local_files_only", "repo_type"))


def generate(
    *inputs: Any,
    model: GenerationMixin | None = None,
    certkv_config: CertKVConfig | Mapping[str, Any] | str | Path | None = None,
    print_report: bool = False,
    past_key_values: Any = None,
    **options: Any,
) -> Any:
    """Runs the model's own `generate` with a cache whose attention outputs are certified.

    Args:
        inputs: as `generate` takes them by position; before them the model, unless `model` names it.
        model: the model. transformers gives it by name, also where `model.generate` is this function and the inputs come by
            position.
        certkv_config: settings of the cache: a `CertKVConfig`, a dictionary, or where `CertKVConfig.from_pretrained` finds them
            (a folder, a file, a name on the Hub).
        print_report: whether to print the certificate when the text is finished.
        past_key_values: a `CertifiedQuantizedCache` to go on with; None makes one.
        options: single settings of `CertKVConfig` (`rtol`, `atol`, `scope`, `value_bits`, ...), which override
            `certkv_config`; all others go to `generate`.

    Returns:
        What `generate` returns: token ids `[rows, tokens]`, or with `return_dict_in_generate=True` an output whose
        `past_key_values` is the cache: `output.past_key_values.report()` is the certificate.

    Raises:
        ConfigError: a setting is out of range, was given beside a cache that has its own, or `use_cache` is false.
        InputError: `past_key_values` is another kind of cache; there is no model.
        UnsupportedModelError: the model has a cache layout that cannot be served.
    """
    if model is None and inputs:
        model, *rest = inputs
        inputs = tuple(rest)
    if not isinstance(model, GenerationMixin):
        raise InputError(f"generate(model, ...): the model is a {type(model).__name__}; expected a model of transformers.")
    settings = {name: options.pop(name) for name in SETTINGS & options.keys()}
    options = {name: value for name, value in options.items() if name not in ORIGIN}
    if not _uses_cache(model, options):
        raise ConfigError("use_cache=False: a certified cache needs it. Leave it out, or call `generate` without this method.")
    cache = _cache(model, past_key_values, certkv_config, settings)
    # The class's function: `model.generate` itself is this one where the model was loaded together with it.
    output = type(model).generate(model, *inputs, past_key_values=cache, **options)
    if print_report:
        report = cache.report()
        nothing = "Nothing was quantised, so every step was exact: so few tokens (or no layer of this model) call for it."
        print(report if report.to_dict()["overall"]["head_steps"] else nothing)
    return output


def _uses_cache(model: GenerationMixin, options: Mapping[str, Any]) -> bool:
    config = options.get("generation_config") or model.generation_config
    return options.get("use_cache", config.use_cache) is not False


def _cache(model: GenerationMixin, given: Any, config: Any, settings: dict[str, Any]) -> CertifiedQuantizedCache:
    """The cache that was given, or a new one with these settings."""
    if given is not None and not isinstance(given, CertifiedQuantizedCache):
        raise InputError(
            f"past_key_values is a {type(given).__name__}, whose keys and values nothing here can certify; expected a "
            "CertifiedQuantizedCache, or none: then one is made."
        )
    if given is not None and (config is not None or settings):
        named = ", ".join(sorted(settings) + ["certkv_config"] * (config is not None))
        raise ConfigError(f"{named} and past_key_values were both given: the cache has settings already. Give one of them.")
    if given is not None:
        return given
    if isinstance(config, Mapping):
        config = CertKVConfig.from_dict(dict(config))
    elif isinstance(config, (str, Path)):
        config = CertKVConfig.from_pretrained(config)
    return CertifiedQuantizedCache(model, settings=config, **settings)
