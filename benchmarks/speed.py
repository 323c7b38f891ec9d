"""The committed run of `certkv bench`, and `docs/benchmarks.md` and the README's figures of speed from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS
from benchmarks.tables import README, ROOT, fill, load
from hf_certkv.bench.options import PARTS, BenchOptions
from hf_certkv.bench.plots import draw_all
from hf_certkv.bench.report import document, speed_block
from hf_certkv.bench.run import run
from hf_certkv.cli_base import quiet_libraries

NAME = "bench"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"
app = typer.Typer(add_completion=False, help=__doc__)


def write_documents(result: dict[str, Any], page: Path = DOCUMENT, pictures: Path = PICTURES, readme: Path = README) -> None:
    """The page, its pictures, and the README's part between the `speed` markers."""
    pictures.mkdir(parents=True, exist_ok=True)
    plots = draw_all(result, pictures, endings=("svg",))
    page.write_text(document(result, plots, f"{pictures.name}/"), encoding="utf-8")
    fill(readme, "speed", speed_block(result))


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(str(one) for one in numbers)


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split(","))


@app.command()
def measure(
    threads: Annotated[int | None, typer.Option(help="of torch")] = None,
    rounds: Annotated[int, typer.Option(help="samples of each system")] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    what: Annotated[str, typer.Option(help="parts, with commas")] = ",".join(PARTS),
    contexts: Annotated[str, typer.Option(help="tokens held, with commas")] = _joined(BenchOptions.contexts),
    prefills: Annotated[str, typer.Option(help="prompts of the prefill part, with commas")] = _joined(BenchOptions.prefills),
    shapes: Annotated[bool, typer.Option(help="other head sizes and batches than 128 and 1 as well")] = True,
    name: Annotated[str | None, typer.Option(help="of the result, if docs/benchmarks.md is not made from it")] = None,
) -> None:
    """Measure everything, saving after each part, then write the documents."""
    quiet_libraries()
    name = name or (NAME if device == "cpu" else f"{NAME}_{device}")

    def save(result: dict[str, Any]) -> None:
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    sizes: dict[str, Any] = {"contexts": _numbers(contexts), "prefills": _numbers(prefills)}
    if not shapes:
        sizes |= {"head_dims": (128,), "batches": (1,)}
    options = BenchOptions(threads=threads, rounds=rounds, device=device, what=tuple(what.split(",")), **sizes)
    result = run(options, lambda part, text: print(f"{part}: {text}", flush=True), save)
    if name == NAME:
        write_documents(result)


@app.command()
def tables() -> None:
    """Write the documents from the committed run."""
    result = load(NAME)
    if result is None:
        raise typer.BadParameter(f"there is no {RESULTS / NAME}.json: run `python -m benchmarks.speed measure` first")
    write_documents(result)


if __name__ == "__main__":
    app()
