"""What caches do to the embedded models' answers: the committed runs of `certkv eval`, and every table made of them.

`python -m benchmarks.quality measure --text BOOK` makes the runs that are missing (an interrupted one is gone on with), then
writes docs/quality.md and its pictures, the README's table and the model cards; `tables` only writes those.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS
from benchmarks.quality_tables import PAGE, README_CACHES, page, readme
from benchmarks.tables import README, ROOT, fill
from hf_certkv.evaluation.runs import load_run

FOLDER = RESULTS / "eval"
CARDS = ROOT / "model_cards"
MODELS = ("prose", "retriever")

# Both formats; tolerances; the published method's policy, certified as always; and what each stores without a certificate.
CACHES = [
    "dense",
    "naive K8 V4=naive",
    "naive K8 V8=naive:value_bits=8",
    "certified K8 V4=certified",
    "certified K8 V4, rtol 0.05=certified:rtol=0.05",
    "certified K8 V8=certified:value_bits=8",
    "certified K8 V8, rtol 0.05=certified:value_bits=8,rtol=0.05",
    "paper's policy=paper",
    "paper's policy, rtol 0.05=paper:rtol=0.05",
]
PROSE = CACHES[:-1]  # the published policy takes most of the time
FEW = [CACHES[i] for i in (0, 1, 3, 5, 7)]
RULER = "niah_single_1,niah_multikey_2,niah_multikey_3,ruler_vt,ruler_cwe,ruler_fwe"

BOOK = ["--text", "{text}"]
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "prose_ppl_1024": (["ppl", "-m", "prose", *BOOK, "--context", "1024", "--items", "16", "--score-last", "256"], PROSE),
    "prose_ppl_2048": (["ppl", "-m", "prose", *BOOK, "--context", "2048", "--items", "16", "--score-last", "256"], PROSE),
    "prose_ppl_whole": (["ppl", "-m", "prose", *BOOK, "--context", "1024", "--items", "4", "--score-all"], FEW),
    "prose_divergence": (["divergence", "-m", "prose", *BOOK, "--context", "1024,2048", "--items", "12"], PROSE),
    "prose_ruler": (["ruler", "-m", "prose", "--tasks", RULER, "--context", "1152,2048", "--items", "3"], FEW),
    "retriever_needle": (["needle", "-m", "retriever", "--context", "1024,2048", "--items", "4"], CACHES),
    "retriever_needle_hard": (
        ["needle", "-m", "retriever", "--context", "8192", "--margin", "6", "--needles", "10", "--items", "20"],
        CACHES,
    ),
}

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(
    text: Annotated[Path, typer.Option(help="A book that the prose model was not trained on (committed: Gutenberg 14263).")],
    only: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(RUNS)}.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what is there.")] = False,
) -> None:
    """Make the runs, then everything that is made of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in only or RUNS:
        if name not in RUNS:
            raise typer.BadParameter(f"{name!r}: expected some of {', '.join(RUNS)}")
        arguments, caches = RUNS[name]
        command = [sys.executable, "-m", "hf_certkv", "eval", *(part.format(text=text) for part in arguments)]
        command += [part for cache in caches for part in ("--cache", cache)]
        command += ["--json", str(FOLDER / f"{name}.json"), *(["--overwrite"] if overwrite else [])]
        subprocess.run(command, check=True)
    tables()


@app.command()
def tables() -> None:
    """Write docs/quality.md, its pictures, the README's table and the model cards from the committed runs."""
    runs: dict[str, dict[str, Any]] = {path.stem: load_run(path) for path in sorted(FOLDER.glob("*.json"))}
    PAGE.write_text(page({name: runs[name] for name in RUNS if name in runs}), encoding="utf-8")
    fill(README, "quality", readme(runs, README_CACHES))
    for model in MODELS:
        files = [str(FOLDER / f"{name}.json") for name in RUNS if name in runs and runs[name]["model"]["name"] == model]
        card = CARDS / f"{model}.md"
        command = [sys.executable, "-m", "hf_certkv", "card", *files, "--base", str(card), "--out", str(card)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    app()
