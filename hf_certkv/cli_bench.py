"""`certkv bench`: speed and memory beside the dense cache and transformers' quantised ones, on the user's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .cli_base import Device, JsonFile, check_out, console_for, fail, friendly, messages, quiet_libraries, write_json

if TYPE_CHECKING:
    from .bench.options import BenchOptions

What = Annotated[
    str | None,
    typer.Option("--what", help="Parts, with commas: attention, decode, prefill, memory, quality, long. All, if left out."),
]
Numbers = Annotated[str | None, typer.Option(help="Tokens held, with commas. Prefills: those up to 8192; long: the longest.")]
Widths = Annotated[str | None, typer.Option("--head-dim", help="Channels of a head, with commas. The first: everywhere.")]
Batches = Annotated[str | None, typer.Option("--batch", help="Rows of the batch, with commas. The first: everywhere.")]


def bench(
    what: What = None,
    contexts: Numbers = None,
    head_dim: Widths = None,
    batch: Batches = None,
    threads: Annotated[int | None, typer.Option(help="Of torch; as it is set, if left out.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Samples of each system.")] = None,
    device: Annotated[Device, typer.Option(help="'auto' is CUDA where there is one.")] = Device.auto,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of weights, tokens, traces and the order of turns.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Short contexts, few systems and rounds: under a minute.")] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for bench.json, bench.md and the plots.")] = Path(
        "certkv-bench"
    ),
    json_file: JsonFile = None,
) -> None:
    """Time this cache, the dense one and transformers' quantised ones in turns, and weigh them."""
    with friendly():
        check_out(json_file)
        options = _options(what, contexts, head_dim, batch, threads, rounds, device, seed, quick)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {out}: {error.strerror or error}.")
        quiet_libraries()
        from .bench.console import show
        from .bench.run import run

        with messages().status("starting") as status:

            def tell(part: str, text: str) -> None:
                status.update(f"{escape(part)}  {escape(text)}")

            def save(result: dict[str, Any]) -> None:
                write_json(out / "bench.json", result)

            result = run(options, tell, save)
            status.update("drawing")
            written = _documents(out, result)
        if json_file is not None:
            write_json(json_file, result)
        console = console_for(stderr=False)
        show(result, console)
        console.print(escape(f"Written to {out}: {', '.join(written)}"), soft_wrap=True)


def _documents(out: Path, result: dict[str, Any]) -> list[str]:
    from .bench.plots import draw_all
    from .bench.report import document

    plots = draw_all(result, out)
    (out / "bench.md").write_text(document(result, plots), encoding="utf-8")
    return ["bench.json", "bench.md", *plots]


def _options(
    what: str | None, contexts: str | None, head_dim: str | None, batch: str | None, threads: int | None,
    rounds: int | None, device: Device, seed: int, quick: bool,
) -> BenchOptions:  # fmt: skip
    from .bench.options import PREFILLS, BenchOptions

    changes: dict[str, Any] = {"seed": seed, "threads": threads, "device": _resolve(device)}
    if what is not None:
        changes["what"] = tuple(part.strip() for part in what.split(",") if part.strip())
    for name, option, text in (
        ("contexts", "--contexts", contexts), ("head_dims", "--head-dim", head_dim), ("batches", "--batch", batch)
    ):  # fmt: skip
        if text is not None:
            changes[name] = _numbers(option, text)
    if "contexts" in changes:
        changes["prefills"] = tuple(size for size in changes["contexts"] if size <= PREFILLS[-1]) or PREFILLS[:1]
        changes["long"] = max(changes["contexts"])
    if rounds is not None:
        changes["rounds"] = rounds
    return BenchOptions.brief(**changes) if quick else BenchOptions(**changes)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        fail(f"{option} {text!r}: expected whole numbers separated by commas, such as 2048,8192.")


def _resolve(device: Device) -> str:
    if device is not Device.auto:
        return str(device.value)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
