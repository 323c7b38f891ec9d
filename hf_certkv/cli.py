"""The `certkv` command: a demonstration, generation with any model, and a plan of what a cache will take.

Heavy imports stay inside the functions, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .cli_base import (
    BlockSize,
    Device,
    Dtype,
    DtypeOption,
    JsonFile,
    Model,
    Policy,
    RecentWindow,
    Refine,
    Rtol,
    Scope,
    ValueGroup,
    check_out,
    console_for,
    fail,
    friendly,
    load,
    messages,
    quiet_libraries,
    write_json,
)
from .cli_bench import bench
from .cli_card import card
from .cli_eval import app as evaluation
from .cli_matrix import matrix
from .cli_report import report
from .cli_verify import verify

app = typer.Typer(
    name="certkv",
    help="A quantised KV cache for Hugging Face transformers that proves, at every step, how exact it is.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"certkv {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A quantised KV cache for Hugging Face transformers that proves, at every step, how exact it is."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the picture and the report.")] = Path("certkv-demo"),
    tokens: Annotated[int, typer.Option(min=512, max=65536, help="Length of the haystack.")] = 8192,
    rtol: Rtol = 0.02,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the haystack and of the passage.")] = 0,
) -> None:
    """Compare the dense, the naive and the certified cache on the two embedded models; two minutes on a laptop."""
    with friendly():
        from .config import CertKVConfig
        from .demo import run_demo

        CertKVConfig(rtol=rtol)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {out}: {error.strerror or error}.")
        quiet_libraries()
        console = console_for(stderr=False)
        data = run_demo(out, tokens, rtol, seed, console)
        write_json(out / "report.json", data)
        where = escape(f"The picture is {out / 'demo.png'}, everything measured is in {out / 'report.json'}.")
        console.print(where, soft_wrap=True)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        fail("--prompt and --prompt-file were both given: expected one of them.")
    if prompt_file is not None:
        try:
            text, source = prompt_file.read_text(encoding="utf-8"), f"--prompt-file {prompt_file}"
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--prompt-file {prompt_file}: {getattr(error, 'strerror', None) or error}.")
    elif prompt is not None:
        text, source = prompt, "--prompt"
    else:
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
        if not text:
            fail("no prompt: give --prompt, --prompt-file, or pipe a text in.")
        source = "standard input"
    if not text.strip():
        fail(f"{source}: the prompt is empty.")
    return text


class _Stream:
    """A streamer that ends a spinner when the first token arrives, then hands everything on to another streamer."""

    def __init__(self, inner: Any, status: Any) -> None:
        self.inner, self.status, self.calls = inner, status, 0

    def put(self, value: Any) -> None:
        """Take the prompt first, then token by token."""
        self.calls += 1
        if self.calls == 2:
            self.status.stop()
        self.inner.put(value)

    def end(self) -> None:
        """The text is over."""
        self.status.stop()
        self.inner.end()


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text to continue.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    rtol: Rtol = 0.02,
    atol: Annotated[float, typer.Option(help="Absolute tolerance, in units of the values.")] = 0.0,
    scope: Annotated[Scope, typer.Option(help="Whether each head or each layer meets the tolerance.")] = Scope.head,
    value_bits: Annotated[int, typer.Option(help="Bits of a value: 4 or 8.")] = 4,
    refine: Annotated[Refine, typer.Option(help="Where refinement planes live.")] = Refine.host,
    block_size: BlockSize = 64,
    policy: Annotated[Policy, typer.Option(help="'naive' certifies nothing: a baseline.")] = Policy.budget,
    dtype: DtypeOption = Dtype.auto,
    device: Annotated[Device, typer.Option(help="'auto' is CUDA where there is one.")] = Device.auto,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; implies --sample.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of sampling.")] = 0,
    json_file: JsonFile = None,
    audit: Annotated[bool, typer.Option("--audit", help="Compare every output with exact attention; slow.")] = False,
) -> None:
    """Continue a text with a certified cache: the text on stdout, the certificate on stderr."""
    if temperature is not None and not 0 < temperature < float("inf"):
        fail(f"--temperature {temperature}: expected a number above 0.")
    with friendly():
        from .config import CertKVConfig

        settings = CertKVConfig.from_dict(
            {"rtol": rtol, "atol": atol, "scope": scope.value, "value_bits": value_bits, "refine": refine.value,
             "block_size": block_size, "policy": policy.value, "audit": audit, "seed": seed}
        )  # fmt: skip
        check_out(json_file)
        text = _read_prompt(prompt, prompt_file)
        _generate(model, text, settings, max_new_tokens, dtype, device, sample, temperature, seed, json_file)


def _generate(
    name: str,
    text: str,
    settings: Any,
    max_new_tokens: int,
    dtype: Dtype,
    device: Device,
    sample: bool,
    temperature: float | None,
    seed: int,
    json_file: Path | None,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    from .cache import CertifiedQuantizedCache

    if device is Device.cuda and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device here.")
    where = "cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu"
    quiet_libraries()
    err = messages()
    tokenizer = load(AutoTokenizer, name)
    loaded = load(AutoModelForCausalLM, name, dtype=dtype.value).to(where).eval()
    inputs = tokenizer(text, return_tensors="pt").to(where)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        fail("the prompt has no tokens.")
    longest = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        warnings.warn(f"{length} + {max_new_tokens} tokens are more than the {longest} the model was made for.", stacklevel=2)
    record = "full" if json_file is not None else "summary"  # a run file shows every step
    cache = CertifiedQuantizedCache(loaded.config, settings=settings, record=record)
    options: dict[str, Any] = {"do_sample": sample or temperature is not None}
    if temperature is not None:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    status = err.status(f"reading {length:,} tokens")
    stream = _Stream(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), status)
    with status:
        output = loaded.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], past_key_values=cache,
            max_new_tokens=max_new_tokens, streamer=stream, **options,
        )  # fmt: skip
    report = cache.report()
    new = output[0, length:].tolist()
    if report.to_dict()["overall"]["head_steps"]:
        err.print(report)
    else:
        err.print("Nothing was quantised, so every step was exact: so few tokens (or no layer of this model) call for it.")
    if json_file is not None:
        from .evaluation.run import of_generation

        text = tokenizer.decode(new, skip_special_tokens=True)
        write_json(json_file, of_generation(cache, loaded, name, length, new, text))


app.command()(verify)
app.command()(bench)
app.command()(matrix)
app.add_typer(evaluation)
app.command()(report)
app.command()(card)


@app.command()
def plan(
    model: Model,
    context: Annotated[int, typer.Option("--context", "-n", help="Tokens that the cache is to hold.")],
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 1,
    dtype: DtypeOption = Dtype.auto,
    block_size: BlockSize = 64,
    value_group: ValueGroup = None,
    recent_window: RecentWindow = 64,
    hot_blocks: Annotated[int | None, typer.Option(help="Promoted blocks a head that may stay on the device.")] = None,
    device: Annotated[Device, typer.Option(help="Where the cache is to lie. 'auto' is CUDA where there is one.")] = Device.auto,
    json_file: JsonFile = None,
) -> None:
    """Say what each format takes on the device and on the host, from the model's config alone."""
    with friendly():
        from .config import CertKVConfig

        settings = CertKVConfig(
            block_size=block_size, value_group=value_group, recent_window=recent_window, hot_blocks=hot_blocks
        )
        check_out(json_file)
        quiet_libraries()
        _plan(model, context, batch, dtype, device, settings, json_file)


