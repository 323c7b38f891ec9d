"""`certkv eval`: what a cache does to a model's answers, beside the dense one, on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .cli_base import (
    Device,
    Dtype,
    DtypeOption,
    Model,
    check_out,
    console_for,
    fail,
    friendly,
    load,
    messages,
    quiet_libraries,
    write_json,
)

app = typer.Typer(name="eval", no_args_is_help=True)

Caches = Annotated[
    list[str] | None,
    typer.Option("--cache", "-c", help="[NAME=]dense|naive|certified|paper|SAVED[:setting=value,...]; may be repeated."),
]
Contexts = Annotated[str, typer.Option("--context", "-n", help="Tokens, or several numbers separated by commas.")]
Items = Annotated[int, typer.Option("--items", min=1, help="Items of each context (and depth, or task).")]
Text = Annotated[Path | None, typer.Option(help="A UTF-8 text file, such as a book.")]
Dataset = Annotated[str | None, typer.Option(help="A data set of the Hub instead: a name, or pg19.")]
Split = Annotated[str | None, typer.Option(help="Of the data set.")]
Column = Annotated[str | None, typer.Option(help="The data set's column of texts.")]
Chunk = Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt read at a time; unset: all at once.")]
Audit = Annotated[int, typer.Option(min=0, help="Compare so many items with float64 attention; they are not timed.")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Of prompts and of the bootstrap.")]
Out = Annotated[Path, typer.Option("--json", dir_okay=False, help="The run file; an interrupted run goes on from it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file's run by this one.")]
Where = Annotated[Device, typer.Option(help="'auto' is CUDA where there is one.")]


@app.callback()
def main() -> None:
    """Compare dense, naive and certified caches on one task, paired item by item; needs pip install 'hf_certkv[eval]'."""


@app.command()
def ppl(
    model: Model,
    text: Text = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    context: Contexts = "1024",
    items: Items = 10,
    score_last: Annotated[int, typer.Option(min=1, help="Tokens scored at the end of each window.")] = 256,
    score_all: Annotated[bool, typer.Option("--score-all", help="Score every token of a window but its first.")] = False,
    cache: Caches = None,
    chunk: Chunk = None,
    audit: Audit = 1,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.auto,
    device: Where = Device.auto,
    json_file: Out = Path("certkv-ppl.json"),
    overwrite: Overwrite = False,
) -> None:
    """Teacher-forced perplexity, every scored token decoded through the cache."""

    def make(loaded: Any, tokenizer: Any) -> Any:
        from .evaluation.perplexity import Perplexity

        last = None if score_all else score_last
        return Perplexity(loaded, tokenizer, source(text, dataset, split, column), contexts(context), items, last, chunk)

    _run(make, Shared(model, cache or [], audit, seed, dtype, device, json_file.expanduser(), overwrite))


@app.command()
def divergence(
    model: Model,
    text: Text = None,
    dataset: Dataset = None,
    split: Split = None,
    column: Column = None,
    context: Contexts = "1024",
    items: Items = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 64,
    cache: Caches = None,
    audit: Audit = 1,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.auto,
    device: Where = Device.auto,
    json_file: Out = Path("certkv-divergence.json"),
    overwrite: Overwrite = False,
) -> None:
    """Tokens of a greedy continuation until the first that differs from the dense cache's."""

    def make(loaded: Any, tokenizer: Any) -> Any:
        from .evaluation.divergence import Divergence

        return Divergence(loaded, tokenizer, source(text, dataset, split, column), contexts(context), items, new_tokens)

    _run(make, Shared(model, cache or [], audit, seed, dtype, device, json_file.expanduser(), overwrite))


