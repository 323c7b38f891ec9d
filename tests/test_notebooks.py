"""The notebooks, run as Colab would run them, with one line changed: the model is an embedded one."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from reading import figure

from hf_certkv.embedded import embedded_path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = ("quickstart", "long_context")
MOST_SECONDS = 240
# The start of earlier answers is all that is shown of them, as templates do that leave out what a model thought.


@cache
def notebook(name: str) -> Any:
    import nbformat

    return nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_clean(name: str) -> None:
    import nbformat

    book = notebook(name)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in book.cells)  # given by hand: they do not change with a save
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
    link = f"https://colab.research.google.com/github/OWNER/hf_certkv/blob/main/examples/notebooks/{name}.ipynb"
    assert f"]({link})" in book.cells[0].source
    assert link in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both notebooks with the embedded model in one line's place, run in one kernel that forgets the first before the second.

    What each cell showed by its notebook and id (`quickstart-load`), and the pictures of each notebook by its name.
    """
    import nbformat
    from nbclient import NotebookClient

    line, cells = 'MODEL = "Qwen/Qwen2.5-0.5B-Instruct"', []
    for name in NOTEBOOKS:
        book = notebook(name)
        assert sum(cell.source.splitlines().count(line) for cell in book.cells) == 1
        for cell in book.cells:
            cells.append(nbformat.from_dict({**cell, "id": f"{name}-{cell.id}"}))
            cells[-1].source = cell.source.replace(line, f"MODEL = {str(embedded_path('prose'))!r}")
        cells.append(nbformat.v4.new_code_cell("%reset -f"))
    together = nbformat.v4.new_notebook(cells=cells, metadata=book.metadata)
    folder = str(tmp_path_factory.mktemp("notebooks"))
    client = NotebookClient(together, timeout=MOST_SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}})
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1")):
            patch.setenv(variable, value)
        client.execute()
    found: dict[str, Any] = dict.fromkeys(NOTEBOOKS, 0)
    for cell in together.cells:
        outputs = cell.get("outputs", [])
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        if pictures:
            found[cell.id.split("-")[0]] += pictures
        found[cell.id] = "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in outputs)
    return found


def test_the_quickstart_notebook(shown: dict[str, Any]) -> None:
    assert shown["quickstart"] == 1
    assert all(f"--- {name} ---" in shown["quickstart-three"] for name in ("dense", "naive", "certified"))
    naive, certified = shown["quickstart-compare"].strip().splitlines()
    error, bound = (figure(rf"{word} ([\d.]+)%", certified) for word in ("error", "bound"))
    assert 0 < error < bound <= 2
    assert figure(r"error ([\d.]+)%", naive) > bound  # the same formats, and nobody who looks
    assert figure(r"first (\d+) of 48", certified) >= figure(r"first (\d+) of 48", naive)
    assert "certificate: rtol=0.02" in shown["quickstart-report"] and "originals" in shown["quickstart-memory"]
    assert "2,048 tokens" in shown["quickstart-memory"]


def test_the_notebook_of_long_contexts(shown: dict[str, Any]) -> None:
    assert shown["long_context"] == 3
    assert 0.2 < figure(r"measured: ([\d.]+) of a dense cache", shown["long_context-memory"]) < 0.5
    naive, certified = (figure(rf"{name}: (\d+) of 6", shown["long_context-needles"]) for name in ("naive", "certified"))
    assert 6 >= certified >= naive
    *rows, last = [line for line in shown["long_context-sweep"].splitlines() if line.startswith("rtol")]
    tolerances = [figure(r"rtol ([\d.]+)", row) for row in rows]
    assert tolerances == [0.2, 0.1, 0.05, 0.02, 0.01]
    for row, rtol in zip(rows, tolerances, strict=True):
        assert 0 < figure(r"bound ([\d.]+)%", row) <= 100 * rtol
    fetched = [figure(r"; ([\d,]+) KiB", row) for row in [*rows, last]]
    assert fetched == sorted(fetched) and fetched[-1] > fetched[0]
    assert "100.0% dense; largest bound none (all dense)" in last and "first 24 of 24 tokens as dense" in last
