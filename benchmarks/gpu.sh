#!/usr/bin/env bash
# Everything there is to check and to measure on a GPU machine, in one call of at most BUDGET seconds. Installs nothing from the
# network. Results go to $OUT, as a handful of files: gpu.json (all figures), log.txt (all output), profile.txt, device.json,
# verify.json, bench.json, eval.json. The exit status is 1 if any part failed or had no time left; the others run all the same.
#
#   OUT=gpu_out benchmarks/gpu.sh                   all parts, in the order of their importance
#   PARTS="tests attention" benchmarks/gpu.sh       some of them; gpu.json keeps what earlier calls found of the others
#   python -m benchmarks.gpu_tables --take FILE     afterwards, for each gpu.json: into benchmarks/results and docs/performance.md
#   DEVICE=cpu benchmarks/gpu.sh                    a dry run with tiny sizes, its figures say nothing
#
# Packages that are missing can be brought as wheels. Where there is a network:
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 -d wheels xxhash python-flint
# Carry that folder along, and there:
#   python3 -m pip install --no-index --no-deps --target /tmp/site wheels/*.whl && PYTHONPATH=/tmp/site benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export OUT=${OUT:-gpu_out} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }
certkv() { "$PYTHON" -c 'from hf_certkv.cli import app; app()' "$@"; }

versions() {
  local status
  "$PYTHON" - <<'PY'
import importlib.util as util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

print("python", platform.python_version(), sys.executable)
for name in ("torch", "triton", "transformers", "accelerate", "numpy", "numba", "xxhash", "pytest", "hypothesis", "python-flint"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is missing")
needed = ("torch", "transformers", "accelerate", "safetensors", "numpy", "typer", "rich", "xxhash", "matplotlib", "triton", "jinja2", "yaml")
missing = [name for name in needed if util.find_spec(name) is None]
if missing:
    print("MISSING, and needed:", ", ".join(missing))
    print("Bring wheels, and PYTHONPATH=/tmp/site: the head of benchmarks/gpu.sh says how.")
    raise SystemExit(1)
import torch

if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
PY
  status=$?
  nproc
  head -3 /proc/meminfo
  if [[ $DEVICE == cuda ]]; then
    nvidia-smi -L || status=1
  fi
  return "$status"
}

tests() {
  local files=(tests/test_triton_*.py) options=(-q -rfE --maxfail=25 --durations=8 -p no:cacheprovider)
  if [[ ! -e ${files[0]} ]]; then
    echo "there are no tests/test_triton_*.py"
    return 1
  fi
  # Kernels are compiled on the host: several processes do that side by side.
  if has xdist; then options+=(-n "${WORKERS:-6}"); fi
  if [[ $DEVICE == cpu ]]; then export TRITON_INTERPRET=1; fi
  CERTKV_TEST_DEVICE=$DEVICE "$PYTHON" -m pytest "${options[@]}" "${files[@]}"
}

verify() {
  if ! has flint; then
    echo "python-flint is missing: certkv verify is left out (the head of benchmarks/gpu.sh says how to bring wheels)"
    return 0
  fi
  certkv verify --device "$DEVICE" --minutes 0.6 --json "$OUT/verify.json"
}

bench() {
  local folder status
  folder=$(mktemp -d)
  certkv bench --device "$DEVICE" --quick --out "$folder" --json "$OUT/bench.json"
  status=$?
  rm -rf "$folder"
  return "$status"
}

# Answers, bounds and memory at 32K tokens; `certkv report` makes a page of it.
quality() {
  local context=8192,32768
  if [[ $DEVICE == cpu ]]; then context=300; fi
  certkv eval needle --model retriever --device "$DEVICE" --context "$context" --depths 10 --needles 10 --items 2 --json "$OUT/eval.json" \
    --overwrite
}

# In a dry run nothing is compiled for the CPU: that takes longer than all the rest.
measure() {
  local options=(--device "$DEVICE" --out "$OUT")
  if [[ $DEVICE == cpu && $1 != exp ]]; then options+=(--kernel reference); fi
  "$PYTHON" -m "benchmarks.gpu_$1" "${options[@]}" "${@:2}"
}
device() { "$PYTHON" -m benchmarks.device --device "$DEVICE" --out "$OUT"; }

# `timeout` starts programs and no functions: this script once more, with a function's name.
if [[ ${1:-} == --function ]]; then
  "${@:2}"
  exit
fi

PARTS=${PARTS:-versions tests exp attention costs decode long device verify bench quality}
BUDGET=${BUDGET:-530}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
LOG=$OUT/log.txt
: >"$LOG"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
FAILED=()

say() { echo "$*" | tee -a "$LOG"; }

# part NAME SECONDS FUNCTION...: run one part within its time, and within what is left of the whole.
part() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS status
  [[ " $PARTS " == *" $name "* ]] || return 0
  say "
== $name"
  if ((left < 10)); then
    say "FAILED $name: no time is left"
    FAILED+=("$name")
    return 0
  fi
  if ((limit > left)); then limit=$left; fi
  timeout --kill-after=5 "$limit" bash "$PWD/benchmarks/gpu.sh" --function "${@:3}" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  if ((status == 0)); then
    say "ok $name, $((SECONDS - start)) s"
    return 0
  fi
  if ((status == 124 || status == 137)); then say "$name was stopped after $limit s"; fi
  say "FAILED $name: status $status, $((SECONDS - start)) s"
  FAILED+=("$name")
}

part versions 40 versions
part tests 130 tests
part exp 45 measure exp
part attention 120 measure attention
part costs 80 measure costs
part decode 120 measure decode
part long 110 measure long
part device 70 device
part verify 60 verify
part bench 60 bench
part quality 60 quality

if ((${#FAILED[@]})); then
  say "
FAILED: ${FAILED[*]}"
  exit 1
fi
say "
all parts passed: $PARTS"
