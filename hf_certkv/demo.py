"""`certkv demo`: the dense, the naive and the certified cache on the two embedded models, side by side.

Nothing here knows an outcome: what is printed, drawn and said at the end is what was measured in this run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache, PreTrainedModel

from .cache import CertifiedQuantizedCache
from .certificate import StepRecord
from .config import CertKVConfig
from .embedded import Haystack, load_embedded, make_haystack, set_margin
from .ladder import Rung
from .report import RUNG_NAMES, human_bytes

CACHES = ("dense", "naive", "certified")
QUESTIONS = 40
SHOWN = 8  # questions listed one by one
EASY_MARGIN = 30.0
# Nats at 8192 tokens: attention to the wanted token hardly stands out of the filler, so that small errors change answers.
# What the filler draws grows with its length, and the margin with its logarithm keeps the question as hard.
HARD_MARGIN, HARD_TOKENS = 6.2, 8192
OPENING = "It was a dark evening, and the old man sat by the fire"
PASSAGE_TOKENS, CONTINUED_TOKENS = 1280, 48

# Okabe and Ito's colours, which the colour-blind tell apart; from cheap to dear.
RUNG_COLOURS = {
    Rung.FAST: "#009E73",
    Rung.KEYS: "#56B4E9",
    Rung.VALUES: "#E69F00",
    Rung.DENSE_HEAD: "#D55E00",
    Rung.DENSE_LAYER: "#7B2D5B",
}


@dataclass
class Run:
    """One cache on one task.

    `answers` are token ids. Of the certified and naive caches there are also the steps' records, the report as plain data,
    and the report itself.
    """

    answers: list[int]
    report: Any = None
    records: list[StepRecord] = field(default_factory=list)

    def largest(self, metric: str) -> float:
        """The largest bound or true error of any head and step, over the output's norm; NaN for the dense cache."""
        if self.report is None:
            return math.nan
        summary = self.report.to_dict()["overall"]["relative"][metric]
        return math.nan if summary is None else float(summary["max"])


