#!/usr/bin/env bash
# Repeats every committed figure: bash benchmarks/figures.sh [python]. About half an hour on two cores; let nothing
# else run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
engine=engines/tiny_reasoner
results=benchmarks/results
bench=("$python" benchmarks/inflight_batching.py --engine-dir "$engine")

"$python" build_scripts/build_engine.py --memshare --force
# Accuracy and memory, every arm, a pool that never binds.
"${bench[@]}" --dataset benchmarks/data/evaluation.jsonl \
  --variants full paper aligned lexical drop-duplicate random streaming \
  --output-json "$results/evaluation.json" --plot "$results/evaluation.png" \
  --output-texts "$results/evaluation.texts.jsonl"
"${bench[@]}" --dataset benchmarks/data/hard.jsonl \
  --variants full paper aligned lexical shadow drop-duplicate random streaming \
  --output-json "$results/hard.json" --plot "$results/hard.png" --output-texts "$results/hard.texts.jsonl"
# The other end of the curve: a block may stand in for one other block only.
"${bench[@]}" --dataset benchmarks/data/evaluation.jsonl --variants aligned --set max_aliases=2 \
  --output-json "$results/evaluation_two_aliases.json"
# Throughput where memory binds: a quarter of the full cache's peak demand.
"${bench[@]}" --dataset benchmarks/data/evaluation.jsonl --num-requests 100 --kv-cache-share 0.25 --repeat 3 \
  --variants full full-guaranteed aligned \
  --output-json "$results/pressure_fold.json" --plot "$results/pressure_fold.png"
# Where memory does not bind: eight requests at a time, every alias read as TensorRT-LLM's attention kernels do.
"${bench[@]}" --dataset benchmarks/data/small.jsonl --num-requests 24 --concurrency 8 --repeat 3 \
  --read-aliases repeat --variants full aligned --output-json "$results/unbound.json"
"$python" benchmarks/vs_transformers.py --engine-dir "$engine" --repeat 3 --output-json "$results/vs_transformers.json"
"$python" benchmarks/search_cost.py --output-json "$results/search_cost.json"
"$python" benchmarks/redundancy.py benchmarks/data/traces/r1_aime24.jsonl benchmarks/data/traces/r1_math500.jsonl \
  "$results/evaluation.texts.jsonl" "$results/hard.texts.jsonl" --output-json "$results/redundancy.json"
"$python" benchmarks/rejected_pairs.py --output-json "$results/rejected_pairs.json"
