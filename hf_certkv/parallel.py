"""Several processes, one model: what ranks of a tensor-parallel model agree on, and one report of all processes.

Under tensor parallelism every rank computes some heads of each layer, and after each layer the ranks add up what they have.
They must take the same way through the model's own collectives, so they must also fail together. Two things follow:

- Decisions about all heads of a layer (`dense_layer_share`, `scope="layer"`) are made of what every rank says.
- At the end of an update, of an attention call over quantised blocks, and of a crop or reordering, each rank says whether it
  has failed. If one has, all raise and all undo their step. A vote is one small `all_gather`; a step that every rank served by
  the fast path makes two a layer: one for `update`, one for attention.

Data-parallel processes hold a whole model each and never wait for one another here: only `gather_report` speaks to them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .certificate import FIGURES, LayerSummary, Recorder, StepRecord
from .config import CertKVConfig
from .configs import layer_config
from .errors import ConfigError, PeerFailedError
from .report import CertificateReport, MemoryReport
from .scrub import BlocksRepairedError

if TYPE_CHECKING:
    from .cache import CertifiedQuantizedCache
    from .decode import DecodeStep

FINE, AGAIN, FAILED = 0, 1, 2  # what a rank says of its step; AGAIN: it has repaired blocks and begins the call again
NUMBERS = 3  # that a vote carries besides
_NOTHING: AbstractContextManager[None] = nullcontext()


class Alone:
    """Nobody to agree with: every question is answered by this process, at no cost."""

    alone = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Alone:
        return self  # groups belong to the process

    def together(self, wait: bool = True) -> AbstractContextManager[None]:
        """What runs inside fails on all ranks if it fails on one. Args: wait: see `Ranks.together`."""
        return _NOTHING

    def close(self) -> None:
        """What runs inside `together` can no longer fail on one rank alone, or nobody could be told."""

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return here

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks; three numbers at most."""
        return list(numbers)

    def extent(self, broken: bool, lengths: set[int]) -> tuple[bool, int, int]:
        """Whether any rank's layers are broken; the fewest and the most tokens that a layer holds."""
        return broken, min(lengths, default=0), max(lengths, default=0)

    def heads(self, *parts: Tensor) -> list[Tensor]:
        """Tensors `[..., heads of this rank]` as `[..., heads of all ranks]`."""
        return list(parts)

    def dense_share(self, step: DecodeStep) -> float:
        """Which share of the layer's KV heads is left to the dense rung; 0 where the step is settled.

        Afterwards `step.at_once` and `step.settled` say what holds on every rank.
        """
        return 0.0 if step.settled or step.whole_layer else float(step.dense.float().mean())


ALONE = Alone()