@app.command()
def needle(
    model: Model,
    text: Text = None,
    context: Contexts = "1024,2048",
    depths: Annotated[int, typer.Option(min=1, help="Depths, evenly from the beginning to the end.")] = 10,
    needles: Annotated[int, typer.Option(min=1, help="Facts in each haystack, all asked for; a divisor of --depths.")] = 1,
    items: Items = 1,
    margin: Annotated[float | None, typer.Option(help="Of the retriever: nats by which a match stands out.")] = None,
    cache: Caches = None,
    chunk: Chunk = None,
    audit: Audit = 1,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.auto,
    device: Where = Device.auto,
    json_file: Out = Path("certkv-needle.json"),
    overwrite: Overwrite = False,
) -> None:
    """Facts hidden in a haystack, by depth and context."""

    def make(loaded: Any, tokenizer: Any) -> Any:
        from .embedded import set_margin
        from .errors import InputError
        from .evaluation.needle import Needle
        from .evaluation.texts import Source

        if margin is not None:
            try:
                set_margin(loaded, margin)
            except ValueError as error:
                raise InputError(f"--margin {margin}: {error}") from error
        hay = None if text is None else Source.of(text, None).text
        return Needle(loaded, tokenizer, contexts(context), depths, needles, items, hay, chunk, seed)

    _run(make, Shared(model, cache or [], audit, seed, dtype, device, json_file.expanduser(), overwrite))


@app.command()
def ruler(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Of RULER, separated by commas.")] = "niah_single_1,vt,cwe,fwe",
    context: Contexts = "4096",
    items: Items = 10,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer; unset: as each task says.")] = None,
    cache: Caches = None,
    audit: Audit = 1,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.auto,
    device: Where = Device.auto,
    json_file: Out = Path("certkv-ruler.json"),
    overwrite: Overwrite = False,
) -> None:
    """The RULER tasks of lm-evaluation-harness."""

    def make(loaded: Any, tokenizer: Any) -> Any:
        from .evaluation.ruler import Ruler

        names = tuple(part.strip() for part in tasks.split(",") if part.strip())
        return Ruler(loaded, tokenizer, names, contexts(context), items, seed, new_tokens)

    _run(make, Shared(model, cache or [], audit, seed, dtype, device, json_file.expanduser(), overwrite))


def contexts(text: str) -> tuple[int, ...]:
    """`1024,2048` as numbers; raises InputError."""
    from .errors import InputError

    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InputError(f"--context {text}: expected whole numbers from 1 on, separated by commas.")
    return found


def source(text: Path | None, dataset: str | None, split: str | None, column: str | None) -> Any:
    """What `--text` or `--dataset` names."""
    from .evaluation.texts import Source

    return Source.of(text, dataset, split, column)


@dataclass(frozen=True)
class Shared:
    """What every task is told."""

    model: str
    caches: list[str]
    audit: int
    seed: int
    dtype: Dtype
    device: Device
    out: Path
    overwrite: bool


def _run(make: Callable[[Any, Any], Any], shared: Shared) -> None:
    with friendly():
        import importlib.util

        from .errors import MissingDependencyError
        from .evaluation.caches import parse_all

        if importlib.util.find_spec("scipy") is None:
            raise MissingDependencyError("certkv eval needs scipy: pip install 'hf_certkv[eval]'.")
        specs = parse_all(shared.caches)
        check_out(shared.out)
        quiet_libraries()
        _execute(make, specs, shared)


