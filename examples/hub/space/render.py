"""What the Space shows, as HTML and SVG: three answers side by side, and the certificate step by step.

Colours come from style.css, by class, so that both of a browser's colour schemes are served by the same markup. The plots are
stretched to the room there is; their labels are text beside them and stay readable at any width.
"""

from __future__ import annotations

import math
import re
from html import escape

import numpy as np
from engine import CACHES, Answer, Certificate, Comparison

from hf_certkv.ladder import Rung
from hf_certkv.report import human_bytes

SHADES = 8  # of the map of heads: how much of the tolerance a bound uses
ROW_PIXELS, LOWEST_MAP, HIGHEST_MAP = 9, 72, 320
ASKED_WORDS = 4  # of the prompt's end, shown before its continuation
DECADES = 5.0  # at most, of the plot of bounds
LINE_END = re.compile(r"(?<!\n)\n(?!\n)")
EXPLAINED = {
    "dense": "every key and value exact",
    "naive": "quantised, nothing checked",
    "certified": "quantised, every output proven",
}
SHARES = (
    ("fast", "fast path", (Rung.FAST,)),
    ("raised", "raised: some blocks read more exactly", (Rung.KEYS, Rung.VALUES)),
    ("dense", "recomputed densely", (Rung.DENSE_HEAD, Rung.DENSE_LAYER)),
)


def percent(share: float) -> str:
    """A share for people: three digits that count, or a dash where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.3g} %"


def answers(run: Comparison, done: bool = False) -> str:
    """The three answers so far."""
    cards = "".join(_card(run, answer) for answer in run.answers())
    return f'<div class="answers" data-done="{str(done).lower()}">{cards}</div>'


def waiting() -> str:
    """The answers' place before there are any."""
    hint = '<p class="faint">waits for a prompt and the button</p>'
    cards = [_frame(name, hint) for name in CACHES]
    return f'<div class="answers">{"".join(cards)}</div>'


def reading(run: Comparison) -> str:
    """The answers' place while the prompt is read."""
    cards = [_frame(name, f'<p class="faint">reading {run.prompt_tokens:,} tokens …</p>') for name in CACHES]
    return f'<div class="answers">{"".join(cards)}</div>'


def _frame(name: str, body: str) -> str:
    return (
        f'<section class="card {name}" data-cache="{name}"><h3>{name.capitalize()}</h3>'
        f'<p class="faint">{EXPLAINED[name]}</p>{body}</section>'
    )


def _card(run: Comparison, answer: Answer) -> str:
    # Books' lines end where a page ended; only empty lines are paragraphs.
    text = LINE_END.sub(" ", answer.text)
    same, other = escape(text[: answer.agreed].lstrip()), escape(text[answer.agreed :])
    gap = other[: len(other) - len(other.lstrip())]
    asked = escape(" ".join(run.question.prompt.split()[-ASKED_WORDS:]))
    marked = f"<mark>{other.lstrip()}</mark>" if other.strip() else ""
    text = f'<p class="faint asked">… {asked}</p><div class="text">{same}{gap}{marked}</div>'
    if answer.name == "dense":
        return _frame(answer.name, f'{text}<p class="foot">{answer.tokens} tokens</p>')
    differs = answer.same < answer.tokens
    verdict = f"differs after {answer.same} of" if differs else "as dense: all"
    foot = f'<p class="foot"><span class="{"bad" if differs else "good"}">{verdict} {answer.tokens} tokens</span>'
    if not math.isnan(answer.bound):
        broken = answer.bound > run.question.rtol
        foot += f'<br>largest bound <b class="{"bad" if broken else "good"}">{percent(answer.bound)}</b>'
        foot += ", nothing done about it" if broken else ""
    if not math.isnan(answer.error):
        foot += f"<br>largest true error <b>{percent(answer.error)}</b>"
    return _frame(answer.name, f"{text}{foot}</p>")


