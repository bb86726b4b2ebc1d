#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most 9 minutes; nothing is downloaded.
#
#   bash benchmarks/gpu_suite.sh [output folder]        default: build/gpu_suite
#
# PYTHON names an interpreter with torch, transformers, pydantic, pytest and cuda.core (default: python). TENSORRT_ROOT
# names a folder with TensorRT's include/; without it, or without nvcc and cmake, the plugin is not built and the
# summary says so. Each step has a time limit and its own log; one that fails does not stop the rest, but the suite
# then ends with status 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$(realpath -m "${1:-build/gpu_suite}")
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
: >"$out/steps.tsv"

record() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$out/steps.tsv"; echo "== $1: $2 ($3)"; }

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n 25 "$out/$name.log" | cut -c1-200
  if [ $status -eq 0 ]; then record "$name" ok "$((SECONDS - started)) s"
  elif [ $status -eq 124 ]; then record "$name" "timed out" "limit $limit s"
  else record "$name" failed "status $status"; fi
}

if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "error: no CUDA device that $python's torch can use (set PYTHON to an interpreter with a CUDA build)" >&2
  exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"

step kernels_compile 60 "$python" build_scripts/build_plugins.py --check --arch sm_90
gpu_tests=$(grep -rl 'pytest.mark.gpu' tests --include='*.py')
# shellcheck disable=SC2086
step gpu_tests 90 "$python" -m pytest -q -m gpu -p no:cacheprovider $gpu_tests

if [ -n "${TENSORRT_ROOT:-}" ] && command -v nvcc >/dev/null && command -v cmake >/dev/null; then
  step plugin_build 120 "$python" build_scripts/build_plugins.py --preset native --output-dir "$out/plugins"
  harness=("$out/plugins/plugin_harness" "$out/plugins/libtrtllm_memshare_plugin.so" --gpu require)
  step plugin_harness 30 "${harness[@]}"
  sanitized=("${harness[@]}")
else
  record plugin_build "not run" "needs TENSORRT_ROOT, nvcc and cmake"
  sanitized=("$python" -m pytest -q -m gpu -p no:cacheprovider tests/search/test_cuda_block_distance.py -k captured)
fi
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool $tool --error-exitcode 9 "${sanitized[@]}"
  done
else
  record memcheck "not run" "compute-sanitizer is not on PATH"
fi

step block_search 120 "$python" benchmarks/block_search.py --output-json "$out/block_search.json"
step engine 30 "$python" build_scripts/build_engine.py --memshare --force --output-dir "$out/engine"
step inflight_batching 90 "$python" benchmarks/inflight_batching.py --engine-dir "$out/engine" --device cuda \
  --dataset benchmarks/data/small.jsonl --kv-cache-share 0.5 --variants full aligned shadow drop-duplicate \
  --output-json "$out/inflight_batching_gpu.json"
step trace_replay 120 "$python" benchmarks/trace_replay.py --output-tokens 256 --output-json "$out/trace_replay.json"

"$python" - "$out" <<'EOF'
import datetime
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
steps = [dict(zip(("step", "result", "note"), line.split("\t"))) for line in (out / "steps.tsv").read_text().splitlines()]
document = {
    "command": "bash benchmarks/gpu_suite.sh",
    "date": datetime.date.today().isoformat(),
    "device": (out / "device.txt").read_text().strip(),
    "steps": steps,
}
(out / "gpu_suite.json").write_text(json.dumps(document, indent=1) + "\n")
print(document["device"])
for row in steps:
    print(f"{row['step']:<20} {row['result']:<10} {row['note']}")
sys.exit(any(row["result"] in ("failed", "timed out") for row in steps))
EOF