class Ranks(Alone):
    """The ranks of one tensor-parallel model. All must make the same calls of the cache, in the same order.

    Args: group: the process group of the model's tensor parallelism; query_heads: of a layer of the whole model, if known.
    """

    alone = False

    def __init__(self, group: dist.ProcessGroup, query_heads: int | None = None) -> None:
        self.group, self.query_heads = group, query_heads
        self.members: tuple[int, ...] = tuple(dist.get_process_group_ranks(group))
        # A backend of accelerators only (NCCL) makes the host wait for the device at every vote.
        self.on_host = "cpu:" in str(dist.get_backend_config(group))
        self._closed = False
        self._asking = False

    def together(self, wait: bool = True) -> AbstractContextManager[None]:
        """What runs inside fails on all ranks if it fails on one.

        Args: wait: whether the host may wait for the device to know. Where it may not, and must, there is no vote.
        """
        return _Together(self) if wait or self.on_host else _NOTHING

    def close(self) -> None:
        self._closed = True

    def any(self, here: bool) -> bool:
        return any([told[0] > 0 for told in self.ask(float(here))])

    def most(self, *numbers: int) -> list[int]:
        return [int(max(column)) for column in zip(*self.ask(*map(float, numbers)), strict=True)][: len(numbers)]

    def extent(self, broken: bool, lengths: set[int]) -> tuple[bool, int, int]:
        told = self.ask(float(broken), float(min(lengths, default=0)), float(max(lengths, default=0)))
        worst, least, most = zip(*told, strict=True)
        return any(worst), int(min(least)), int(max(most))

    def heads(self, *parts: Tensor) -> list[Tensor]:
        self.ask()  # nobody waits for the tensors of a rank that has failed
        found = []
        for part in parts:
            shares = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in self.members]
            self._gather(shares, part.contiguous())
            found.append(torch.cat(shares, dim=-1))
        return found

    def dense_share(self, step: DecodeStep) -> float:
        if step.whole_layer and not step.at_once:  # zero tolerance: dense on every rank, unasked
            return 0.0
        batch, heads = step.shape[:2]
        told = self.ask(float(step.settled), 0.0 if step.settled else float(step.dense.sum()), float(batch * heads))
        if all([settled for settled, _, _ in told]):
            if not step.config.audit:
                self.close()
            return 0.0
        if step.at_once:  # here, and not elsewhere
            step.at_once = step.whole_layer = False
            step.met_at_once.fill_(True)
        step.settled = False
        # As one process has it, to the last bit: the mean of a float32 tensor.
        every = torch.zeros(int(sum(heads for _, _, heads in told)))
        every[: int(sum(dense for _, dense, _ in told))] = 1.0
        return float(every.mean())

    def ask(self, *numbers: float, state: int = FINE) -> list[tuple[float, ...]]:
        """One vote: what each rank says of itself, and some numbers. Returns those, by rank.

        Raises: PeerFailedError: another rank failed, or cannot be reached; BlocksRepairedError: one begins again, so all do.
        """
        self._asking = True  # what is raised from here on is known to the others, or nobody can be told
        said = [float(state), *numbers, *[0.0] * (NUMBERS - len(numbers))]
        device = "cpu" if self.on_host else torch.device("cuda", torch.cuda.current_device())
        mine = torch.tensor(said, dtype=torch.float64, device=device)
        every = [torch.empty_like(mine) for _ in self.members]
        self._gather(every, mine)
        told = torch.stack(every).tolist()
        failed = [rank for rank, (state_there, *_) in zip(self.members, told, strict=True) if state_there == FAILED]
        if failed:
            raise PeerFailedError(
                f"Rank(s) {failed} of this tensor-parallel model failed in this step; what they raised says why. This rank has "
                "undone the step as well."
            )
        if any([state_there == AGAIN for state_there, *_ in told]):
            raise BlocksRepairedError
        self._asking = False
        return [tuple(numbers) for _, *numbers in told]

    def _gather(self, every: list[Tensor], mine: Tensor) -> None:
        try:
            dist.all_gather(every, mine, group=self.group)
        except RuntimeError as error:
            raise PeerFailedError(f"The other ranks of this tensor-parallel model cannot be reached: {error}") from error


