"""What the commands share: their options, where they speak, how they fail, how they write a file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from .files import write_whole

LONGEST_MESSAGE = 400  # characters of someone else's error message that are shown
FILE_WIDTH = 118  # columns where the output is no terminal: the certificate's table fits


Scope = Enum("Scope", {"head": "head", "layer": "layer"}, type=str)
Refine = Enum("Refine", {"device": "device", "host": "host", "off": "off"}, type=str)
Policy = Enum("Policy", {"budget": "budget", "paper": "paper", "naive": "naive"}, type=str)
Device = Enum("Device", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"}, type=str)
Dtype = Enum("Dtype", {"auto": "auto", "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}, type=str)

Model = Annotated[str, typer.Option("--model", "-m", help="'retriever', 'prose', a local folder, or a Hub name.")]
Rtol = Annotated[float, typer.Option(help="Relative tolerance, against the norm of a head's output.")]
DtypeOption = Annotated[Dtype, typer.Option(help="'auto' is the dtype that the model's config names.")]
BlockSize = Annotated[int, typer.Option(help="Tokens a block: 16, 32, 64 or 128.")]
ValueGroup = Annotated[
    int | None, typer.Option(help="Channels that share a value scale; 0: the whole head. Unset: 32, or the whole head for V8.")
]
RecentWindow = Annotated[int, typer.Option(help="Most recent tokens that stay exact on the device.")]
JsonFile = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write everything to this JSON file.")]


def console_for(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def messages() -> Console:
    return console_for(stderr=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, and out."""
    console = messages()
    console.print("[bold red]error:[/] " + escape(" ".join(message.split())), soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def friendly() -> Iterator[None]:
    """Show the package's own errors as one line, and warnings as notes. A broken certificate ends with 1, misuse with 2."""
    from .errors import CertificateViolation, CertKVError

    def show(message: Warning | str, *_: Any) -> None:
        messages().print("[yellow]note:[/] " + escape(" ".join(str(message).split())), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        try:
            yield
        except CertificateViolation as error:
            fail(f"a certificate was broken, which is a bug in this package: {error}", code=1)
        except CertKVError as error:
            fail(str(error))
        except (MemoryError, RuntimeError) as error:
            # torch's own class is a RuntimeError on a GPU; anything else of that kind deserves its traceback.
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            fail(f"out of memory: {str(error)[:LONGEST_MESSAGE]}", code=1)
        except KeyboardInterrupt:
            fail("stopped.", code=130)


def quiet_libraries() -> None:
    """Keep progress bars, advice and retries of transformers and the Hub out of the output."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(loader: Any, name: str, **options: Any) -> Any:
    """What a transformers loader makes of a name or path; one line where it cannot."""
    from .embedded import resolve_model

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        fail(f"--model {name!r}: there is no such folder.")
    try:
        where = resolve_model(os.path.expanduser(name))
        with messages().status(f"loading {escape(name)}"):
            return loader.from_pretrained(where, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        message = " ".join(str(error).split())
        fail(f"--model {name!r} cannot be loaded: {message[:LONGEST_MESSAGE]}")


def check_out(path: Path | None) -> None:
    """Refuse a file that could not be written, before the long work."""
    if path is not None and not path.expanduser().parent.is_dir():
        fail(f"--json {path}: there is no folder {str(path.parent)!r}.")
    if path is not None and not os.access(path.expanduser().parent, os.W_OK):
        fail(f"--json {path}: nothing can be written to the folder {str(path.parent)!r}.")


def write_json(path: Path, data: Any, indent: int | None = 1) -> None:
    """Write a file whole or not at all."""
    path = path.expanduser()
    try:
        write_whole(path, json.dumps(data, indent=indent) + "\n")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror or error}.")
