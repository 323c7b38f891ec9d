"""Run the measurements and write `docs/measurements.md` from their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, help=__doc__)
PARTS = ("memory", "formats", "greedy", "audit", "tightness")


@app.command()
def main(
    part: Annotated[str, typer.Argument(help=f"one of {', '.join(PARTS)}, all, or tables")] = "all",
    text: Annotated[Path | None, typer.Option(help="a book as plain text that the prose model was not trained on")] = None,
) -> None:
    """Measure one part or all, then write the tables."""
    from benchmarks import audit, formats, greedy, memory, soundness_tables, tables, tightness

    if part not in (*PARTS, "all", "tables"):
        raise typer.BadParameter(f"{part!r}: expected one of {', '.join(PARTS)}, all, tables")
    chosen = PARTS if part == "all" else (part,)
    books = {"formats": formats, "greedy": greedy, "audit": audit, "tightness": tightness}
    for name, part_of in books.items():
        if name in chosen:
            if text is None or not text.is_file():
                raise typer.BadParameter(
                    f"--text {text}: expected a text file (the committed run used Project Gutenberg 14263)"
                )
            part_of.measure(text)
    if "memory" in chosen:
        memory.measure()
    tables.write()
    soundness_tables.write()


if __name__ == "__main__":
    app()
