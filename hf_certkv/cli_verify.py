"""`certkv verify`: attacks on the certificate, on the user's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .cli_base import Device, JsonFile, check_out, console_for, fail, friendly, messages, write_json

if TYPE_CHECKING:
    from .verify.scorecard import Scorecard

SHOWN_FAILURES = 3  # a part
Only = Annotated[
    list[str] | None, typer.Option("--only", help="A part to run; may be given several times. All parts, if it is left out.")
]
SaveTo = Annotated[Path | None, typer.Option("--save-to", file_okay=False, help="A folder for the closest approaches found.")]
KernelName = Annotated[
    str,
    typer.Option("--kernel", help="What computes the calls: auto (what users get), reference, cpu or triton (only its sizes)."),
]
Replay = Annotated[
    Path | None, typer.Option("--replay", dir_okay=False, help="Judge the case in this witness file, and nothing else.")
]


def verify(
    minutes: Annotated[
        float, typer.Option("--minutes", "-t", min=0.0, help="How long to go on, all parts together; about one at least.")
    ] = 5.0,
    device: Annotated[Device, typer.Option(help="Where the cache runs. The oracle runs on the CPU.")] = Device.cpu,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Another seed, other attacks.")] = 0,
    only: Only = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes for the random cases.")] = 1,
    head_steps: Annotated[int | None, typer.Option(min=1, help="Stop the random cases after so many head-steps.")] = None,
    save_to: SaveTo = None,
    kernel: KernelName = "auto",
    replay: Replay = None,
    json_file: JsonFile = None,
) -> None:
    """Try to break the certificate on this machine, and print a scorecard. Exits with 1 if anything was broken."""
    with friendly():
        check_out(json_file)
        if replay is not None:
            if only or save_to is not None or json_file is not None or head_steps is not None:
                fail("--replay judges one case and prints the result: leave --only, --save-to, --json and --head-steps out.")
            _replay(replay, _resolve(device), kernel)
            return
        from .verify.scorecard import verify as run

        if save_to is not None:
            try:
                save_to.expanduser().mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fail(f"--save-to {save_to} cannot be made: {error.strerror or error}.")
        with messages().status("starting") as status:

            def tell(name: str, share: float, text: str) -> None:
                status.update(f"{escape(name)} {share:4.0%}  {escape(text)}")

            chosen = None if save_to is None else save_to.expanduser()
            card = run(minutes, _resolve(device), seed, tuple(only or ()), workers, head_steps, chosen, kernel, tell)
        show(card)
        if json_file is not None:
            write_json(json_file, card.to_dict())
    if not card.passed:
        raise typer.Exit(1)


def _resolve(device: Device) -> str:
    if device is not Device.auto:
        return str(device.value)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def show(card: Scorecard) -> None:
    """Print the scorecard, and what failed."""
    title = f"soundness on this machine: device {card.device}, seed {card.seed}, {card.seconds:,.0f} s"
    table = Table(title=title, title_justify="left")
    table.add_column("part", no_wrap=True)
    table.add_column("checked", justify="right")
    table.add_column("failed", justify="right")
    table.add_column("what holds, and the figures", ratio=1)
    for part in card.parts:
        if part.skipped:
            table.add_row(part.name, "-", "-", Text(f"not run: {part.skipped}", style="yellow"))
            continue
        style = "green" if part.passed else "bold red"
        lines = Text(part.claim, style=style)
        for name, figure in part.headline().items():
            lines.append(f"\n{name}: {figure}", style="default")
        table.add_row(part.name, f"{part.checked:,} {part.unit}", Text(f"{part.failed:,}", style=style), lines)
    out = console_for(stderr=False)
    out.print(table)
    for part in card.parts:
        for failure in part.failures[:SHOWN_FAILURES]:
            out.print(Text(f"{part.name}: {failure}", style="red"))
    verdict = "nothing was broken" if card.passed else "SOMETHING WAS BROKEN: please report it with the file of --json"
    out.print(Text(verdict, style="bold green" if card.passed else "bold red"))


def _replay(path: Path, device: str, kernel: str) -> Any:
    from .verify.kernel import require_interpreter, using
    from .verify.scorecard import usable_device
    from .verify.witness import replay

    where = usable_device(device)
    with using(kernel):
        if kernel == "triton":
            require_interpreter(where)
        verdict = replay(path, where)
    out = console_for(stderr=False)
    for breach in verdict.breaches:
        out.print(Text(breach, style="bold red"))
    out.print(f"error / bound: {verdict.share:.9f} at batch row, query head, position {verdict.where}")
    if verdict.breaches:
        raise typer.Exit(1)
