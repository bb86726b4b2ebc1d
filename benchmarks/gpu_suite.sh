#!/usr/bin/env bash
# Everything that needs a GPU, in four calls of at most nine minutes each; nothing is downloaded.
#
#   bash benchmarks/gpu_suite.sh --part 1          the search, the plugin, GPU tests, memcheck, replays at 7B size
#   bash benchmarks/gpu_suite.sh --part 2          where a step goes, searches and null pages in a replay, sanitizers
#   bash benchmarks/gpu_suite.sh --part 3          a real model under pressure
#   bash benchmarks/gpu_suite.sh --part 4          a real model: an adapter's answers, recall, page rankings
#   bash benchmarks/gpu_suite.sh --part 1 --dry-run        what would run, and what is missing here
#
# On a machine without a package index: build_scripts/pack_gpu_kit.sh on one that has it, copy gpu_kit/ here, then
# build_scripts/pack_gpu_kit.sh --unpack. PYTHON names the interpreter (default: python or python3, whichever has
# torch). TENSORRT_ROOT names a folder with TensorRT's include/ (default: gpu_kit/tensorrt), for the plugin.
# TRTLLM_MEMSHARE_COMMIT names the commit where the copy has no .git.
#
# --output-dir (default: build/gpu_suite) gets three files, rewritten after every step: gpu_DEVICE_partN.json (steps,
# versions, the reports of the benchmarks inside), a table and the logs. A step that fails does not stop the rest.
# Status 0: every step ran and ended well; 1: one did not; 2: nothing can run here.
set -euo pipefail
if [ -n "${TENSORRT_ROOT:-}" ]; then
  TENSORRT_ROOT=$(realpath -m "$TENSORRT_ROOT")
  export TENSORRT_ROOT
fi
root=$(realpath "$(dirname "$0")/..")
python=$(bash "$root/build_scripts/gpu_kit/find_python.sh")
export PYTHONPATH="$root:$root/gpu_kit/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/gpu_suite.py" "$@"
