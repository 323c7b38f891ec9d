"""What plants bugs in the Triton kernels and their host side, and the checks that must notice them: in the interpreter."""

from __future__ import annotations

import inspect
import linecache
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from plants_base import Apply, Detect, Patch, against_record
from torch import Tensor

from hf_certkv.attention import AttentionCall, attend
from hf_certkv.errors import CertKVError, CorruptedPageError
from hf_certkv.handle import KEYS, VALUES
from hf_certkv.ladder import Rung
from hf_certkv.verify.cases import Case, examine, fill, judge, mask_of, new_cache, tensors
from hf_certkv.verify.cases import run as run_case
from hf_certkv.verify.kernel import evened, interpreted, using
from hf_certkv.verify.planted import value_triangle

HERE = find_spec("triton") is not None and interpreted()
FEW = {"CHUNK": 2, "TILE": 2, "FEW": 1}  # segments, blocks and chunks at a time, so that there are several in small cases
if HERE:
    import quick_interpreter
    import triton_twin

    from hf_certkv.kernels import triton_step
    from hf_certkv.kernels.triton_step import DeviceStep

    quick_interpreter.install()


class State:
    """Whether one of these bugs is planted now."""

    planted = False


def edited(module: Any, name: str, old: str, new: str) -> Apply:
    """A function, or the method of a class, with `old` in its source replaced by `new`: in every module that has it."""

    def apply(patch: Patch) -> None:
        patch.setattr(State, "planted", True)
        owner, _, method = name.rpartition(".")
        holder = getattr(module, owner) if owner else module
        original = holder.__dict__[method]
        plain = getattr(original, "fn", original)
        source = textwrap.dedent(inspect.getsource(plain))
        assert source.count(old) == 1, (
            f"{name} has {old!r} {source.count(old)} times: where the kernels change, so must the bug"
        )
        source = source.replace(old, new)
        # The interpreter asks for the source again, by the name of its file.
        file = f"<planted in {name}: {new}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        made: dict[str, Any] = {}
        exec(compile(source, file, "exec", flags=annotations.compiler_flag), plain.__globals__, made)
        if owner:
            patch.setattr(holder, method, made[method])
            return
        for other in list(sys.modules.values()):
            if (
                isinstance(other, ModuleType)
                and other.__name__.startswith("hf_certkv.")
                and other.__dict__.get(name) is original
            ):
                patch.setattr(other, name, made[name])

    return apply