def run_demo(out: Path, tokens: int, rtol: float, seed: int, console: Console) -> dict[str, Any]:
    """Run everything, print it, save `demo.png` in the existing folder `out`.

    Args: tokens: length of the haystack; rtol: tolerance of the certified cache; seed: of haystack and passage.
    Returns: everything measured, as plain JSON types.
    """
    passage_tokens = max(320, min(PASSAGE_TOKENS, tokens // 4))
    questions = min(QUESTIONS, tokens // 32)
    hard = HARD_MARGIN + math.log(tokens / HARD_TOKENS)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        torch.inference_mode(),
        warnings.catch_warnings(),
        Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress,
    ):
        # That the naive cache certifies nothing is what the demonstration is about; the tables say it.
        warnings.filterwarnings("ignore", message=".*certifies NOTHING")
        task = progress.add_task("loading the models", total=len(CACHES) * (2 * questions + CONTINUED_TOKENS) + passage_tokens)

        def tick(what: str | None = None) -> None:
            progress.update(task, advance=0 if what else 1, description=what)

        # float32, so that what differs between the answers is the caches' doing and not bfloat16's rounding.
        retriever, words = load_embedded("retriever", dtype=torch.float32)
        prose, tokenizer = load_embedded("prose", dtype=torch.float32)
        haystack = make_haystack(words, tokens, questions, seed)
        runs: dict[str, dict[str, Run]] = {"easy": {}, "hard": {}, "prose": {}}
        for name, margin in (("easy", EASY_MARGIN), ("hard", hard)):
            set_margin(retriever, margin)
            for kind in CACHES:
                tick(f"{name} questions, {kind} cache")
                runs[name][kind] = _ask(retriever, haystack, _new_cache(retriever, kind, rtol), tick)
        tick("prose writes a passage")
        torch.manual_seed(seed)
        start = tokenizer(OPENING, return_tensors="pt").input_ids
        passage = _decode(prose, start, DynamicCache(config=prose.config), passage_tokens, True, tick)
        text = torch.cat([start, torch.tensor([passage])], dim=1)
        for kind in CACHES:
            tick(f"prose continues, {kind} cache")
            cache = _new_cache(prose, kind, rtol)
            runs["prose"][kind] = _finish(_decode(prose, text, cache, CONTINUED_TOKENS, False, tick), cache)
        tick("drawing the picture")
        draw(
            out / "demo.png",
            {f"retriever: {questions} hard questions to {tokens:,} tokens": runs["hard"]["certified"].records,
             f"prose: {CONTINUED_TOKENS} tokens after {text.shape[1]:,}": runs["prose"]["certified"].records},
            rtol,
        )  # fmt: skip
    values = [needle.value_id for needle in haystack.needles]
    _print_questions(console, haystack, runs["hard"], words)
    _print_prose(console, runs["prose"], tokenizer)
    for name, where in (("hard", "the hard questions to retriever"), ("prose", "prose's continuation")):
        console.print(Text(f"\nCertified cache, {where}", style="bold"))
        console.print(runs[name]["certified"].report)
    console.print(Text("The originals are float32 here; `certkv plan` says what bfloat16 takes.", style="dim"))
    _print_summary(console, runs, values)
    console.print(_closing(runs, rtol, values))
    return {
        "tokens": tokens, "rtol": rtol, "seed": seed, "passage_tokens": text.shape[1],
        "margins": {"easy": EASY_MARGIN, "hard": hard}, "right_answers": values,
        "passage": tokenizer.decode(text[0].tolist()), "continuation": {
            kind: tokenizer.decode(run.answers) for kind, run in runs["prose"].items()},
        "runs": {name: {kind: _plain(run) for kind, run in part.items()} for name, part in runs.items()},
    }  # fmt: skip


def _new_cache(model: PreTrainedModel, kind: str, rtol: float) -> Any:
    """An empty cache; those that are not dense are audited, so that true errors can be shown beside bounds."""
    if kind == "dense":
        return DynamicCache(config=model.config)
    settings = CertKVConfig.naive(rtol=rtol) if kind == "naive" else CertKVConfig(rtol=rtol)
    return CertifiedQuantizedCache(model.config, settings=settings, record="full", audit=True)


def _finish(answers: list[int], cache: Any) -> Run:
    if not isinstance(cache, CertifiedQuantizedCache):
        return Run(answers)
    return Run(answers, cache.report(), cache.recorder.records)


def _plain(run: Run) -> dict[str, Any]:
    return {"answers": run.answers, "report": None if run.report is None else run.report.to_dict()}


def _ask(model: PreTrainedModel, haystack: Haystack, cache: Any, tick: Callable[[], None]) -> Run:
    """Read the haystack once; ask for every needle, each time taking the question back out of the cache."""
    model(input_ids=haystack.input_ids, past_key_values=cache, logits_to_keep=1)
    answers = []
    for index in range(len(haystack.needles)):
        logits = model(input_ids=haystack.question(index), past_key_values=cache).logits
        answers.append(int(logits[0, -1].argmax()))
        cache.crop(-1)
        tick()
    return _finish(answers, cache)


def _decode(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, count: int, sample: bool, tick: Callable[[], None]
) -> list[int]:
    """`count` further tokens: the likeliest, or sampled at temperature 0.8 from the 50 likeliest. Never the end token."""
    new: list[int] = []
    for _ in range(count):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        logits[model.config.eos_token_id] = -math.inf
        if sample:
            top = logits.topk(50)
            choice = top.indices[torch.multinomial((top.values / 0.8).softmax(dim=-1), 1)]
        else:
            choice = logits.argmax().view(1)
        new.append(int(choice))
        ids = choice.view(1, 1)
        tick()
    return new


def _print_questions(console: Console, haystack: Haystack, runs: dict[str, Run], words: Any) -> None:
    """Some hard questions: those where the caches' answers differ first, then others in order."""
    dense = runs["dense"].answers
    order = sorted(range(len(dense)), key=lambda i: all(runs[kind].answers[i] == dense[i] for kind in CACHES))
    chosen = sorted(order[:SHOWN])
    differing = sum(any(runs[kind].answers[i] != dense[i] for kind in CACHES) for i in range(len(dense)))
    table = Table(title=f"{len(chosen)} of {len(dense)} hard questions to retriever", title_justify="left")
    table.caption = f"≠: not as dense ({differing} in all; shown first)"
    for column in ("word asked", "in the text", *CACHES):
        table.add_column(column)
    for i in chosen:
        needle, cells = haystack.needles[i], []
        for kind in CACHES:
            answer = runs[kind].answers[i]
            right = answer == needle.value_id
            cell = "[green]right[/]" if right else f"[red]{words.convert_ids_to_tokens(answer)}[/]"
            cells.append(cell if answer == dense[i] else f"[bold red]≠[/] {cell}")
        table.add_row(needle.key, needle.value, *cells)
    console.print(table)


def _print_prose(console: Console, runs: dict[str, Run], tokenizer: Any) -> None:
    table = Table(title="prose continues its own passage", title_justify="left", show_lines=True)
    for column in ("cache", "as dense", "continuation"):
        table.add_column(column)
    dense = runs["dense"].answers
    for kind in CACHES:
        answers = runs[kind].answers
        agreed = _first_difference(answers, dense)
        mark = "[green]=[/]" if agreed == len(dense) else "[bold red]≠[/]"
        note = "" if kind == "dense" else f"{mark} {agreed} of {len(dense)} tokens"
        table.add_row(kind, note, Text(" ".join(tokenizer.decode(answers).split())))
    console.print(table)


def _first_difference(answers: list[int], dense: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(answers, dense, strict=True)) if a != b), len(dense))


