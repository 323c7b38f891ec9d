"""`certkv card`: a model card for the Hub, made of measured runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .cli_base import friendly, messages, quiet_libraries

Runs = Annotated[list[Path], typer.Argument(help="Run files of `certkv eval`, all of one model.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="Where to write the card.")]
Base = Annotated[Path | None, typer.Option(dir_okay=False, help="A card to extend: its metadata and text stay.")]
Caches = Annotated[
    list[str] | None,
    typer.Option("--cache", "-c", help="A certified cache to write about; several times for more. All, if left out."),
]


def card(runs: Runs, out: Out, base: Base = None, cache: Caches = None) -> None:
    """Write a model card: results that the Hub can read, and what they mean."""
    with friendly():
        from .errors import InputError
        from .evaluation.card import make_card
        from .files import write_whole

        out = out.expanduser()
        if out.exists() and (base is None or out.resolve() != base.expanduser().resolve()):
            raise InputError(f"--out {out}: the file exists; give it as --base too to extend it, or another name.")
        quiet_libraries()
        text = make_card(runs, base, cache)
        try:
            write_whole(out, text)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror or error}).") from error
        messages().print(f"[green]wrote[/] {escape(str(out))}", soft_wrap=True)
