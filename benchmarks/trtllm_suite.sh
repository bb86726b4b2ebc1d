#!/usr/bin/env bash
# TensorRT-LLM's PyTorch backend with and without MemShare, in the order in which NVIDIA's guide has a method judged:
#   bash benchmarks/trtllm_suite.sh MODEL DATASET [OUTPUT_DIR] [trtllm-bench options, e.g. --kv_cache_free_gpu_mem_fraction 0.2]
#   1 accuracy against off    2 proof that it was active    3 an A/B in which one setting changed    4 regression gates
# DATASET: JSON lines with task_id, prompt, output_tokens, and answer where answers can be checked. MODEL: a checkpoint
# folder or hub name; a model of 1.5 billion parameters and a GPU of 24 GB suffice, and an hour (STEP_LIMIT seconds an arm).
# NULL_PAGES: an engine directory of this project for the same model (build_scripts/build_engine.py), for preset pressure;
# without it that arm is left out and said to be. EOS_ID: the end token, by default the checkpoint's. Answers end where the
# model ends them. Random text says nothing: use real prompts, and so little memory that TensorRT-LLM alone pauses requests.
# A step that fails does not keep the others from running; the last lines say which failed, and nothing is reported where
# nothing was shared or given up.
set -u
cd "$(dirname "$0")/.."
model=${1:?MODEL, a checkpoint folder or hub name} dataset=${2:?DATASET, JSON lines} out=${3:-benchmarks/results/trtllm}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python} limit=${STEP_LIMIT:-600}
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
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || { failed+=("$name"); tail -n 5 "$out/$name.log"; }
}
arms=(shadow aligned lexical)
echo '{"preset": "aligned", "shadow": true}' >"$out/shadow.settings.json"
echo '{"preset": "aligned"}' >"$out/aligned.settings.json"
echo '{"preset": "lexical"}' >"$out/lexical.settings.json"
if [ -n "${NULL_PAGES:-}" ]; then
  arms+=(pressure)
  printf '{"preset": "pressure", "null_pages": "%s"}\n' "$(cd "$NULL_PAGES" && pwd)" >"$out/pressure.settings.json"
else
  echo "== pressure: left out (set NULL_PAGES to an engine directory of $model)"
fi
printf 'attn_backend: TRTLLM\nkv_cache_config: {enable_block_reuse: false}\nenable_iter_perf_stats: true\n' >"$out/alone.yaml"

step doctor "$python" -m trtllm_memshare doctor --surface pytorch
for arm in alone alone_again; do
  step "$arm" trtllm-bench "${options[@]:0:3}" --extra_llm_api_options "$out/alone.yaml" "${options[@]:3}" \
    --report_json "$out/$arm.json" --output_json "$out/$arm.tokens.json"
done
for arm in "${arms[@]}"; do
  step "$arm" "$python" -m trtllm_memshare bench --memshare-config "$out/$arm.settings.json" "${options[@]}" \
    --report_json "$out/$arm.json" --output_json "$out/$arm.tokens.json"
done
step summary "$python" benchmarks/trtllm_summary.py "$out" --arms "${arms[@]}" --dataset "$dataset" --model "$model"
cat "$out/summary.log"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (see $out)"; exit 1; }
