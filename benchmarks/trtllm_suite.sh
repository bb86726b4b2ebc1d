#!/usr/bin/env bash
# TensorRT-LLM's PyTorch backend with and without MemShare, in the order in which NVIDIA's guide has a method judged:
#   bash benchmarks/trtllm_suite.sh MODEL DATASET [OUTPUT_DIR] [trtllm-bench options, e.g. --kv_cache_free_gpu_mem_fraction 0.2]
#   1 accuracy against off    2 proof that it was active    3 an A/B in which one setting changed    4 regression gates
# DATASET: JSON lines with task_id, prompt, output_tokens, and answer where answers can be checked. MODEL: a checkpoint
# folder or hub name; a model of 1.5 billion parameters and a GPU of 24 GB suffice. It takes an hour at most (TIME_LIMIT
# seconds, STEP_LIMIT of them an arm): an arm that could not end in time is left out, lexical first, and said to be.
# NULL_PAGES: the folder that memshare null-pages made of the same model, for preset pressure that reads null pages;
# without it that arm is left out and said to be (skip, pressure that gives attention nothing, needs none).
# EOS_ID: the end token, by default the checkpoint's. Answers end where the model ends them. Random text says nothing: use
# real prompts, and so little memory that TensorRT-LLM alone pauses requests. A step that fails does not keep the others
# from running; the last lines say which failed, and nothing is reported where nothing was shared or given up.
set -u
cd "$(dirname "$0")/.."
model=${1:?MODEL, a checkpoint folder or hub name} dataset=${2:?DATASET, JSON lines} out=${3:-benchmarks/results/trtllm}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python} limit=${STEP_LIMIT:-600}
end=$(($(date +%s) + ${TIME_LIMIT:-3600} - 120)) longest=0 # seconds; two minutes are for the summary
mkdir -p "$out"
failed=() alone=() ran=() left_out=()
rm -f "$out/summary.json" # nothing of an earlier run is reported as this one's
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
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 && return
  failed+=("$name")
  tail -n 5 "$out/$name.log"
  return 1
}
arm() { # name, command...: a step that is begun only if the longest so far could still end in time
  local began
  began=$(date +%s)
  rm -f "$out/$1.json" "$out/$1.tokens.json"
  local left=$((end - began))
  if ((left < longest || left <= 0)); then
    left_out+=("$1")
    echo "== $1: left out, $left seconds are left and an arm took $longest (raise TIME_LIMIT, or take fewer requests)"
    return
  fi
  limit=$((left < limit ? left : limit))
  if step "$@" --report_json "$out/$1.json" --output_json "$out/$1.tokens.json"; then
    case $1 in alone*) alone+=("$1") ;; *) ran+=("$1") ;; esac
  fi
  local took=$(($(date +%s) - began))
  longest=$((took > longest ? took : longest))
}
arms=(shadow aligned)
echo '{"preset": "aligned", "shadow": true}' >"$out/shadow.settings.json"
echo '{"preset": "aligned"}' >"$out/aligned.settings.json"
echo '{"preset": "lexical"}' >"$out/lexical.settings.json"
if [ -n "${NULL_PAGES:-}" ]; then
  arms+=(pressure)
  printf '{"preset": "pressure", "null_pages": "%s"}\n' "$(cd "$NULL_PAGES" && pwd)" >"$out/pressure.settings.json"
else
  echo "== pressure: left out (set NULL_PAGES to what memshare null-pages makes of $model)"
fi
echo '{"preset": "pressure", "null_entries": "skip"}' >"$out/skip.settings.json"
arms+=(skip lexical)
printf 'attn_backend: TRTLLM\nkv_cache_config: {enable_block_reuse: false}\nenable_iter_perf_stats: true\n' >"$out/alone.yaml"

step doctor "$python" -m trtllm_memshare doctor --surface pytorch
for name in alone alone_again; do
  arm "$name" trtllm-bench "${options[@]:0:3}" --extra_llm_api_options "$out/alone.yaml" "${options[@]:3}"
done
for name in "${arms[@]}"; do
  arm "$name" "$python" -m trtllm_memshare bench --memshare-config "$out/$name.settings.json" "${options[@]}"
done
[ "${alone[0]:-}" = alone ] || { echo "nothing to report, TensorRT-LLM alone did not run to its end (see $out)"; exit 1; }
[ ${#ran[@]} -gt 0 ] || { echo "nothing to report, no arm of ours ran to its end (raise TIME_LIMIT, or see $out)"; exit 1; }
limit=110
step summary "$python" benchmarks/trtllm_summary.py "$out" --arms "${alone[@]:1}" "${ran[@]}" --dataset "$dataset" --model "$model"
cat "$out/summary.log"
[ ${#left_out[@]} -eq 0 ] || echo "left out for want of time: ${left_out[*]}"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (see $out)"; exit 1; }
