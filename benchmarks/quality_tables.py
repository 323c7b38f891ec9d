"""docs/quality.md and the README's table of quality, memory and speed, from the committed runs of `certkv eval`."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.tables import ROOT, share, table
from hf_certkv.evaluation.page_text import upward

PAGE = ROOT / "docs" / "quality.md"
DEFAULT = "certified K8 V4"
README_CACHES = {
    "dense": "dense (`DynamicCache`)",
    "naive K8 V4": "naive: same formats, no certificate",
    DEFAULT: "**certified, rtol 0.02 (default)**",
    "certified K8 V4, rtol 0.05": "certified, rtol 0.05",
    "certified K8 V8": "certified, 8-bit values",
    "paper's policy": "certified, published policy",
}
LONG = 2048  # tokens: the context that the README shows
TITLES = {
    "prose_ppl_1024": "Perplexity, the last 256 of 1,024 tokens",
    "prose_ppl_2048": "Perplexity, the last 256 of 2,048 tokens",
    "prose_ppl_whole": "Perplexity, whole windows",
    "prose_divergence": "Greedy continuations",
    "prose_ruler": "RULER",
    "retriever_needle": "Needles, the retriever as it is",
    "retriever_needle_hard": "Needles, a blunt retriever",
}
Run = dict[str, Any]


def interval(change: dict[str, Any] | None, places: int = 4) -> str:
    """`+0.0012 [-0.0001, +0.0030]`, the ends rounded outward; a dash for dense itself."""
    if change is None:
        return "-"
    if change["low"] is None:
        return f"{change['mean']:+.{places}f}"
    unit = 10.0**-places
    low, high = math.floor(change["low"] / unit) * unit, math.ceil(change["high"] / unit) * unit
    return f"{change['mean']:+.{places}f} [{low + 0.0:+.{places}f}, {high + 0.0:+.{places}f}]"


def holds_zero(change: dict[str, Any]) -> bool:
    """Whether an interval says that no difference was found."""
    return change["low"] is not None and bool(change["low"] <= 0 <= change["high"])


def certificate(run: Run, name: str) -> list[str]:
    """Shares of fast, raised and dense head-steps, the largest bound, and device memory over dense, as cells."""
    found = run["certificates"].get(name)
    if found is None:
        return ["-"] * 4 + ["1.00"]
    shares, bound = found["overall"]["rung_share"], found["overall"]["relative"]["bound"]
    memory, largest = f"{found['memory']['device_over_dense']:.2f}", "-" if bound is None else upward(bound["max"])
    if not found["certified"]:
        return ["-", "-", "-", f"({largest}, not enforced)", memory]
    parts = shares["fast"], shares["keys"] + shares["values"], shares["dense_head"] + shares["dense_layer"]
    return [*map(share, parts), largest, memory]


def spent(run: Run, name: str) -> str:
    """A decode step's time over dense: median and quartiles over the items."""
    speed = run["speed"].get(name)
    if speed is None:
        return "-"
    ratio = speed["over_dense"]
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def provenance(run: Run) -> str:
    """One line: model, machine, versions, commit."""
    machine, model = run["environment"], run["model"]
    return (
        f"*{model['name']}, {model['dtype']}; {machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"transformers {machine['transformers']}, commit {(machine['commit'] or 'unknown')[:10]}, {machine['date']}, "
        f"{run['seconds'] / 60:.0f} minutes.*"
    )


def section(name: str, run: Run) -> str:
    """One run: scores by context, and what the certificate said."""
    metric, caches = run["task"]["metric"], [spec["name"] for spec in run["caches"]]
    contexts = list(run["summary"]["dense"]["contexts"])
    parts = [f"## {TITLES[name]}\n\n{words(name, run)}"]
    percent = metric["right_or_wrong"]
    scale, places, unit = (100, 1, "points") if percent else (1, 4 if run["task"]["name"] == "ppl" else 2, metric["unit"])
    rows = []
    for context in contexts:
        for cache in caches:
            sums = run["summary"][cache]["contexts"][context]
            change = scaled(sums["difference"], scale)
            row = [f"{int(context):,}", cache, f"{scale * sums['score']:.{places}f}", interval(change, places)]
            if percent:
                pairs = sums["discordant"]
                row += ["-", "-"] if pairs is None else [f"{pairs['better']} / {pairs['worse']}", f"{pairs['p']:.2g}"]
                row += [share(sums["equal"])]
            elif run["task"]["name"] == "ppl":
                row += [
                    f"{sums['perplexity']:.3f}",
                    interval(sums["perplexity_difference"], 3),
                    f"{sums['kl']:.2g}",
                    share(sums["same_top"]),
                ]
            else:
                row += [share(sums["equal"])]
            rows.append(row)
    header = ["context", "cache", f"{metric['label']}, {'%' if percent else unit}", "difference from dense, 95 % interval"]
    if percent:
        header += ["better / worse than dense", "McNemar p", "answers as dense, word for word"]
    elif run["task"]["name"] == "ppl":
        header += ["perplexity", "difference, 95 % interval", "KL from dense", "same likeliest token"]
    else:
        header += ["whole continuations equal"]
    parts.append(table(header, rows))
    if run["summary"]["dense"]["tasks"]:
        parts.append(by_task(run, caches))
    header = ["cache", "fast", "raised", "dense", "largest bound", "device memory / dense", "decode step / dense"]
    parts.append(table(header, [[cache, *certificate(run, cache), spent(run, cache)] for cache in caches]))
    return "\n\n".join([*parts, provenance(run)])


