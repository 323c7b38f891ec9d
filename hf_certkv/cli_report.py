"""`certkv report`: run files as one page, and as pictures for print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .cli_base import console_for, fail, friendly, messages

Files = Annotated[list[Path], typer.Argument(metavar="RUN.json...", help="Run files of `certkv eval` or `certkv generate`.")]
Html = Annotated[Path | None, typer.Option("--html", dir_okay=False, help="Write the page to this file.")]
Png = Annotated[Path | None, typer.Option("--png", file_okay=False, help="Folder for the figures as PNG, for print.")]


def report(runs: Files, html: Html = None, png: Png = None) -> None:
    """Make one page of run files that needs no network and no other file, and figures for print."""
    with friendly():
        if html is None and png is None:
            fail("nothing to write: give --html FILE, --png FOLDER, or both.")
        if html is not None and not html.expanduser().parent.is_dir():
            fail(f"--html {html}: there is no folder {str(html.parent)!r}.")
        from .evaluation.runs import load_run
        from .files import write_whole

        found = [load_run(path) for path in runs]
        said = []
        with messages().status("drawing"):
            if html is not None:
                from .evaluation.page import page

                try:
                    write_whole(html.expanduser(), page(found))
                except OSError as error:
                    fail(f"--html {html}: cannot be written ({error.strerror or error}).")
                said.append(f"The page is {html}.")
            if png is not None:
                from .evaluation.figures import draw_all

                try:
                    drawn = draw_all(found, _folder(png))
                except OSError as error:
                    fail(f"--png {png}: cannot be written ({error.strerror or error}).")
                said.append(f"{len(drawn)} figures are in {png}." if drawn else "There is nothing to draw for print.")
        console_for(stderr=False).print(escape(" ".join(said)), soft_wrap=True)


def _folder(path: Path) -> Path:
    path = path.expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--png {path}: {error.strerror or error}.")
    return path
