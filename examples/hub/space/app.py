"""The Space: a prompt in, the answers of three caches out, and the certificate drawn while they are written."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

# Before gradio is imported: nothing leaves the machine at run time.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import render
from engine import FORMATS, LARGEST_SEED, MOST_CHARACTERS, MOST_NEW_TOKENS, Comparison, Question, model_names
from prompts import examples

from hf_certkv import CertificateViolation, CertKVError

SECONDS = 0.12  # between two pictures
AT_ONCE, WAITING = 2, 16  # requests computed at a time, and let wait
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the reader's system: none is fetched
MONO = ("ui-monospace", "Consolas", "monospace")
TITLE = "A KV cache that proves how exact it is"
HERO = f"""<h1>{TITLE}</h1>
<p>Three caches continue your text: <b>dense</b> keeps every key and value exact, <b>naive</b> keeps 8-bit keys and 4- or 8-bit
values and hopes, and <b>certified</b> keeps the same bits but proves at every step and head how far its attention output can be
from the exact one, and reads originals where that is more than your tolerance. The promise is made per head and step, about
attention outputs and not about the text: an error within the tolerance can still let a word change places with one almost as
likely.</p>"""


def compare(
    prompt: str, model: str, value_format: str, rtol: float, new_tokens: int, temperature: float, seed: int, audit: bool
) -> Iterator[tuple[str, str]]:
    """The answers and the certificate as HTML, again and again while they grow.

    Raises: gr.Error: the input cannot be used; the message says why.
    """
    try:
        question = Question(
            prompt or "", model, float(rtol), value_format, _whole(new_tokens), float(temperature), _whole(seed), bool(audit)
        )
        run = Comparison(question)
        for note in run.notes():
            gr.Warning(escape(note), title="Before you read the result")
        yield render.reading(run), render.no_certificate()
        shown = time.monotonic()
        for _ in run.steps():
            if time.monotonic() - shown >= SECONDS:
                yield render.answers(run), render.certificate(run)
                shown = time.monotonic()
        yield render.answers(run, done=True), render.certificate(run, done=True)
    except CertificateViolation as error:
        raise gr.Error(escape(str(error)), title="A certificate was broken: a bug in hf_certkv") from error
    except CertKVError as error:
        raise gr.Error(escape(str(error)), title="This cannot be computed", print_exception=False) from error


def _whole(number: Any) -> Any:
    """A slider's 48.0 as 48; anything else is left for the engine to refuse."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def build() -> gr.Blocks:
    """The page."""
    prepared = examples()
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(HERO, elem_classes="hero")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                prompt = gr.Textbox(
                    prepared[0].prompt, label="Prompt", lines=7, max_lines=7, max_length=MOST_CHARACTERS, elem_id="prompt",
                    placeholder="Some hundred words to continue …",
                )  # fmt: skip
                model = gr.Dropdown(
                    model_names(), value="prose", label="Model", elem_id="model",
                    info="prose continues English. retriever goes on with what followed the prompt's last word earlier in the "
                    "text; in its hard form that word hardly stands out, so that small errors change answers.",
                )  # fmt: skip
                rtol = gr.Slider(0.005, 0.2, 0.02, step=0.005, label="Tolerance, as a share of a head's output", elem_id="rtol")
                value_format = gr.Radio(list(FORMATS), value="K8 V4", label="Bits of keys and values", elem_id="format")
                with gr.Accordion("More settings", open=False):
                    new_tokens = gr.Slider(1, MOST_NEW_TOKENS, 48, step=1, label="Tokens to write", elem_id="tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest token.")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                    audit = gr.Checkbox(label="Audit: true error of every output, in float64 (slower)", elem_id="audit")
                with gr.Row():
                    start = gr.Button("Compare", variant="primary", min_width=100, elem_id="compare")
                    stop = gr.Button("Stop", min_width=100, elem_id="stop")
                gr.Examples(
                    [[example.prompt, example.model, example.new_tokens] for example in prepared],
                    [prompt, model, new_tokens],
                    example_labels=[example.label for example in prepared],
                    cache_examples=False,
                )
            with gr.Column(scale=9, min_width=300):
                answers = gr.HTML(render.waiting(), elem_id="answers")
                certificate = gr.HTML(render.no_certificate(), elem_id="certificate")
        inputs: list[Any] = [prompt, model, value_format, rtol, new_tokens, temperature, seed, audit]
        running = start.click(
            compare, inputs, [answers, certificate], api_name="compare", concurrency_limit=AT_ONCE, trigger_mode="once",
            show_progress="minimal", show_progress_on=certificate,
        )  # fmt: skip
        stop.click(None, cancels=[running])
    return page.queue(max_size=WAITING)


def main() -> None:
    """Serve the page; the port and the address come from gradio's own environment variables."""
    # That the naive cache certifies nothing is what the page shows.
    warnings.filterwarnings("ignore", message=".*certifies NOTHING")
    theme = gr.themes.Base(primary_hue="blue", font=FONTS, font_mono=MONO).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
    style = Path(__file__).with_name("style.css")
    build().launch(theme=theme, css_paths=style, ssr_mode=False, footer_links=["settings"])


if __name__ == "__main__":
    main()
