"""lm-evaluation-harness with a cache of one's choice: any of its tasks, a fresh cache for every batch that it generates.

    lm = CertifiedLM(model, tokenizer=tokenizer, rtol=0.05)
    results = lm_eval.simple_evaluate(model=lm, tasks=["gsm8k"])
    print(lm.report())

The model is registered as `hf-certkv` when this module is imported; lm-eval's own command with it is

    python -m hf_certkv.evaluation.harness_model --model hf-certkv --model_args pretrained=NAME,rtol=0.05 --tasks gsm8k

Only tasks that generate (`output_type: generate_until`) say something about a cache. A log likelihood is one reading of
question and answer: attention to tokens of the same call is exact in every cache, so such scores are the dense ones.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import CertifiedQuantizedCache
from ..config import CertKVConfig
from ..errors import ConfigError, MissingDependencyError
from ..report import CertificateReport, MemoryReport
from .evidence import Evidence

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependencyError(f"this needs lm-eval ({error}): pip install 'hf_certkv[eval]'.") from error

SETTINGS = {field.name for field in dataclasses.fields(CertKVConfig)}
logger = logging.getLogger(__name__)


@dataclass
class Call:
    """One batch generated. cache: filled; prompt, new: tokens of the longest prompt (padding included), and generated."""

    cache: Any
    prompt: int
    new: int


@register_model("hf-certkv")
class CertifiedLM(HFLM):
    """lm-eval's Hugging Face model, with a fresh cache for every batch.

    A log likelihood is computed through a fresh cache too, but in one call that reads an empty one: no cache quantises what
    it attends to there, so scores are exact, certify nothing and are not reported.

    Args:
        pretrained: a loaded model, or what `from_pretrained` takes.
        make_cache: makes an empty cache; None is `CertifiedQuantizedCache` with the settings among the options.
        on_call: gets each batch's cache; None adds the certificates up for `report`, and keeps no cache.
        options: fields of `CertKVConfig`; all others are for lm-eval's `HFLM` (`tokenizer`, `batch_size`, `max_length`, ...).

    Raises: ConfigError: a setting out of range, or settings beside `make_cache`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        make_cache: Callable[[], Any] | None = None,
        on_call: Callable[[Call], None] | None = None,
        **options: Any,
    ) -> None:
        given = {name: options.pop(name) for name in SETTINGS & set(options)}
        if make_cache is not None and given:
            raise ConfigError(f"make_cache and {', '.join(sorted(given))}: expected one or the other.")
        settings = CertKVConfig(**given)
        super().__init__(pretrained, **options)
        self.make_cache = make_cache or partial(CertifiedQuantizedCache, self.model.config, settings=settings)
        self.on_call = on_call or self._add
        self._evidence = Evidence(steps=1)
        self._settings: CertKVConfig | None = None
        self._told = False

    def _add(self, call: Call) -> None:
        if isinstance(call.cache, CertifiedQuantizedCache):
            self._evidence.add(call.cache)
            self._settings = call.cache.settings

    def report(self) -> CertificateReport | None:
        """Certificates of all batches generated so far, added up; memory is that of the longest. None before the first."""
        if self._settings is None:
            return None
        seen = self._evidence
        return CertificateReport(self._settings, seen.recorder, seen.memory or MemoryReport({}, 0), seen.exact_layers)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results, the certificates over all layers among it."""
        info: dict[str, Any] = super().get_model_info()
        report = self.report()
        if report is not None:
            info["certificates"] = {name: part for name, part in report.to_dict().items() if name != "layers"}
        return info

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = self.make_cache()
        found: Tensor = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        self.on_call(Call(cache, context.shape[1], found.shape[1] - context.shape[1]))
        return found

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        kind, wider = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=kind, dtype=wider, enabled=wider is not None):
            logits: Tensor = self.model(inps, past_key_values=self.make_cache(), use_cache=True).logits
        return logits

    def _loglikelihood_tokens(self, *arguments: Any, **options: Any) -> Any:
        if not self._told:
            logger.warning("log likelihoods are computed in one exact call each: these scores say nothing about the cache.")
            self._told = True
        return super()._loglikelihood_tokens(*arguments, **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