class _Together(AbstractContextManager[None]):
    """Ends with a vote, unless one inside has settled everything, or has told of the error already."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        self.ranks._closed = self.ranks._asking = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ranks = self.ranks
        if ranks._closed or ranks._asking or isinstance(error, GeneratorExit):
            return
        if error is None:
            ranks.ask()
            return
        try:
            ranks.ask(state=AGAIN if isinstance(error, BlocksRepairedError) else FAILED)
        except BlocksRepairedError:
            return  # all begin again, this rank among them
        except PeerFailedError as others:
            if isinstance(error, BlocksRepairedError):
                raise others from error


def ranks_of(config: PreTrainedConfig, model: PreTrainedModel | None, process_group: dist.ProcessGroup | None) -> Alone | Ranks:
    """Who shares the heads of this model: the given group, or what transformers says of the model or its config.

    The number of KV heads proves nothing either way: models have layers with fewer, and shards may repeat them. transformers
    writes `distributed_config` into the config of a model that it has split, and into no other.

    Raises: ConfigError: the model is split over some of the processes, and the config does not say over which.
    """
    heads = getattr(layer_config(config, 0), "num_attention_heads", None)
    if process_group is not None:
        return Ranks(process_group, heads) if dist.get_world_size(process_group) > 1 else ALONE
    size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or getattr(model, "_tp_size", None) or 1
    if size <= 1 or not dist.is_available() or not dist.is_initialized():
        return ALONE
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None:
        return Ranks((mesh["tp"] if mesh.ndim > 1 else mesh).get_group(), heads)
    if size != dist.get_world_size():
        raise ConfigError(
            f"The model is split over {size} of {dist.get_world_size()} processes, and its config does not say over which. "
            "Give the model in place of its config (`CertifiedQuantizedCache(model)`), or `process_group=`."
        )
    assert dist.group.WORLD is not None
    return Ranks(dist.group.WORLD, heads)


@dataclass(frozen=True)
class Share:
    """What one process has to say for a report.

    Attributes: members: the global ranks that share its model; place: its own among them; query_heads: of a layer of the whole
        model, where the config says.
    """

    members: tuple[int, ...]
    place: int
    query_heads: int | None
    settings: CertKVConfig
    recorder: Recorder
    memory: MemoryReport
    exact_layers: dict[int, str]


def gather_report(cache: CertifiedQuantizedCache, process_group: dist.ProcessGroup | None = None) -> CertificateReport:
    """One report of the caches of all processes: `cache.report()` where there is only one.

    Heads of a tensor-parallel model stand side by side, as one process has them. Figures of processes with a whole model each
    (`accelerate launch`) are added up. Both are exact: histograms add. Every process of the group must call this; it waits for
    all, and each gets the whole report.

    Args: process_group: of the processes whose caches count; None is all of them.
    Raises: PeerFailedError: another process has no report; ConfigError: the caches' settings differ; CorruptedPageError.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(process_group) == 1:
        return cache.report()
    found: Share | None = None
    problem: Exception | None = None
    try:
        found = _share(cache)
    except Exception as error:
        problem = error
    every: list[Share | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(every, found, group=process_group)
    if problem is not None:
        raise problem
    shares = [share for share in every if share is not None]
    if len(shares) < len(every):
        missing = [rank for rank, share in enumerate(every) if share is None]
        raise PeerFailedError(f"Process(es) {missing} of the group have no report; what they raised says why.")
    if any([share.settings != shares[0].settings for share in shares]):
        raise ConfigError("The processes' caches have different settings: their figures cannot be added up.")
    return _merged(shares)


def _share(cache: CertifiedQuantizedCache) -> Share:
    report, ranks = cache.report(), cache.ranks
    members: tuple[int, ...] = (dist.get_rank(),)
    heads = None
    if isinstance(ranks, Ranks):
        members, heads = ranks.members, ranks.query_heads
    place = members.index(dist.get_rank())
    return Share(members, place, heads, cache.settings, cache.recorder, report.memory, report.exact_layers)


def _merged(shares: list[Share]) -> CertificateReport:
    """The report of all, in the order of the processes."""
    models: dict[tuple[int, ...], list[Share]] = {}
    for share in shares:
        models.setdefault(share.members, []).append(share)
    total = Recorder(shares[0].recorder.full)
    total.step = -1  # a report has one more
    for parts in models.values():
        total.merge(_side_by_side(sorted(parts, key=lambda share: share.place)))
    memory = shares[0].memory
    for share in shares[1:]:
        names = {**memory.parts, **share.memory.parts}
        sizes = {name: memory.parts.get(name, 0) + share.memory.parts.get(name, 0) for name in names}
        memory = MemoryReport(sizes, memory.dense + share.memory.dense, memory.working + share.memory.working)
    report = CertificateReport(shares[0].settings, total, memory, shares[0].exact_layers)
    report.to_dict()["processes"] = len(shares)
    return report


def _side_by_side(parts: list[Share]) -> Recorder:
    """The steps of one model: heads of all ranks, in the order of the ranks."""
    recorders, first = [share.recorder for share in parts], parts[0].recorder
    whole = parts[0].query_heads
    if len(parts) == 1 or (whole and all([summary.heads >= whole for part in recorders for summary in part.layers.values()])):
        return first  # or its attention is not split: every rank has said the same
    joined = Recorder(first.full)
    for layer in first.layers:
        joined._summaries[layer] = _joined([part.layers[layer] for part in recorders])
    joined.materialised = dict(first.materialised)  # every rank has done the same operations
    joined.exact_queries = sum(part.exact_queries for part in recorders)
    joined.repaired = sum(part.repaired for part in recorders)
    joined.step = first.step
    joined._records = [_joined_record(same) for same in zip(*(part.records for part in recorders), strict=True)]
    return joined


def _joined(parts: list[LayerSummary]) -> LayerSummary:
    joined = LayerSummary(sum(part.heads for part in parts))
    joined.rungs = np.concatenate([part.rungs for part in parts])
    for name, into in joined.metrics.items():
        for field in ("count", "total", "largest", "bins"):
            setattr(into, field, np.concatenate([getattr(part.metrics[name], field) for part in parts]))
    joined.key_blocks, joined.value_blocks, joined.bytes_moved = (
        sum(getattr(part, name) for part in parts) for name in ("key_blocks", "value_blocks", "bytes_moved")
    )
    for part in parts:
        joined.kernels |= part.kernels  # a call of all ranks is one call
    return joined


def _joined_record(parts: tuple[StepRecord, ...]) -> StepRecord:
    names = ("rung", *FIGURES, "key_blocks", "value_blocks")
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in names}
    return replace(parts[0], **arrays, bytes_moved=sum(part.bytes_moved for part in parts))
