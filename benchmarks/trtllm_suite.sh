#!/usr/bin/env bash
# Everything that needs TensorRT-LLM and a GPU on the PyTorch backend, in one command:
#   bash benchmarks/trtllm_suite.sh MODEL DATASET [OUTPUT_DIR] [trtllm-bench options, e.g. --kv_cache_free_gpu_mem_fraction 0.2]
# DATASET: JSON lines with task_id, prompt, output_tokens, as benchmarks/inflight_batching.py takes them. Five arms with the
# same options: TensorRT-LLM alone, twice, shadow, aligned, lexical. Answers end where the model ends them (EOS_ID, by
# default the checkpoint's). Random text says nothing: use real prompts. A step that fails does not keep the others from
# running; the last lines say which failed.
set -u
cd "$(dirname "$0")/.."
model=${1:?MODEL, a checkpoint folder or hub name} dataset=${2:?DATASET, JSON lines} out=${3:-benchmarks/results/trtllm}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python}
mkdir -p "$out"
failed=()
eos=${EOS_ID:-$("$python" -c '
import sys
from transformers import GenerationConfig
ids = GenerationConfig.from_pretrained(sys.argv[1]).eos_token_id
print(ids[0] if isinstance(ids, list) else ids)' "$model")} || { echo "no end token found for $model (set EOS_ID)"; exit 1; }
options=(-m "$model" throughput --eos_id "$eos" --dataset "$dataset" --backend pytorch --scheduler_policy max_utilization --streaming "$@")

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
for arm in alone alone_again; do
  step "$arm" trtllm-bench "${options[@]:0:3}" --extra_llm_api_options "$out/alone.yaml" "${options[@]:3}" \
    --report_json "$out/$arm.json" --output_json "$out/$arm.tokens.json"
done
for preset in shadow aligned lexical; do
  step "$preset" "$python" -m trtllm_memshare bench --memshare-config "$out/$preset.settings.json" "${options[@]}" \
    --report_json "$out/$preset.json" --output_json "$out/$preset.tokens.json"
done
step summary "$python" benchmarks/trtllm_summary.py "$out"
cat "$out/summary.log"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (see $out)"; exit 1; }
