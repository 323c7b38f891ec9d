"""`CertKVConfig`: every setting of the cache, validated once, frozen, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from . import hub
from .errors import ConfigError

Scope = Literal["head", "layer"]
Policy = Literal["budget", "paper", "naive"]
Refine = Literal["device", "host", "off"]
Record = Literal["summary", "full"]
Kernel = Literal["auto", "reference", "cpu", "triton"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "scope": get_args(Scope),
    "policy": get_args(Policy),
    "refine": get_args(Refine),
    "record": get_args(Record),
    "kernel": get_args(Kernel),
    "block_size": (16, 32, 64, 128),
    "value_bits": (4, 8),
}
MOST = 1e300  # of a tolerance
LARGEST = 2**62  # of a whole number
_AT_LEAST: dict[str, float] = {
    "rtol": 0.0,
    "atol": 0.0,
    "seed": 0,
    "sink_blocks": 0,
    "recent_window": 0,
    "exact_below": 0,
    "certify_queries": 1,
    "max_rounds": 1,
    "paper_k_min": 0,
    "paper_k_max": 1,
    "paper_v_tol": 0.0,
    "paper_rank_depth": 0,
}
_SHARES = ("dense_head_share", "dense_layer_share", "paper_tau_cov", "paper_explore")


@dataclass(frozen=True)
class CertKVConfig:
    """Settings of a certified cache. All have defaults; `paper()` and `naive()` are presets.

    The promise (docs/certificate.md, section 1): each returned head output `O` comes with a proven bound
    `B <= atol + rtol * ||O||_2`, or was recomputed densely on the originals.

    Args:
        rtol: relative tolerance, against the L2 norm of the returned head output.
        atol: absolute tolerance, in units of the values.
        scope: `"head"`: each query head meets the tolerance. `"layer"`: the heads of one layer, row and position
            share it, since the model consumes their concatenation.
        policy: `"budget"`: promote what lowers the bound most per byte moved. `"paper"`: promote what the published
            method would, then whatever the budget still needs. `"naive"`: promote nothing, fall back never, certify
            nothing (a baseline for comparisons).
        block_size: tokens a block (16, 32, 64 or 128).
        value_bits: bits of a value that the main pass reads (4 or 8). Keys have 8.
        value_group: channels that share a value scale; 0 puts the whole head in one group; None is 32 for 4-bit values and
            the whole head for 8-bit ones.
        refine: where the refinement planes (four further bits of keys, and of 4-bit values) live: `"device"`, `"host"`,
            or `"off"` to keep none.
        sink_blocks: first blocks of the sequence that stay exact on the device.
        recent_window: most recent tokens that stay exact on the device (the unfinished block comes on top).
        hot_blocks: blocks per layer, row and KV head whose originals may stay on the device after a promotion. None: none on a
            CPU; on CUDA what fits into 4 % of a dense cache's bytes.
        exact_below: caches of at most this many tokens are not quantised at all.
        certify_queries: calls with more new tokens than this (prefill chunks) are computed exactly from the originals.
        certify_sliding: quantise layers of sliding or chunked attention too, certified within their window. They are small:
            without, they stay exact in transformers' own layers.
        max_rounds: promotion rounds before a head is recomputed densely.
        dense_head_share: a head is recomputed densely when promoting would move more than this share of its originals.
        dense_layer_share: the whole layer is recomputed densely when more than this share of its heads is.
        record: `"summary"` keeps running summaries at constant memory; `"full"` keeps every step as well.
        audit: compare every certified output with float64 attention over the originals; raise when a bound is broken.
        kernel: what computes a certified call. `"auto"`: the Triton kernels on CUDA (extra `gpu`), the fused CPU kernel on a
            CPU (extra `cpu`), where they are installed and the format suits them, else plain torch. `"reference"`: plain
            torch. `"cpu"`, `"triton"`: as auto, but numba or triton must be there. Blocks are encoded by compiled code
            wherever it is installed: their codes are the same.
        seed: of the exploration in the paper's policy.
        paper_tau_cov, paper_k_min, paper_k_max, paper_v_tol, paper_rank_depth, paper_canary, paper_explore: the
            published method's monitors: coverage target, fewest and most blocks whose keys it raises, value threshold,
            depth of the ranking and boundary checks, score-consistency canary, share of blocks raised at random.

    Raises:
        ConfigError: a setting is outside its range.
    """

    rtol: float = 0.02
    atol: float = 0.0
    scope: Scope = "head"
    policy: Policy = "budget"
    block_size: int = 64
    value_bits: int = 4
    value_group: int | None = None
    refine: Refine = "host"
    sink_blocks: int = 1
    recent_window: int = 64
    hot_blocks: int | None = None
    exact_below: int = 256
    certify_queries: int = 16
    certify_sliding: bool = False
    max_rounds: int = 4
    dense_head_share: float = 0.5
    dense_layer_share: float = 0.5
    record: Record = "summary"
    audit: bool = False
    kernel: Kernel = "auto"
    seed: int = 0
    paper_tau_cov: float = 0.995
    paper_k_min: int = 2
    paper_k_max: int = 128
    paper_v_tol: float = 0.05
    paper_rank_depth: int = 1
    paper_canary: bool = True
    paper_explore: float = 0.02

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, (str, int)) or isinstance(value, bool) or value not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {choices}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value > LARGEST):
                raise ConfigError(f"{field.name}={str(value)[:40]}: expected a whole number below 2^62.")
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r}: expected True or False.")
            if field.type == "float" and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not -MOST <= value <= MOST
            ):
                raise ConfigError(f"{field.name}={value!r}: expected a finite number.")
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected at least {least}.")
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a share between 0 and 1.")
        hot = self.hot_blocks
        if hot is not None and (isinstance(hot, bool) or not isinstance(hot, int) or not 0 <= hot <= LARGEST):
            raise ConfigError(f"hot_blocks={str(hot)[:40]}: expected None or a whole number from 0 on.")
        group = self.value_group
        if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 0 or group == 1):
            raise ConfigError(f"value_group={group!r}: expected None, 0 (the whole head) or at least 2 channels.")
        if self.paper_k_max < self.paper_k_min:
            raise ConfigError(f"paper_k_max={self.paper_k_max}: expected at least paper_k_min={self.paper_k_min}.")

    @classmethod
    def paper(cls, **changes: Any) -> CertKVConfig:
        """The published method's formats and promotion policy; the promise of section 1 holds as always."""
        preset: dict[str, Any] = {
            "policy": "paper",
            "block_size": 16,
            "value_group": 16,
            "refine": "off",
            "seed": 0,
            "sink_blocks": 0,
            "recent_window": 0,
        }
        return cls(**{**preset, **changes})

    @classmethod
    def naive(cls, **changes: Any) -> CertKVConfig:
        """UNCERTIFIED baseline: the same formats and exact recent window, no promotion, no fallback, only logging."""
        return cls(**{"policy": "naive", **changes})

    @property
    def value_scale_channels(self) -> int:
        """Channels that share a value scale, 0 for the whole head: `value_group`, or what None stands for."""
        if self.value_group is not None:
            return self.value_group
        return 32 if self.value_bits == 4 else 0

    @property
    def certified(self) -> bool:
        """False for the naive baseline, whose bounds are logged and not enforced."""
        return self.policy != "naive"

    @property
    def exactly(self) -> bool:
        """Whether the tolerance is zero: every step is what a dense cache gives, bit for bit."""
        return self.certified and self.rtol == 0 and self.atol == 0

    def replace(self, **changes: Any) -> CertKVConfig:
        """A copy with some settings changed, validated again."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            known = ", ".join(field.name for field in dataclasses.fields(self))
            raise ConfigError(f"unknown setting(s) {unknown}: expected some of {known}.")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | Path) -> None:
        """Write all settings to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> CertKVConfig:
        """Settings from a dictionary; unknown names are refused."""
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise ConfigError(f"expected a dictionary of settings by name, got {type(settings).__name__}.")
        return cls().replace(**settings)

    @classmethod
    def from_json(cls, path: str | Path) -> CertKVConfig:
        """Settings from a JSON file written by `to_json` or `save_pretrained`."""
        settings, version = hub.read(Path(path))
        try:
            return cls.from_dict(settings)
        except ConfigError as error:
            raise hub.refused(Path(path), version, error) from error

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **push_to_hub_kwargs: Any
    ) -> str | None:
        """Write `certkv_config.json` into a folder: that of a model, for instance. Nothing else in it is touched.

        Args:
            save_directory: the folder; made where there is none.
            repo_id: where `push_to_hub` pushes to; the folder's name, if left out.
            push_to_hub: push the settings to the Hub as well, with the `push_to_hub_kwargs`.

        Returns:
            The address of the commit on the Hub; None if nothing was pushed.

        Raises:
            ConfigError: the file cannot be written, or the Hub refused it.
        """
        folder = hub.write(save_directory, hub.as_text(self.to_dict()))
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.resolve().name, **push_to_hub_kwargs)
        return None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **changes: Any,
    ) -> CertKVConfig:
        """Settings that `save_pretrained` or `push_to_hub` left.

        Only JSON is read, never code or pickles. A file of another version is read as long as this version knows all its
        settings; those it does not hold have their defaults. Any other file is refused.

        Args:
            pretrained_model_name_or_path: a folder, the JSON file itself, or a model's name on the Hub. What lies on this
                machine goes first.
            force_download: fetch it anew where the local cache has it already.
            token: of the Hub; without, the one that `hf auth login` kept. False: none.
            cache_dir: where files from the Hub are kept.
            local_files_only: look into that cache only.
            revision: a branch, a tag or a commit of the repository.
            changes: settings to have other values than in the file, e.g. `rtol=0.02`.

        Raises:
            ConfigError: there is no such file, or it holds something else than valid settings; the message says what to do.
        """
        path = hub.find(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls.from_json(path).replace(**changes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push the settings of hf_certkv",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Put `certkv_config.json` into a model's repository on the Hub; its other files stay as they are.

        Args:
            repo_id: e.g. `"user/name"`; the repository is made where there is none.
            commit_message: first line of the commit.
            private: whether a repository made here is private; None: as the account's default says.
            token: of the Hub; without, the one that `hf auth login` kept.
            branch: to commit to; None: `"main"`.
            create_pr: open a pull request instead of committing, for a repository of someone else.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: the Hub refused it or was not reached; the message says what to do.
        """
        return hub.push(
            hub.as_text(self.to_dict()),
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )
