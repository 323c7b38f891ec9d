#!/usr/bin/env bash
# Everything there is to check on a GPU machine, in one call; installs nothing from the network. Results go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python3 -c 'import sys, torch, transformers; print(sys.version, torch.__version__, transformers.__version__)' | tee "$OUT/versions.txt"
python3 -c 'import xxhash' 2>/dev/null || echo "xxhash is missing: bring its wheel along (pip install --no-index ./xxhash-*.whl)" | tee -a "$OUT/versions.txt"
python3 -c "import flint" 2>/dev/null && python3 -c 'from hf_certkv.cli import app; app()' verify --device "$DEVICE" --minutes 2 --json "$OUT/verify.json" 2>&1 | tee "$OUT/verify.txt"
python3 -m benchmarks.device --device "$DEVICE" --out "$OUT" 2>&1 | tee "$OUT/device.txt"
