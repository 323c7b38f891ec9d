"""What a cache tells its user: the certificate report and the memory report, as a table, a dictionary or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .certificate import LayerSummary, Recorder
from .config import CertKVConfig
from .ladder import Rung

RUNG_NAMES = {
    Rung.FAST: "fast path",
    Rung.KEYS: "keys raised",
    Rung.VALUES: "values raised",
    Rung.DENSE_HEAD: "dense head",
    Rung.DENSE_LAYER: "dense layer",
    Rung.UNCERTIFIED: "UNCERTIFIED",
}


def human_bytes(count: float) -> str:
    """Bytes with a binary unit, three digits or so."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _plain_text(renderable: RenderableType) -> str:
    # In a notebook rich would show the table in the cell, and leave the text empty.
    console = Console(file=StringIO(), width=110, force_terminal=False, force_jupyter=False)
    console.print(renderable)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes as allocated. `parts` by name, those that begin with `host_` in host memory.

    `dense`: a dense cache's bytes. `working`: what a certified step of one token works in besides, on the device: once for all
    layers, and no part of the cache.
    """

    parts: dict[str, int]
    dense: int
    working: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device, everything counted, transformers' own layers included."""
        return sum(size for name, size in self.parts.items() if not name.startswith("host_"))

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return sum(size for name, size in self.parts.items() if name.startswith("host_"))

    @property
    def ratio(self) -> float:
        """Device bytes over a dense cache's; 0 for an empty cache."""
        return self.device / self.dense if self.dense else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "device_bytes": self.device,
            "host_bytes": self.host,
            "dense_bytes": self.dense,
            "device_over_dense": self.ratio,
            "working_bytes": self.working,
            "parts": dict(self.parts),
        }

    def __rich__(self) -> RenderableType:
        table = Table(title="memory", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("part")
        table.add_column("device", justify="right")
        table.add_column("host", justify="right")
        for name, size in self.parts.items():
            if size:
                host = name.startswith("host_")
                table.add_row(name.removeprefix("host_"), "" if host else human_bytes(size), human_bytes(size) if host else "")
        table.add_section()
        table.add_row("total", human_bytes(self.device), human_bytes(self.host))
        table.add_row("dense cache", human_bytes(self.dense), "")
        table.add_row("ratio", f"{self.ratio:.3f}", "")
        if self.working:
            table.add_row("a step works in", human_bytes(self.working), "")
        return table

    def __str__(self) -> str:
        return _plain_text(self)


class CertificateReport:
    """Bounds returned, rungs used, blocks promoted, bytes moved: a snapshot of a cache's records.

    Relative figures are shares of the returned head output's L2 norm; quantiles are upper edges of histogram bins.
    """

    def __init__(self, settings: CertKVConfig, recorder: Recorder, memory: MemoryReport, exact_layers: dict[int, str]) -> None:
        self.settings, self.memory, self.exact_layers = settings, memory, exact_layers
        overall = recorder.overall()
        self.rung_share = rung_shares(overall)
        self._data: dict[str, Any] = {
            "certified": settings.certified,
            "settings": settings.to_dict(),
            "steps": recorder.step + 1,
            "overall": {**overall.to_dict(heads=False), "rung_share": self.rung_share},
            "layers": {str(i): summary.to_dict() for i, summary in sorted(recorder.layers.items())},
            "exact_head_steps": recorder.exact_queries,
            "repaired_blocks": recorder.repaired,
            "materialised_operations": dict(recorder.materialised),
            "exact_layers": {str(i): name for i, name in exact_layers.items()},
            "memory": memory.to_dict(),
        }
        if recorder.full:
            self._data["records"] = [record.to_dict() for record in recorder.records]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON types."""
        return self._data

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file."""
        Path(path).write_text(json.dumps(self._data, indent=1) + "\n", encoding="utf-8")

    def __rich__(self) -> RenderableType:
        settings, overall = self.settings, self._data["overall"]
        parts: list[RenderableType] = []
        if not settings.certified:
            parts.append(Text("UNCERTIFIED baseline: bounds are logged, not enforced", style="bold red"))
        table = Table(
            title=f"certificate: rtol={settings.rtol} atol={settings.atol} scope={settings.scope}, "
            f"K8 V{settings.value_bits}, blocks of {settings.block_size}, refine={settings.refine}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        # Narrow enough for a terminal of 80 columns. B: bounds of certified outputs, over the output's norm.
        for name in ("layer", "head-steps", "fast", "raised", "dense", "B p50", "B p99", "B max", "E_rms", "moved"):
            table.add_column(name, justify="right" if name != "layer" else "left", no_wrap=True)
        if any(layer["relative"]["tightness"] for layer in self._data["layers"].values()):
            table.add_column("B/error", justify="right", no_wrap=True)
        for name, layer in self._data["layers"].items():
            table.add_row(*self._row(name, layer))
        table.add_section()
        table.add_row(*self._row("all", overall), style="bold")
        parts.append(table)
        notes = ["B: bound of certified outputs, E_rms: error to expect (medians unless said; shares of the output's norm)"]
        if overall["kernels"]:
            names = {"none": "none (dense at once)"}
            calls = ", ".join(f"{names.get(name, name)} {count:,}" for name, count in sorted(overall["kernels"].items()))
            notes.append(f"calls by kernel: {calls}")
        if self._data["exact_head_steps"]:
            notes.append(
                f"{self._data['exact_head_steps']:,} head-steps exact from the originals: many queries, or not what the "
                "certificate covers"
            )
        if self._data["materialised_operations"]:
            notes.append(f"served with exact originals: {self._data['materialised_operations']}")
        if self._data["repaired_blocks"]:
            notes.append(f"{self._data['repaired_blocks']} damaged block(s) found by their checksum and repaired")
        if self.exact_layers:
            notes.append(f"{len(self.exact_layers)} layer(s) keep transformers' own exact storage")
        if notes:
            parts.append(Text("\n".join(notes)))
        parts.append(self.memory)
        return Group(*parts)

    def _row(self, name: str, layer: dict[str, Any]) -> list[str]:
        count = max(1, layer["head_steps"])
        rungs = layer["rungs"]
        raised, dense = rungs["keys"] + rungs["values"], rungs["dense_head"] + rungs["dense_layer"]
        fast = rungs["fast"] + rungs["uncertified"]
        bound, expected = layer["relative"]["bound"], layer["relative"]["expected"]  # bound: of certified outputs
        cells = [name, f"{layer['head_steps']:,}", *(f"{part / count:.1%}" for part in (fast, raised, dense))]
        cells += [_figure(bound, key) for key in ("p50", "p99", "max")]
        cells += [_figure(expected, "p50"), human_bytes(layer["bytes_moved"])]
        if layer["relative"]["tightness"]:
            cells.append(_figure(layer["relative"]["tightness"], "p50"))
        return cells

    def __str__(self) -> str:
        return _plain_text(self)


def rung_shares(summary: LayerSummary) -> dict[str, float]:
    """Share of head-steps by rung."""
    count = max(1, int(summary.rungs.sum()))
    return {rung.name.lower(): int(summary.rungs[:, rung].sum()) / count for rung in Rung}


def _figure(summary: dict[str, Any] | None, key: str) -> str:
    return "-" if summary is None else f"{summary[key]:.3g}"
