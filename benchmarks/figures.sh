#!/usr/bin/env bash
# Repeats every committed figure: bash benchmarks/figures.sh [python]. About half an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
engine=engines/tiny_reasoner
results=benchmarks/results
all=(full paper aligned lexical shadow drop-duplicate random streaming)

"$python" build_scripts/build_engine.py --memshare --force
# Accuracy and memory, every arm, a pool that never binds.
for name in evaluation hard; do
  "$python" benchmarks/inflight_batching.py --engine-dir "$engine" --dataset "benchmarks/data/$name.jsonl" \
    --variants "${all[@]}" --output-json "$results/$name.json" --plot "$results/$name.png" \
    --output-texts "$results/$name.texts.jsonl"
done
# Throughput where memory binds: a quarter of the full cache's peak demand; then with every alias read, as
# TensorRT-LLM's attention kernels do.
for aliases in fold repeat; do
  "$python" benchmarks/inflight_batching.py --engine-dir "$engine" --dataset benchmarks/data/evaluation.jsonl \
    --num-requests 200 --kv-cache-share 0.25 --repeat 3 --read-aliases "$aliases" \
    --variants full full-guaranteed aligned lexical drop-duplicate \
    --output-json "$results/pressure_$aliases.json" --plot "$results/pressure_$aliases.png"
done
# Where memory does not bind: eight requests at a time.
"$python" benchmarks/inflight_batching.py --engine-dir "$engine" --dataset benchmarks/data/small.jsonl \
  --concurrency 8 --repeat 5 --read-aliases repeat --variants full shadow aligned \
  --output-json "$results/unbound.json"
"$python" benchmarks/vs_transformers.py --engine-dir "$engine" --output-json "$results/vs_transformers.json"
"$python" benchmarks/search_cost.py --output-json "$results/search_cost.json"
"$python" benchmarks/redundancy.py benchmarks/data/traces/r1_aime24.jsonl benchmarks/data/traces/r1_math500.jsonl \
  "$results/evaluation.texts.jsonl" "$results/hard.texts.jsonl" --output-json "$results/redundancy.json"
