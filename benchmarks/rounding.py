"""This machine's arithmetic against what docs/certificate.md, section 5, assumes, over every float32 number.

python -m benchmarks.rounding        # about half an hour on one thread
"""

from __future__ import annotations

import math
from dataclasses import asdict

import torch

from benchmarks.common import save
from hf_certkv.verify.parts import Clock
from hf_certkv.verify.rounding import run


def measure() -> bool:
    """Run without a limit, save the result, and tell whether all of it held."""
    torch.set_num_threads(1)
    part = run(Clock(math.inf, lambda share, text: print(f"\r{text}", end="", flush=True)), torch.device("cpu"), seed=0)
    print(f"\n{save('rounding', {**asdict(part), 'seconds': round(part.seconds, 1)})}: {part.failed} failures")
    return part.passed


if __name__ == "__main__":
    raise SystemExit(not measure())