def certificate(run: Comparison, done: bool = False) -> str:
    """The certificate so far: figures, bounds by step, the map of heads, rungs and memory."""
    proven = run.certificate()
    rtol, steps = run.question.rtol, run.question.new_tokens
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes())
    if not proven.head_steps:
        empty = "" if notes else '<p class="faint">Nothing was quantised yet: every step so far is exact.</p>'
        return f'<div class="certificate" data-done="{str(done).lower()}">{_title("")}{notes}{empty}</div>'
    bound, error = _largest(proven.bound), _largest(proven.error)
    dense = proven.share(*SHARES[2][2])
    state = f"{run.lanes[-1].name} cache, step {len(run.lanes[-1].ids)} of {steps}"
    tiles = [
        ("largest bound", percent(bound), f"tolerance {percent(rtol)}"),
        ("outputs", f"{proven.head_steps:,}", f"{percent(dense)} recomputed densely" if dense else "each one certified"),
        ("device memory", percent(proven.memory.ratio), "of the dense cache's"),
    ]
    if not math.isnan(error):
        tiles.insert(1, ("largest true error", percent(error), "audited in float64"))
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><span>{note}</span></div>" for name, value, note in tiles)
    data = {"done": str(done).lower(), "bound": f"{bound:.6g}", "tolerance": f"{rtol:.6g}", "outputs": proven.head_steps}
    attributes = " ".join(f'data-{name}="{value}"' for name, value in data.items())
    return (
        f'<div class="certificate" {attributes}>{_title(state)}{notes}<dl class="tiles">{shown}</dl>{_bounds(proven, rtol)}'
        f"{_heads(proven, rtol)}{_rungs(proven)}{_memory(run, proven)}</div>"
    )


def no_certificate() -> str:
    """The certificate's place before there is one."""
    hint = "Bounds of every layer and head appear here while the caches write, step by step, against your tolerance."
    return f'<div class="certificate">{_title("")}<p class="faint">{hint}</p></div>'


def _title(state: str) -> str:
    return f'<h3>The certificate<span class="faint">{state}</span></h3>'


def _largest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else math.nan


def _figure(name: str, said: str, ticks: str, drawing: str, legend: str, height: int, steps: int) -> str:
    """A plot of 100 by 100 units, stretched to its place, with labels at its left and below."""
    return (
        f'<figure class="{name}"><figcaption>{said}</figcaption><div class="plot" style="height:{height}px">'
        f'<div class="ticks">{ticks}</div><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(said)}">{drawing}</svg></div><div class="steps"><span>step 1</span><span>{steps}</span></div>'
        f'<p class="legend">{legend}</p></figure>'
    )


def _key(kind: str, said: str) -> str:
    return f'<span><i class="{kind}"></i>{said}</span>'


def _bounds(proven: Certificate, rtol: float) -> str:
    """All heads' bounds at each step, on a logarithmic scale, under the line of the tolerance."""
    top = max(3 * rtol, *(1.3 * value for value in map(_largest, (proven.bound, proven.candidate)) if value > 0), 1e-6)
    top, steps = min(top, 30.0), proven.bound.shape[1]
    drawn = [grid[grid > 0] for grid in (proven.bound, proven.error)]
    least = min([rtol / 10 or top / 10, *(float(values.min()) for values in drawn if values.size)])
    decades = min(DECADES, 1.03 * math.log10(top / least))

    def height(value: float | np.ndarray) -> np.ndarray:
        place = 100 * (math.log10(top) - np.log10(np.maximum(value, 1e-300))) / decades
        return np.clip(place, 1.5, 98.5)

    def dots(kind: str, values: np.ndarray) -> str:
        rows, columns = np.nonzero(np.isfinite(values))
        places = zip((columns + 0.5) * 100 / steps, height(values[rows, columns]), strict=True)
        # Heads that lie on one another are drawn once.
        path = "".join(sorted({f"M{x:.1f} {y:.1f}h0" for x, y in places}))
        return f'<path class="dots {kind}" d="{path}"/>'

    over = np.where(proven.candidate > rtol, proven.candidate, np.nan)
    drawing, ticks = "", ""
    for power in range(math.floor(math.log10(top)), math.floor(math.log10(top) - decades), -1):
        y = float(height(10.0**power))
        if 4 < y < 96:
            drawing += f'<path class="grid" d="M0 {y:.1f}h100"/>'
            ticks += f'<span style="top:{y:.1f}%">{100 * 10.0**power:.6g} %</span>'
    line = float(height(rtol)) if rtol > 0 else 100.0
    drawing += f'<rect class="forbidden" width="100" height="{line:.1f}"/>' + dots("candidate", over)
    drawing += dots("bound", proven.bound) + dots("error", proven.error)
    drawing += f'<path class="tolerance" d="M0 {line:.1f}h100"/>'
    legend = _key("tolerance", f"tolerance {percent(rtol)}") + _key("bound", "bound returned")
    if np.isfinite(over).any():
        legend += _key("candidate", "bound before blocks were raised: too large, so not returned")
    if np.isfinite(proven.error).any():
        legend += _key("error", "true error")
    if any([float(values.min()) < top / 10**decades for values in drawn if values.size]):
        legend += "<span>dots at the lower edge: smaller still</span>"
    said = "Bound of each layer and head, step by step (share of the output's norm)"
    return _figure("bounds", said, ticks, drawing, legend, 210, steps)


