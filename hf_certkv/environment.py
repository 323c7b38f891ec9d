"""Where and with what something was measured."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__

PACKAGE = Path(__file__).parent


def describe() -> dict[str, Any]:
    """Processor, devices, threads, versions, date; and the commit, where the package lies in a git checkout."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".") if commit else None
    out = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_certkv": __version__,
        "commit": commit and commit + (" + uncommitted changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def _git(*arguments: str) -> str | None:
    """What git says of the package's folder; None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=PACKAGE)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
