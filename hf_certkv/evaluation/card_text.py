"""The section of a model card that says what was measured, what is promised, and how to repeat it."""

from __future__ import annotations

import json
from typing import Any

from .card_command import changed, command_of, model_label
from .card_escape import escaped, fenced
from .page_data import CacheView, caches_of, is_share, longest_context, unit_of
from .page_text import NONE, difference, p_value, part_of, percent, short, tolerance_text, upward

Run = dict[str, Any]
TITLES = {
    "ppl": "Perplexity",
    "needle": "Needles in a haystack",
    "ruler": "RULER",
    "divergence": "Tokens of a greedy continuation until the first that differs from dense",
}
SURROUNDINGS = ("cpu", "gpu", "threads", "system", "python", "torch", "transformers", "hf_certkv", "commit", "date")
LONGEST_NOTE = 4000  # characters
DETAILS = ("type", "parameters", "dtype", "revision", "attention", "device")


def section(runs: list[Run], names: list[str]) -> str:
    """Markdown, from the heading to the last line. Args: names: the certified caches to write about."""
    parts = ["## KV cache: what was measured", _opening(runs[0])]
    for run in runs:
        parts += measured(run, names)
    parts += ["### What is promised, and what is not", "\n".join(promises(runs, names)), "### Repeating it"]
    said = ""
    for run in runs:
        if surroundings(run) != said:
            said = surroundings(run)
            parts.append(f"Measured with {said}.")
        command, notes = command_of(run)
        parts.append(f"{title_of(run)}:")
        if command is not None:
            parts.append(fenced([command], "bash"))
        if notes:
            parts.append("\n".join(f"- {escaped(note, LONGEST_NOTE)}" for note in notes))
    return "\n\n".join(parts) + "\n"


def chosen(run: Run, names: list[str]) -> list[CacheView]:
    """The caches to write about: dense, the uncertified baselines, and those of the names."""
    return [cache for cache in caches_of(run) if not cache.certified or cache.name in names]


def title_of(run: Run) -> str:
    """The task, and of what."""
    task = run["task"]
    settings = task.get("settings") or {}
    source = settings.get("dataset") or settings.get("text")
    title = TITLES.get(task["name"], escaped(task["name"]))
    return f"{title} ({escaped(source)})" if isinstance(source, str) else title


def measured(run: Run, names: list[str]) -> list[str]:
    """Heading, table of the caches, and the table of contexts and tasks, of one run."""
    caches = chosen(run, names)
    contexts = ", ".join(f"{int(context):,}" for context in _by(caches, "by_context"))
    metric, unit = run["task"]["metric"], "" if is_share(run) else f", {escaped(run['task']['metric']['unit'])}"
    label = "perplexity" if _has_perplexity(caches) else escaped(metric["label"]) + unit
    better = "higher" if metric["higher_is_better"] and not _has_perplexity(caches) else "lower"
    number = caches[0].summary["items"]
    longest = longest_context(run)
    said = f"{number:,} items" + (f", contexts of {contexts} tokens" if contexts else "") + f"; {better} is better."
    said += "" if longest is None else f" Memory is that at {longest:,} tokens."
    head = [
        "cache", label, f"difference from dense{_difference_unit(run, caches)}", "95 % interval", "fast", "raised", "dense",
        "largest bound", "median bound", "device memory over dense", "decode step over dense",
    ]  # fmt: skip
    rows = [
        [_name(cache), *_quality(run, cache.summary, _has_perplexity(caches)), *_shares(cache), *_bounds(cache), *_costs(cache)]
        for cache in caches
    ]
    parts = [f"### {title_of(run)}", said, table(head, rows)]
    detail = _details(run, caches)
    return [*parts, detail] if detail else parts


