"""`certkv matrix`: which models are certified, in which ways to generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .cli_base import JsonFile, check_out, console_for, fail, friendly, messages, quiet_libraries, write_json

if TYPE_CHECKING:
    from .matrix.examine import Examined

Names = Annotated[
    list[str] | None, typer.Option("--model-type", "-m", help="An architecture (model_type); several times for more.")
]
ModeNames = Annotated[
    list[str] | None, typer.Option("--mode", help="A way to generate; several times for more. All, if left out.")
]
Markdown = Annotated[Path | None, typer.Option("--markdown", dir_okay=False, help="Write the table as a page to this file.")]


def matrix(
    model_type: Names = None,
    mode: ModeNames = None,
    quick: Annotated[bool, typer.Option("--quick", help="One architecture of each kind.")] = False,
    attention: Annotated[str | None, typer.Option(help="Attention implementation; the model's default, if left out.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    markdown: Markdown = None,
    json_file: JsonFile = None,
) -> None:
    """Try a tiny model of every architecture in every mode, against transformers' own cache. Exits with 1 if one was wrong."""
    with friendly():
        check_out(json_file)
        check_out(markdown)
        quiet_libraries()
        from .matrix.modes import MODES
        from .matrix.run import kinds, run
        from .matrix.table import page
        from .matrix.tiny import architectures

        known = architectures()
        for given, names, what in ((model_type, known, "model type"), (mode, list(MODES), "mode")):
            unknown = sorted(set(given or ()) - set(names))
            if unknown:
                fail(f"unknown {what} {unknown[0]!r}; known: {', '.join(names)}.")
        if quick and model_type:
            fail("--quick chooses the architectures: leave --model-type out.")
        chosen = list(model_type or (kinds() if quick else known))
        with messages().status("starting") as status:
            done = 0

            def tell(found: Examined) -> None:
                nonlocal done
                done += 1
                status.update(f"{done} of {len(chosen)}: {escape(found.model_type)}")

            result = run(chosen, list(mode or MODES), workers, attention, tell)
        _show(result)
        if json_file is not None:
            write_json(json_file, result)
        if markdown is not None:
            markdown.expanduser().write_text(page(result), encoding="utf-8")
    if result["summary"]["failures"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any]) -> None:
    """Print what is not certified in every mode, and the sums."""
    from .matrix.table import reasons

    sums = result["summary"]
    table = Table(title=f"transformers {result['transformers']}: {sums['architectures']} architectures", title_justify="left")
    for column in ("architecture", "certified modes", "why not the others"):
        table.add_column(column)
    for found in result["architectures"]:
        modes = found["modes"].values()
        count = sum(mode["status"] == "certified" for mode in modes)
        if found["failed"] or count < len(modes):
            table.add_row(found["model_type"], f"{count} of {len(modes)}", Text(found["failed"] or reasons(found)))
    out = console_for(stderr=False)
    if table.row_count:
        out.print(table)
    out.print(
        f"{sums['certified']} of {sums['with_full_attention']} architectures with full attention are certified in every mode "
        f"that transformers offers for them ({sums['certified_share']:.1%}), {sums['partly_certified']} in part; "
        f"{sums['head_steps']:,} head-steps, largest error {sums['worst_error_over_bound']:.2f} of its bound."
    )
    for failure in sums["failures"]:
        out.print(Text(failure, style="bold red"))