def _print_summary(console: Console, runs: dict[str, dict[str, Run]], values: list[int]) -> None:
    table = Table(title="what each cache did", title_justify="left")
    table.caption = "error (audited) and bound: the largest of any head and step, over the output's norm"
    for column in ("task", "cache", "right", "as dense", "error", "bound", "device", "host"):
        table.add_column(column, justify="left" if column in ("task", "cache") else "right")
    for name, part in runs.items():
        dense = part["dense"].answers
        for kind, run in part.items():
            right = "" if name == "prose" else f"{_agreeing(run.answers, values)}/{len(values)}"
            agreed = _first_difference(run.answers, dense) if name == "prose" else _agreeing(run.answers, dense)
            cells = ["", "", "", human_bytes(part["certified"].report.memory.dense), ""]
            if run.report is not None:
                # The naive cache knows its bound and does nothing about it.
                bound = f"{run.largest('bound'):.1%}"
                cells = [f"{agreed}/{len(dense)}", f"{run.largest('error'):.2%}"]
                cells += [f"[red]{bound}[/]" if kind == "naive" else bound]
                cells += [human_bytes(run.report.memory.device), human_bytes(run.report.memory.host)]
            table.add_row(name if kind == "dense" else "", kind, right, *cells)
        table.add_section()
    console.print(table)


def _agreeing(answers: list[int], others: list[int]) -> int:
    return sum(a == b for a, b in zip(answers, others, strict=True))


def _closing(runs: dict[str, dict[str, Run]], rtol: float, values: list[int]) -> str:
    """Two sentences on what this run showed."""
    hard, prose = ({kind: run.answers for kind, run in runs[name].items()} for name in ("hard", "prose"))
    same = {kind: _agreeing(hard[kind], hard["dense"]) for kind in CACHES}
    alike = {kind: _first_difference(prose[kind], prose["dense"]) for kind in CACHES}
    certified = [part["certified"] for part in runs.values()]
    error, bound = (max(run.largest(metric) for run in certified) for metric in ("error", "bound"))
    naive = max(part["naive"].largest("error") for part in runs.values())
    overall = [run.report.to_dict()["overall"] for run in certified]
    steps = sum(part["head_steps"] for part in overall)
    dense = sum(part["rungs"]["dense_head"] + part["rungs"]["dense_layer"] for part in overall)
    share = runs["hard"]["certified"].report.memory.ratio
    return (
        f"\nWith {share:.0%} of the dense cache's device memory for the haystack, the certified cache returned {steps:,} head "
        f"outputs proven to be within {rtol:.2%} of exact attention or recomputed densely ({dense:,} were); the largest bound "
        f"was {bound:.2%}, the largest true error {error:.2%}, and that of the naive cache, which promises nothing, "
        f"{naive:.2%}. Answers as the dense cache's: certified {same['certified']} and naive {same['naive']} of {len(values)} "
        f"hard questions, and {alike['certified']} and {alike['naive']} of {len(prose['dense'])} tokens of prose before the "
        "first that differs; the promise is about attention outputs, so words that are almost equally likely may still change "
        "places."
    )