def _details(run: Run, caches: list[CacheView]) -> str:
    """Every context and task by itself, with what else was measured of it."""
    known = [part for cache in caches for _, _, part in _parts(cache)]
    extra = [key for key in ("kl", "same_top", "equal") if any(part.get(key) is not None for part in known)]
    pairs = any(part.get("discordant") for part in known)
    names = {"kl": "KL divergence from dense", "same_top": "same likeliest token", "equal": "whole continuation equal"}
    perplexity = _has_perplexity(caches)
    label = "perplexity" if perplexity else escaped(run["task"]["metric"]["name"])
    head = ["items of", "cache", "items", label, f"difference{_difference_unit(run, caches)}", "95 % interval"]
    head += [names[key] for key in extra]
    if pairs:
        head += ["right where dense is wrong", "wrong where dense is right", "exact McNemar p"]
    rows = []
    for cache in caches:
        for kind, part_name, part in _parts(cache):
            place = f"{int(part_name):,} tokens" if kind == "context" else escaped(part_name)
            row = [place, _name(cache), f"{part['items']:,}", *_quality(run, part, perplexity)]
            row += [short(part.get(key)) if key == "kl" else percent(part.get(key)) for key in extra]
            if pairs:
                found = part.get("discordant")
                row += [NONE] * 3 if not found else [str(found["better"]), str(found["worse"]), p_value(found.get("p"))]
            rows.append(row)
    return table(head, rows) if rows else ""


def _parts(cache: CacheView) -> list[tuple[str, str, dict[str, Any]]]:
    return [("context", name, part) for name, part in cache.by_context.items()] + [
        ("task", name, part) for name, part in cache.by_task.items()
    ]


def _by(caches: list[CacheView], what: str) -> list[str]:
    return list(dict.fromkeys(name for cache in caches for name in getattr(cache, what)))


def _has_perplexity(caches: list[CacheView]) -> bool:
    return all(cache.summary.get("perplexity") is not None for cache in caches)


def _difference_unit(run: Run, caches: list[CacheView]) -> str:
    return "" if _has_perplexity(caches) or not is_share(run) else f", {escaped(unit_of(run))}"


def _quality(run: Run, part: dict[str, Any], perplexity: bool) -> list[str]:
    """A score, its difference from dense, and the interval."""
    if perplexity:
        return [short(part.get("perplexity"), 5), *_change(part.get("perplexity_difference"), 1.0)]
    scale = 100.0 if is_share(run) else 1.0
    score = part["score"]
    return [percent(score, 4) if is_share(run) else short(score, 5), *_change(part["difference"], scale)]


def _change(interval: dict[str, Any] | None, scale: float) -> list[str]:
    mean, ends = difference(interval, scale)
    return [mean, ends or NONE]


def _name(cache: CacheView) -> str:
    if cache.settings is None:
        return escaped(cache.name)
    return f"**{escaped(cache.name)}**" if cache.certified else f"{escaped(cache.name)} (nothing certified)"


def _shares(cache: CacheView) -> list[str]:
    if not cache.certified or not cache.head_steps:
        return [NONE] * 3
    return [part_of(cache.shares[kind], cache.head_steps) for kind in ("fast", "raised", "dense")]


def _bounds(cache: CacheView) -> list[str]:
    """Largest and median bound; those of a cache that certifies nothing are no promise and not shown."""
    if not cache.certified:
        return [NONE] * 2
    return [upward(cache.figure("bound", "max")), percent(cache.figure("bound", "p50"))]


def _costs(cache: CacheView) -> list[str]:
    memory = "1" if cache.settings is None else short(cache.over_dense)
    time = cache.time_over_dense
    if time is None:
        return [memory, NONE]
    ends = "" if time.get("q1") is None or time.get("q3") is None else f" ({short(time['q1'])} to {short(time['q3'])})"
    return [memory, short(time["median"]) + ends]


def promises(runs: list[Run], names: list[str]) -> list[str]:
    """A list in plain words, with the figures of these runs."""
    return [_PROMISED, *(f"- {_counted(settings, group)}" for settings, group in _groups(runs, names)), *_NOT_PROMISED]