def scaled(change: dict[str, Any] | None, scale: float) -> dict[str, Any] | None:
    """An interval in other units."""
    if change is None:
        return None
    return {key: None if value is None else scale * value for key, value in change.items()}


def by_task(run: Run, caches: list[str]) -> str:
    """Scores of each RULER task."""
    tasks = list(run["summary"]["dense"]["tasks"])
    rows = [[cache, *(f"{100 * run['summary'][cache]['tasks'][task]['score']:.1f}" for task in tasks)] for cache in caches]
    return table(["score, %", *tasks], rows)


def words(name: str, run: Run) -> str:
    """What was done, in a sentence."""
    settings, items = run["task"]["settings"], len(run["items"])
    if run["task"]["name"] == "ppl":
        scored = "every token but the first" if settings["score_last"] is None else f"the last {settings['score_last']} tokens"
        return f"{items} windows of a book that the model was not trained on; {scored} scored, each decoded through the cache."
    if run["task"]["name"] == "divergence":
        return (
            f"{items} prompts of the same book, {settings['new_tokens']} greedy tokens each. Where two words are almost "
            "equally likely, another order of the same sums is enough to change their places, in bfloat16 most of all: "
            "[measurements.md](measurements.md) has a dense control."
        )
    if run["task"]["name"] == "needle":
        each = "one fact" if settings["needles"] == 1 else f"{settings['needles']} facts"
        said = f"{items} questions, {each} in each haystack, {settings['depths']} depths; a match stands out by "
        said += f"{settings['margin']:g} nats."
        return said + (" At this margin exact attention itself begins to miss facts." if name.endswith("hard") else "")
    return (
        f"{items} samples of lm-evaluation-harness. The model has five million parameters and scores next to nothing with any "
        "cache, so no cache can be better or worse than another here: the run shows that the tasks work, and how many answers "
        "stay word for word those of the dense cache."
    )


def page(runs: dict[str, Run]) -> str:
    """docs/quality.md."""
    opening = (
        "# Quality\n\nWritten by `python -m benchmarks.quality` from `benchmarks/results/eval/*.json`; `certkv report` makes a "
        "page of each of these files. What the columns mean: [evaluation.md](evaluation.md). The two embedded models only; "
        "nothing is claimed of others. Differences are from the dense cache on the same items; an interval that holds 0 means "
        "that none was found in so many. Bounds are shares of the output's L2 norm. Device memory is that of the longest item. "
        "Times are those of tiny models at short contexts, where the fixed cost of a call outweighs reading the cache: "
        "[benchmarks.md](benchmarks.md) has attention at 2K to 128K tokens."
    )
    return "\n\n".join([opening, *(section(name, run) for name, run in runs.items())]) + "\n"


def readme(runs: dict[str, Run], caches: dict[str, str]) -> str:
    """The README's table of quality, memory and speed."""
    ppl, greedy, hard = (runs.get(name) for name in (f"prose_ppl_{LONG}", "prose_divergence", "retriever_needle_hard"))
    if ppl is None or greedy is None or hard is None:
        return ""
    rows = []
    for cache, shown in caches.items():
        likelihood, facts = ppl["summary"][cache]["overall"], hard["summary"][cache]["overall"]
        pairs = facts["discordant"]
        rows.append(
            [
                shown,
                f"{likelihood['perplexity']:.3f}" if cache == "dense" else interval(likelihood["perplexity_difference"], 3),
                f"{greedy['summary'][cache]['contexts'][str(LONG)]['score']:.1f}",
                share(facts["score"]) + ("" if pairs is None else f", p {pairs['p']:.2g}"),
                certificate(ppl, cache)[0],
                certificate(ppl, cache)[4],
                "1.00" if cache == "dense" else spent(ppl, cache).split(" ")[0],
            ]
        )
    tokens = greedy["task"]["settings"]["new_tokens"]
    header = (
        f"cache, {LONG:,} tokens", "perplexity and difference [95 %]", f"greedy tokens as dense, of {tokens}",
        "facts found, McNemar", "fast path", "device memory", "decode step",
    )  # fmt: skip
    default = ppl["summary"][DEFAULT]["overall"]
    count = default["items"]
    found = (
        "no difference from dense was found"
        if holds_zero(default["perplexity_difference"])
        else "a difference from dense was found"
    )
    settings = hard["task"]["settings"]
    return (
        table(header, rows)
        + f"\n\nEmbedded models in {ppl['model']['dtype']}. Perplexity: {count} windows of a book, the last "
        f"{ppl['task']['settings']['score_last']} tokens decoded one by one; at the default tolerance {found}. Greedy "
        "tokens: before the first other one, a mean of "
        f"{greedy['summary']['dense']['contexts'][str(LONG)]['items']} prompts; in bfloat16 another order of the same sums is "
        f"enough for one. Facts: {len(hard['items'])} questions at {settings['contexts'][0]:,} tokens to a retriever so blunt "
        "that exact attention misses some. Memory and time are "
        "over the dense cache's, of a model of six layers at a context where the fixed cost of a call still outweighs reading "
        "the cache; longer contexts below. All runs, RULER too: [docs/quality.md](docs/quality.md)."
    )
