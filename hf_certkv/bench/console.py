"""What a run shows on the terminal at its end: a table a part, ratios first."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .report import Part, sections, unavailable, without_spread


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables, and what could not be measured and why."""
    for section in sections(result):
        console.print(_table(section))
    for line in unavailable(result):
        console.print(Text(line, style="yellow"))


def _table(section: Part) -> Table:
    table = Table(title=section.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(section.header):
        table.add_column(name, justify="left" if place < section.left else "right", no_wrap=place < section.left)
    previous = None
    for row in section.rows:
        if previous is not None and row[0] != previous:
            table.add_section()
        previous = row[0]
        table.add_row(*(without_spread(cell) for cell in row))
    return table
