#!/usr/bin/env bash
# Everything that needs TensorRT-LLM and a GPU on the PyTorch backend, in one command:
#   bash benchmarks/trtllm_suite.sh MODEL DATASET [OUTPUT_DIR] [trtllm-bench options, e.g. --kv_cache_free_gpu_mem_fraction 0.2]
# DATASET: JSON lines with task_id, prompt, output_tokens, as benchmarks/inflight_batching.py takes them. Four arms with the
# same options: TensorRT-LLM alone, shadow (must give the same tokens), aligned, lexical. Random text says nothing: use
# real prompts. A step that fails does not keep the others from running; the last lines say which failed.
set -u
cd "$(dirname "$0")/.."
model=${1:?MODEL, a checkpoint folder or hub name} dataset=${2:?DATASET, JSON lines} out=${3:-benchmarks/results/trtllm}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python}
mkdir -p "$out"
failed=()
options=(-m "$model" throughput --dataset "$dataset" --backend pytorch --scheduler_policy max_utilization --streaming "$@")

step() { # name, command...
  local name=$1
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || { failed+=("$name"); tail -n 5 "$out/$name.log"; }
}
for preset in shadow aligned lexical; do
  case $preset in shadow) text='{"preset": "aligned", "shadow": true}' ;; *) text="{\"preset\": \"$preset\"}" ;; esac
  echo "$text" >"$out/$preset.settings.json"
done
printf 'attn_backend: TRTLLM\nkv_cache_config: {enable_block_reuse: false, host_cache_size: 0}\nenable_iter_perf_stats: true\n' >"$out/alone.yaml"

step doctor "$python" -m trtllm_memshare doctor
step alone trtllm-bench "${options[@]:0:3}" --extra_llm_api_options "$out/alone.yaml" "${options[@]:3}" \
  --report_json "$out/alone.json" --output_json "$out/alone.tokens.json"
for preset in shadow aligned lexical; do
  step "$preset" "$python" -m trtllm_memshare bench --memshare-config "$out/$preset.settings.json" "${options[@]}" \
    --report_json "$out/$preset.json" --output_json "$out/$preset.tokens.json"
done
step summary "$python" benchmarks/trtllm_summary.py "$out"
cat "$out/summary.log"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (see $out)"; exit 1; }
