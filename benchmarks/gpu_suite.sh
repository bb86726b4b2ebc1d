#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most nine minutes; nothing is downloaded.
#
#   TENSORRT_ROOT=/path/to/tensorrt bash benchmarks/gpu_suite.sh [output folder]        default: build/gpu_suite
#
# PYTHON names an interpreter with what pyproject.toml lists under torch, cuda and dev (default: python or python3,
# whichever has torch); what is missing is named with the pip command before anything runs. TENSORRT_ROOT names a folder
# with TensorRT's include/, absolute or relative to where you call from, so the headers may lie inside the repository
# (TENSORRT_ROOT=.tensorrt); without it, or without nvcc and cmake, the plugin is not built and the summary says so.
# GPU_SUITE_SECONDS is the time for the whole (default: 540): a step gets no more than what is left, and one that gets
# none is listed with that reason. TRTLLM_MEMSHARE_COMMIT names the commit where the copy has no .git.
#
# The output folder holds three files, rewritten after every step: gpu_suite.json (steps, versions, and the reports of
# the benchmarks inside), gpu_suite.txt (a short table) and logs.tar.gz. Builds go to build/. A step that fails does not
# stop the rest, but the suite then ends with status 1; status 2: something is missing and nothing ran.
set -euo pipefail
python=${PYTHON:-}
for candidate in python python3; do
  has_torch='import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
  if [ -z "$python" ] && "$candidate" -c "$has_torch" 2>/dev/null; then python=$candidate; fi
done
: "${python:=python3}"
out=$(realpath -m "${1:-$(dirname "$0")/../build/gpu_suite}")
if [ -n "${TENSORRT_ROOT:-}" ]; then
  TENSORRT_ROOT=$(realpath -m "$TENSORRT_ROOT")
  export TENSORRT_ROOT
fi
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" benchmarks/gpu_suite.py "$out"