def _plan(name: str, context: int, batch: int, dtype: Dtype, device: Device, settings: Any, json_file: Path | None) -> None:
    import torch
    from transformers import AutoConfig

    from .plan import plan_memory, uncounted_layers
    from .report import human_bytes

    config = load(AutoConfig, name)
    stated = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(stated, str):
        stated = getattr(torch, stated, None)
    chosen = getattr(torch, dtype.value) if dtype is not Dtype.auto else stated
    if not isinstance(chosen, torch.dtype):
        chosen = torch.bfloat16
        warnings.warn("The config names no dtype: bfloat16 is assumed. Give --dtype for another.", stacklevel=2)
    where = "cuda" if device is Device.cuda or (device is Device.auto and torch.cuda.is_available()) else "cpu"
    rows = {
        f"K8 V{bits}, refine={refine}": plan_memory(
            config, context, batch, chosen, settings.replace(value_bits=bits, refine=refine), where
        )
        for bits in (4, 8)
        for refine in ("off", "host", "device")
    }
    dense = next(iter(rows.values())).dense
    kind = str(chosen).removeprefix("torch.")
    table = Table(title=f"{name}: {context:,} tokens x {batch} row(s), {kind}, {where}, blocks of {settings.block_size}")
    for column in ("cache", "device", "of dense", "host", "device bytes a token", "a step works in"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    table.add_row("dense (DynamicCache)", human_bytes(dense), "100.0%", "-", f"{dense / context / batch:,.0f}", "-")
    table.add_section()
    for label, memory in rows.items():
        share, token = f"{memory.ratio:.1%}", f"{memory.device / context / batch:,.0f}"
        table.add_row(label, human_bytes(memory.device), share, human_bytes(memory.host), token, human_bytes(memory.working))
    console_for(stderr=False).print(table)
    uncounted = uncounted_layers(config)
    if uncounted:
        messages().print(f"Not counted: {len(uncounted)} layer(s) of other kinds, whose states the config does not size.")
    if json_file is not None:
        write_json(
            json_file,
            {"model": name, "context": context, "batch": batch, "dtype": kind, "device": where, "settings": settings.to_dict(),
             "dense_bytes": dense, "uncounted_layers": sorted(uncounted),
             "formats": {label: memory.to_dict() for label, memory in rows.items()}},
        )  # fmt: skip