def _heads(proven: Certificate, rtol: float) -> str:
    """A row for each head, a column for each step: how much of the tolerance the bound uses."""
    rows, steps = proven.bound.shape
    across, down = 100 / steps, 100 / rows
    used = np.clip(np.ceil(SHADES * np.nan_to_num(proven.bound) / (rtol or 1.0)), 1, SHADES).astype(int)
    dense = np.isin(proven.rung, SHARES[2][2])
    kinds = {f"shade{shade}": ~dense & (proven.rung >= 0) & (used == shade) for shade in range(1, SHADES + 1)}
    drawing = ""
    for kind, cells in [*kinds.items(), ("dense", dense)]:
        box = f"h{across:.2f}v{down:.2f}h-{across:.2f}z"
        path = "".join(f"M{column * across:.2f} {row * down:.2f}{box}" for row, column in np.argwhere(cells))
        drawing += f'<path class="cell {kind}" d="{path}"/>' if path else ""
    ticks, first = "", {int(layer): int(row) for row, layer in reversed(list(enumerate(proven.layers)))}
    shown = max(1, math.ceil(len(first) / 12))  # at most a dozen labels
    for number, layer in enumerate(sorted(first)):
        y = first[layer] * down
        heads = int((proven.layers == layer).sum())
        drawing += f'<path class="border" d="M0 {y:.2f}h100"/>' if number else ""
        if number % shown == 0:
            ticks += f'<span style="top:{y + heads * down / 2:.1f}%">layer {layer}</span>'
    scale = "".join(f'<i class="cell shade{shade}"></i>' for shade in range(1, SHADES + 1))
    legend = f"<span>0 {scale} all of the tolerance used</span>"
    legend += _key("cell dense", "recomputed densely") if dense.any() else ""
    said = f"The same, head by head: {rows} rows in {len(first)} layers, one column a step"
    return _figure("heads", said, ticks, drawing, legend, min(HIGHEST_MAP, max(LOWEST_MAP, ROW_PIXELS * rows)), steps)


def _rungs(proven: Certificate) -> str:
    parts = [(kind, said, proven.share(*rungs)) for kind, said, rungs in SHARES]
    bar = "".join(f'<i class="{kind}" style="width:{100 * share:.3f}%"></i>' for kind, _, share in parts)
    legend = "".join(_key(kind, f"{said} {percent(share)}") for kind, said, share in parts)
    return (
        f'<figure class="rungs"><figcaption>How the outputs were served</figcaption><div class="bar">{bar}</div>'
        f'<p class="legend">{legend}</p></figure>'
    )


def _memory(run: Comparison, proven: Certificate) -> str:
    naive = run.lanes[1].cache.memory().device
    sizes = (("dense", proven.memory.dense), ("naive", naive), ("certified", proven.memory.device))
    largest = max(size for _, size in sizes)
    rows = "".join(
        f'<tr><th>{name}</th><td><i class="{name}" style="width:{100 * size / largest:.2f}%"></i></td>'
        f"<td>{human_bytes(size)}</td></tr>"
        for name, size in sizes
    )
    held = human_bytes(proven.memory.host)
    return (
        f'<figure class="memory"><figcaption>Device memory of the caches</figcaption><table>{rows}</table><p class="legend">'
        f"The certified cache keeps the originals in host memory ({held}); the first and last tokens stay exact on the device, "
        "so the share falls as texts grow.</p></figure>"
    )