def check(found: Callable[[], list[str]], tiles: dict[str, int] | None = None) -> Detect:
    """A check of the Triton kernels; where nothing is planted, it is made once. Args: tiles: numbers of triton_step.py."""
    known, tiles = list[list[str]](), tiles or {}

    def detect() -> list[str]:
        if known and not State.planted:
            return known[0]
        # What an earlier step has left in scratch is to be of no help.
        for held in triton_step.scratch.held.values():
            held.zero_()
        before = {name: getattr(triton_step, name) for name in tiles}
        try:
            for name, size in tiles.items():
                setattr(triton_step, name, size)
            with using("triton"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of bugs that make NaN
                told = found()
        except (CertKVError, AssertionError) as error:
            told = [f"{type(error).__name__}: {error}"]
        finally:
            for name, size in before.items():
                setattr(triton_step, name, size)
        if not State.planted:
            known.append(told)
        return told

    return detect


def ordinary(tokens: int = 33, width: int = 16, groups: int = 1, heads: int = 1, positions: int = 1, **changes: Any) -> Case:
    """Ordinary numbers, two blocks of 16 and an exact token."""
    q, k, v = tensors("normal", torch.float32, tokens, 16, width, 1, positions, 3, heads, groups)
    return Case(q, k, v, settings={"rtol": 0.5, "kernel": "triton", **changes})


def masked(**changes: Any) -> Case:
    """The same for two query heads, each with its own biases, some -inf."""
    case = ordinary(groups=2, **changes)
    return replace(case, mask=mask_of("heads", torch.float32, 1, 1, 33, 1, 2))


def newest() -> Case:
    """The same with two exact tokens, and nearly all weight on the last."""
    case = ordinary(34)
    keys = case.keys.clone()
    keys[:, :, -1] = 3 * case.query[:, :, 0]
    return replace(case, keys=keys, settings={**case.settings, "recent_window": 2})


def unlike() -> Case:
    """The same, with values in blocks that are longer than the exact token's, and a sink logit."""
    case = ordinary()
    values = case.values.clone()
    values[:, :, :32] *= 4
    return replace(case, values=values, sinks=torch.tensor([1.0]))


def grouped() -> Case:
    """Values with two groups of channels, of unlike size."""
    case = ordinary(width=64, value_group=32)
    return replace(case, values=case.values * torch.where(torch.arange(64) < 32, 1.0, 5.0))


def poisoned() -> Case:
    """A NaN in the query."""
    case = ordinary()
    query = case.query.clone()
    query[0, 0, 0, 3] = torch.nan
    return replace(case, query=query)


def halved() -> Case:
    """Ordinary numbers in bfloat16."""
    case = ordinary()
    return replace(case, query=case.query.bfloat16(), keys=case.keys.bfloat16(), values=case.values.bfloat16())


def capped() -> Case:
    """Scores that a softcap makes much smaller."""
    return replace(ordinary(), softcap=1.0)


def between() -> Case:
    """A bound above the tolerance, by less than twice."""
    return ordinary(rtol=0.15)


def tight(build: Callable[..., Case], *args: Any, **changes: Any) -> Case:
    """A case whose heads promote (`dense_head_share` 1) or are left to the dense rung."""
    case = evened(build(*args))
    settings = {**case.settings, "atol": 0.0, "rtol": 0.02, "kernel": "triton", **changes}
    return replace(case, settings=settings)


def oracle(build: Callable[..., Case], *args: Any, **changes: Any) -> Detect:
    """A check by the exact oracle: error and bound, bound and tolerance, and the record's norm."""

    def found() -> list[str]:
        case = evened(build(*args, **changes))
        output, record, cache = run_case(case)
        told = [] if record.kernel == "triton" else [f"computed by {record.kernel}"]
        return told + judge(case, output, record, cache.settings).breaches + against_record(case, output, record)

    return check(found)


def started(case: Case) -> DeviceStep:
    """The kernels' step over a new cache, run."""
    return triton_twin.started(case)


def twin(build: Callable[..., Case], *args: Any, tiles: dict[str, int] | None = None, **changes: Any) -> Detect:
    """A check against float64 and bounds.py."""
    return check(lambda: triton_twin.discrepancies(started(build(*args, **changes))), tiles)


def raised(**changes: Any) -> Detect:
    """A check of what promoted blocks leave behind, against float64, and that there are some."""

    def found() -> list[str]:
        device = started(tight(ordinary, **{"dense_head_share": 1.0, **changes}))
        step, layer, made = device.step, device.layer, triton_twin.arrays(device)
        key_level, value_level, _ = triton_twin.levels(device)
        index = torch.nonzero((key_level > 0) | (value_level > 0), as_tuple=True)
        parts = []
        for kind, level in ((KEYS, key_level), (VALUES, value_level)):
            part = layer.shadow.read_pages(kind, *index).double()
            for at in range((layer.key_codec, layer.value_codec)[kind].levels):
                decoded = layer.store.decode(("keys", "values")[kind], at, index, layer.widths[kind]).double()
                part = torch.where(level[index].view(-1, 1, 1) == at, decoded, part)
            parts.append(part)
        rows, heads, blocks = index
        scores = (step.scaled.double()[rows, heads] @ parts[0].mT).squeeze(-2)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        wanted = (weights.unsqueeze(-2) @ parts[1]).squeeze(-2)
        told = [] if len(rows) else ["nothing was promoted"]
        if not bool(((weights.sum(-1) - made["sums"][rows, heads, 0, blocks, 4]).abs() <= 1e-4).all()):
            told.append("weights of promoted blocks are wrong")
        if not bool(((wanted - made["output"][rows, heads, blocks, 0]).abs() <= 1e-4 * (1 + wanted.abs())).all()):
            told.append("outputs of promoted blocks are wrong")
        return told + triton_twin.discrepancies(device)

    return check(found)


def damaged(rung: Rung, **changes: Any) -> Detect:
    """A check that a damaged page gives NaN and an error, and later steps over sound pages neither."""

    def called(case: Case, bits: int) -> tuple[Tensor, Any]:
        cache = new_cache(case)
        handles = fill(cache, case)
        shadow = cache.certified_layers[0].shadow
        assert shadow is not None
        shadow.flush()
        shadow.slabs[0].pages[VALUES][1, 0, 0].view(torch.int32)[0, 0] ^= bits
        return attend(AttentionCall(case.query, *handles, scale=case.scale)), cache.recorder

    def found() -> list[str]:
        case, told = tight(ordinary, **changes), []
        output, recorder = called(case, 1 << 7)
        if not bool(output.isnan().all()):
            told.append("something was made of a damaged page")
        try:
            recorder.commit()
            told.append("a damaged page was not told")
        except CorruptedPageError:
            pass
        output, recorder = called(case, 0)
        recorder.commit()
        if not bool(output.isfinite().all()) or not (recorder.records[-1].rung == rung).all():
            told.append(f"sound pages give {recorder.records[-1].rung.tolist()}")
        return told

    return check(found)


def record_of(**changes: Any) -> Detect:
    """A check of a record of promotions against levels on the device, after another step has used the same scratch."""

    def found() -> list[str]:
        case = tight(ordinary, **{"dense_head_share": 1.0, **changes})
        cache = new_cache(case)
        handles = fill(cache, case)
        output = attend(AttentionCall(case.query, *handles, scale=case.scale))
        keys, values = triton_step.scratch(output.device, "levels", (3, 1, 2), torch.int32).clone()[:2, 0]
        run_case(replace(case, settings={**case.settings, "rtol": 10.0}))
        cache.recorder.commit()
        record = cache.recorder.records[-1]
        told = judge(case, output, record, cache.settings).breaches + against_record(case, output, record)
        counted, raised = (int(record.key_blocks.sum()), int(record.value_blocks.sum())), (keys > 0, values > 0)
        if counted != tuple(int(part.sum()) for part in raised) or not (record.rung == Rung.VALUES).all():
            told.append(f"{counted} blocks, rungs {record.rung.tolist()}: levels are {keys.tolist()}, {values.tolist()}")
        bytes_of = {1: 16 * 8, 2: 16 * 16 * 4}  # of a block's plane and page
        moved = sum(bytes_of.get(level, 0) for level in (*keys.tolist(), *values.tolist()))
        return told if record.bytes_moved == moved else [*told, f"{record.bytes_moved} bytes moved in place of {moved}"]

    return check(found)


def hot() -> Detect:
    """A check by the oracle of a step that reads hot slots."""

    def found() -> list[str]:
        case = tight(value_triangle, 2, dense_head_share=1.0, hot_blocks=1, refine="off", rtol=0.1)
        keys, values = torch.cat([case.keys] * 2, dim=2), torch.cat([case.values, 2 * case.values], dim=2)
        case = replace(case, keys=keys[:, :, :33], values=values[:, :, :33], mask=None)
        cache = new_cache(case)
        handles = fill(cache, case)
        call = AttentionCall(case.query, *handles, scale=case.scale)
        attend(call)
        cache.recorder.commit()
        cache.certified_layers[0].prefetch()
        output = attend(call)
        cache.recorder.commit()
        before, after = cache.recorder.records
        told = [] if 0 < after.bytes_moved < before.bytes_moved else ["the hot slot saved nothing"]
        return told + judge(case, output, after, cache.settings).breaches

    return check(found)


def unlike_steps() -> Detect:
    """A check by the oracle of a step after another, of the same sizes, that promoted everything."""

    def found() -> list[str]:
        run_case(tight(ordinary, refine="off", dense_head_share=1.0))
        return examine(ordinary(rtol=10.0, refine="off")).breaches

    return check(found)


def never_certified() -> Detect:
    """A check that a row with a NaN is left to the dense rung."""

    def found() -> list[str]:
        _, record, _ = run_case(poisoned())
        return (
            [] if (record.rung == Rung.DENSE_HEAD).all() else [f"rungs {record.rung.tolist()}, bound {record.bound.tolist()}"]
        )

    return check(found)


def stored_errors() -> Detect:
    """A check that what the pass says of its own roundings is no less than what a digit's last place can be off by."""

    def found() -> list[str]:
        device = started(ordinary())
        step, (keys, values) = device.step, device.step.encoded
        scaled, made = step.scaled.double().abs(), triton_twin.arrays(device)
        middle = (keys.offset.double() + 128.5 * keys.scale.double()).abs()
        rounded = 2.0**-24 * (16 * scaled @ middle.mT + 128 * scaled @ keys.scale.double().abs().mT)
        told = ["scores may be further off"] if bool((made["errors"] < rounded).any()) else []
        # A factor is within half a unit, of which there are 2^21 to the largest step, or up to twice as many.
        unit = values.scale.double().amax((-1, -2)) * 2.0**-21
        told += ["values may be further off"] if bool((made["slips"] < 0.5 * unit * 15 * 16 * 16**0.5).any()) else []
        return told

    return check(found)
