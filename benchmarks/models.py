"""docs/models.md, and README's figures of it: `python -m benchmarks.models`, or `--take` what `certkv matrix` wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.common import save
from benchmarks.tables import README, ROOT, fill, load

DOCUMENT = ROOT / "docs" / "models.md"


def words() -> str:
    """README's sentence."""
    result = load("matrix")
    if result is None:
        return ""
    sums = result["summary"]
    return (
        f"transformers {result['transformers']} has {sums['with_full_attention']} causal language models that have "
        f"full-attention layers and take a cache. {sums['certified']} of them are certified in every mode of `generate` that "
        f"transformers offers for them, {sums['partly_certified']} in some or in part, the others are exact; "
        f"{len(sums['failures'])} modes were wrong or crashed (tiny random models; `rtol=0` compared bit for bit, the default "
        "tolerance audited)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--take", type=Path, help="a file that `certkv matrix --json` wrote, in place of a run")
    arguments = parser.parse_args()
    from hf_certkv.matrix.modes import MODES
    from hf_certkv.matrix.run import run
    from hf_certkv.matrix.table import page
    from hf_certkv.matrix.tiny import architectures

    if arguments.take is not None:
        result = json.loads(arguments.take.read_text(encoding="utf-8"))
    else:
        result = run(architectures(), list(MODES), arguments.workers, tell=lambda found: print(found.model_type, flush=True))
    save("matrix", result)
    DOCUMENT.write_text(page(result), encoding="utf-8")
    fill(README, "models", words())


if __name__ == "__main__":
    main()