def _execute(make: Callable[[Any, Any], Any], specs: Any, shared: Shared) -> None:
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .evaluation.run import Run

    out, device, overwrite = shared.out, shared.device, shared.overwrite
    if device is Device.cuda and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device here.")
    processes = PartialState(cpu=device is Device.cpu or not torch.cuda.is_available())
    tokenizer = load(AutoTokenizer, shared.model)
    loaded = load(AutoModelForCausalLM, shared.model, dtype=shared.dtype.value).to(processes.device).eval()
    run = Run(make(loaded, tokenizer), specs, shared.model, shared.audit, shared.seed)
    if not overwrite and _is_done(out, run.config_hash):
        messages().print(f"{escape(str(out))} holds this very run: nothing to do (--overwrite measures again).", soft_wrap=True)
        return
    if overwrite and processes.is_main_process:
        run.clear(out)
    processes.wait_for_everyone()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages(), disable=not processes.is_main_process) as bar:
        shown = bar.add_task(f"{run.task.name}, {len(specs)} caches", total=None)
        try:
            found = run.execute(
                out, lambda done, whole: bar.update(shown, completed=done, total=whole), processes.process_index,
                processes.num_processes, processes.wait_for_everyone,
            )  # fmt: skip
        except KeyboardInterrupt:
            bar.stop()
            unfinished = run.unfinished(out) if processes.num_processes == 1 else None
            if unfinished is not None:
                write_json(out, unfinished, indent=None)
                said = f"What was done is in {escape(str(out))}; the same command goes on from there."
                messages().print(said, soft_wrap=True)
            raise
        except OSError as error:
            bar.stop()
            fail(
                f"{out}: nothing can be written beside it ({error.strerror or error}); what was kept so far is gone on with.", 1
            )
    if found is not None:
        if not found["complete"]:
            fail(f"{out}: what the processes kept beside it is not whole; the same command measures the rest.", 1)
        if not overwrite:
            _is_done(out, run.config_hash)  # another run may have come to its end meanwhile
        write_json(out, found, indent=None)
        run.clear(out)
        console_for(stderr=False).print(table(found))
        messages().print(f"Everything is in {escape(str(out))}; certkv report makes a page of it.", soft_wrap=True)


def _is_done(out: Path, config_hash: str) -> bool:
    """Whether the file holds this run. A file that holds another complete one is not written over without being told so."""
    if not out.exists():
        return False
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        complete, present = bool(found["complete"]), found["config_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--json {out}: there is a file that is no run of certkv eval; give another name, or --overwrite.")
    if present != config_hash:
        fail(f"--json {out}: the file holds a run with other settings; give another name, or --overwrite.")
    return complete


def table(run: dict[str, Any]) -> Table:
    """What a run found, one cache a row."""
    metric = run["task"]["metric"]
    title = f"{run['task']['name']} on {run['model']['name']}, {len(run['items'])} items: {metric['label']}, {metric['unit']}"
    found = Table(title=escape(title), title_justify="left")
    found.caption = (
        "difference: from dense, item by item, with its 95 % interval; bound: the largest (in brackets: not enforced)"
    )
    for column in ("cache", metric["name"], "difference", "p", "fast", "raised", "dense", "bound", "device", "time"):
        found.add_column(column, justify="left" if column == "cache" else "right", no_wrap=column != "cache")
    for spec in run["caches"]:
        name = spec["name"]
        sums, certificate = run["summary"][name]["overall"], run["certificates"].get(name)
        change, pairs = sums["difference"], sums["discordant"]
        cells = [escape(name), f"{sums['score']:.4f}"]
        cells += ["-" if change is None else interval(change), "-" if pairs is None else f"{pairs['p']:.2g}"]
        cells += _certificate_cells(certificate)
        time = run["speed"].get(name)
        cells.append("-" if time is None else f"{time['over_dense']['median']:.2f}")
        found.add_row(*cells)
    return found


def interval(change: dict[str, Any]) -> str:
    """`+0.0012 [-0.0001, +0.0030]`."""
    if change["low"] is None:
        return f"{change['mean']:+.4f}"
    return escape(f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]")


def _certificate_cells(certificate: dict[str, Any] | None) -> list[str]:
    if certificate is None or not certificate["overall"]["head_steps"]:
        return ["-"] * 5
    from .evaluation.page_text import upward

    shares, bound = certificate["overall"]["rung_share"], certificate["overall"]["relative"]["bound"]
    memory = f"{certificate['memory']['device_over_dense']:.2f}"
    largest = "-" if bound is None else upward(bound["max"])
    if not certificate["certified"]:
        return ["-", "-", "-", f"[red]({largest})[/]", memory]
    fast, raised = shares["fast"], shares["keys"] + shares["values"]
    cells = [f"{part:.1%}" for part in (fast, raised, shares["dense_head"] + shares["dense_layer"])]
    return [*cells, largest, memory]