_PROMISED = (
    "- **Promised**: for every decoded token, layer and query head, a certified cache returned an output `O` and a number `B` "
    "with `‖O - O_exact‖₂ ≤ B ≤ atol + rtol · ‖O‖₂`, or computed the head densely from the originals. `O_exact` is attention "
    "in real arithmetic over the keys and values of that run. Bounds in the tables are shares of `‖O‖₂`: proven for these "
    "runs, not estimated from them. The largest is rounded up; the median is the upper edge of a histogram bin."
)
_NOT_PROMISED = (
    "- **Not promised**: what the model says. The bound is local, for one head at one step; errors within it travel through "
    "later layers and into later keys and values. Scores and differences were measured on these items only: an interval that "
    "holds 0 says that no difference was found in so many items, and its width how large one could have been.",
    "- **Not promised** either: anything of the caches that certify nothing, and times and memory on other machines or at "
    "other contexts.",
)


def _groups(runs: list[Run], names: list[str]) -> list[tuple[dict[str, Any], list[CacheView]]]:
    """The certified caches of all runs, those of one name and the same settings together."""
    found: dict[str, tuple[dict[str, Any], list[CacheView]]] = {}
    for run in runs:
        for cache in chosen(run, names):
            if cache.certified:
                settings = cache.settings or {}
                key = json.dumps([cache.name, settings], sort_keys=True)
                found.setdefault(key, (settings, []))[1].append(cache)
    return list(found.values())


def _counted(settings: dict[str, Any], caches: list[CacheView]) -> str:
    """What the certificates of one cache say, over all its runs."""
    head_steps = sum(cache.head_steps for cache in caches)
    shown = f"**{escaped(caches[0].name)}** ({settings_text(settings)})"
    if not head_steps:
        return f"{shown}: no head-step was quantised and certified in these runs; so few tokens stay exact."
    shares = {kind: sum(cache.shares[kind] for cache in caches) for kind in ("fast", "raised", "dense")}
    said = ", ".join(f"{part_of(shares[kind], head_steps)} {word}" for kind, word in _WAYS.items())
    largest = max((bound for cache in caches if (bound := cache.figure("bound", "max")) is not None), default=None)
    text = f"{shown}: {head_steps:,} head-steps, {said}; largest bound {upward(largest)} of the output's norm."
    audited = int(sum(cache.figure("error", "count") or 0 for cache in caches))
    if audited:
        error = max(found for cache in caches if (found := cache.figure("error", "max")) is not None)
        text += (
            f" {audited:,} of the outputs were compared with attention in float64: the largest true error was {upward(error)}, "
            "and none was above its bound (a run in which one is ends with an error)."
        )
    exact = sum((cache.certificate or {}).get("exact_head_steps", 0) for cache in caches)
    if exact:
        text += f" A further {exact:,} head-steps, of prompts for instance, were computed exactly from the originals."
    layers = max(len((cache.certificate or {}).get("exact_layers", {})) for cache in caches)
    if layers:
        text += f" {layers:,} layers are of a kind that keeps transformers' own exact storage, and are not counted."
    return text


_WAYS = {"fast": "on the fast path", "raised": "after raising some keys or values", "dense": "computed densely"}


def settings_text(settings: dict[str, Any]) -> str:
    """The tolerance, and the settings that are not the defaults."""
    said = [f"rtol {tolerance_text(settings['rtol'])}"] if "rtol" in settings else []
    said += [
        f"{name}={json.dumps(value)}" for name, value in changed(settings).items() if name not in ("rtol", "record", "audit")
    ]
    return escaped(", ".join(said)) or "the defaults"


def surroundings(run: Run) -> str:
    """Model, machine and versions in one sentence."""
    model, environment = run["model"], run["environment"]
    facts = [f"{name} {_fact(model[name])}" for name in DETAILS if model.get(name) is not None]
    facts += [f"{name} {_fact(environment[name])}" for name in SURROUNDINGS if environment.get(name) is not None]
    return ", ".join(facts)


def _fact(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escaped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _opening(run: Run) -> str:
    return (
        f"{escaped(model_label(run))} was run with several KV caches on the same items. Each is compared with transformers' "
        "own `DynamicCache` (dense), item by item: the mean difference with its 95 % bootstrap interval. fast, raised, dense: "
        "shares of the decode steps of single heads that were served from the quantised codes alone, after raising some of "
        "them, and densely from the originals."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left. Cells are escaped already."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