def draw(path: Path, tasks: dict[str, list[StepRecord]], rtol: float) -> None:
    """Bounds and rungs by layer, head and decode step, one column a task, as a PNG written whole or not at all.

    Args: tasks: records by title, of batch size 1 and one new token a step; rtol: the tolerance, 0 draws no line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    grids = {title: _grids(records) for title, records in tasks.items() if records}
    # Without pyplot: no window system, no state shared with a caller's own figures.
    figure = Figure(figsize=(14, 10), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle("The certified cache: proven error bounds, head by head and step by step", fontsize=15, weight="bold")
    if not grids:
        figure.text(0.5, 0.5, "Nothing was quantised: the texts were too short.", ha="center")
    else:
        # The narrow last column holds the legends and the colour bar.
        axes = figure.subplots(
            3, len(grids) + 1, height_ratios=(1.0, 1.25, 1.25), width_ratios=[1.0] * len(grids) + [0.2], squeeze=False
        )
        for side in axes[:, -1]:
            side.set_axis_off()
        top = max([rtol, 1e-6, *(float(np.nanmax(grid["bound"], initial=0.0)) for grid in grids.values())])
        image: Any = None
        for column, (title, grid) in enumerate(grids.items()):
            _draw_curves(axes[0, column], grid, rtol)
            axes[0, column].set_title(title + "\n", fontsize=12, weight="bold")
            image = _draw_heads(axes[1, column], grid, top)
            _draw_rungs(axes[2, column], grid)
        titles = ("bounds and true errors over the output's norm, the largest of all heads",
                  "bound returned, head by head, over the output's norm", "rung that served the head")  # fmt: skip
        for axis, title in zip(axes[:, 0], titles, strict=True):
            axis.set_title(title, loc="left", fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes[0, -1].legend(handles, labels, fontsize=9, loc="center left", frameon=False)
        bar = figure.colorbar(image, cax=axes[1, -1].inset_axes((0.15, 0.05, 0.13, 0.9)), extend="min")
        if rtol > 0:
            bar.ax.axhline(rtol, color="crimson", linewidth=4)
            bar.ax.set_title(f"tolerance {rtol:.3g}", color="crimson", fontsize=9, loc="left")
        patches = [Patch(color=colour, label=RUNG_NAMES[rung]) for rung, colour in RUNG_COLOURS.items()]
        axes[2, -1].legend(handles=patches, title="rung, from cheap to dear", fontsize=9, loc="center left", frameon=False)
    unfinished = path.with_name(f".{path.name}")
    try:
        canvas.print_png(str(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _grids(records: list[StepRecord]) -> dict[str, np.ndarray]:
    """`[layers * heads, steps]` of each figure, over the output's norm; `heads` is how many rows a layer has."""
    steps = {step: i for i, step in enumerate(sorted({record.step for record in records}))}
    layers = {layer: i for i, layer in enumerate(sorted({record.layer for record in records}))}
    heads = records[0].rung.shape[1]
    grid = {name: np.full((len(layers) * heads, len(steps)), np.nan) for name in ("candidate", "bound", "error", "rung")}
    for record in records:
        first, column = layers[record.layer] * heads, steps[record.step]
        figures = {**record.relative(), "rung": record.rung}
        for name, values in grid.items():
            values[first : first + heads, column] = figures[name][0, :, 0]
    return {**grid, "heads": np.array(heads), "layers": np.array(list(layers))}


def _draw_curves(axis: Any, grid: dict[str, np.ndarray], rtol: float) -> None:
    """The largest bound of any head at each step, before and after the ladder, the largest true error, the tolerance."""
    place = np.arange(1, grid["bound"].shape[1] + 1)
    curves = (
        ("candidate", "bound of the\nfast path alone", "#999999", "o"),
        ("bound", "bound returned", "#0072B2", "o"),
        ("error", "true error\n(audited)", "#111111", "."),
    )
    for name, label, colour, marker in curves:
        values = np.where(np.isfinite(grid[name]), grid[name], 0.0).max(axis=0)
        axis.plot(place, np.where(values > 0, values, np.nan), marker, color=colour, label=label, markersize=5)
    if rtol > 0:
        axis.axhline(rtol, color="crimson", linewidth=1.8, label=f"tolerance {rtol:.3g}")
        axis.axhspan(rtol, 1e9, color="crimson", alpha=0.06)
    drawn = np.concatenate([grid[name][np.isfinite(grid[name]) & (grid[name] > 0)] for name, *_ in curves])
    if drawn.size:
        largest = max(rtol, drawn.max())
        axis.set_ylim(largest / 3e3, largest * 3)
    axis.set_yscale("log")
    axis.set_xlim(0.5, len(place) + 0.5)
    axis.grid(alpha=0.25)


def _label_heads(axis: Any, grid: dict[str, np.ndarray]) -> None:
    heads, layers = int(grid["heads"]), grid["layers"]
    middles = [heads * i + (heads - 1) / 2 for i in range(len(layers))]
    axis.set_yticks(middles, [f"layer {layer}\n{heads} heads" for layer in layers], fontsize=8)
    for i in range(1, len(layers)):
        axis.axhline(heads * i - 0.5, color="white", linewidth=2)


def _draw_heads(axis: Any, grid: dict[str, np.ndarray], top: float) -> Any:
    from matplotlib.colors import LogNorm

    shown = np.maximum(np.nan_to_num(grid["bound"]), top / 1e3)
    extent = (0.5, shown.shape[1] + 0.5, shown.shape[0] - 0.5, -0.5)
    image = axis.imshow(shown, aspect="auto", cmap="viridis", norm=LogNorm(top / 100, top), interpolation="none", extent=extent)
    _label_heads(axis, grid)
    return image


def _draw_rungs(axis: Any, grid: dict[str, np.ndarray]) -> None:
    from matplotlib.colors import ListedColormap

    extent = (0.5, grid["rung"].shape[1] + 0.5, grid["rung"].shape[0] - 0.5, -0.5)
    axis.imshow(
        grid["rung"], aspect="auto", cmap=ListedColormap(list(RUNG_COLOURS.values())), vmin=-0.5,
        vmax=len(RUNG_COLOURS) - 0.5, interpolation="none", extent=extent,
    )  # fmt: skip
    _label_heads(axis, grid)
    axis.set_xlabel("decode step")
