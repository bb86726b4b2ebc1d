#!/usr/bin/env bash
# Repeats every committed figure that needs no GPU: bash benchmarks/figures.sh [python]. About 45 minutes on two cores;
# let nothing else run meanwhile. gpu_suite.sh does the same for a GPU.
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
# Throughput where memory binds: a quarter of the full cache's peak demand.
"${bench[@]}" --dataset benchmarks/data/evaluation.jsonl --num-requests 100 --kv-cache-share 0.25 --repeat 3 \
  --variants full full-guaranteed aligned \
  --output-json "$results/pressure_fold.json" --plot "$results/pressure_fold.png"
# The same over the size of the pool, and on problems whose four re-checks are all restated.
"$python" benchmarks/pressure_curve.py --output-json "$results/pressure_curve.json" \
  --plot "$results/pressure_curve.png"
"$python" benchmarks/pressure_curve.py --dataset benchmarks/data/repetitive.jsonl --shares 0.25 --repeat 3 \
  --output-json "$results/pressure_repetitive.json"
# Where memory does not bind: eight requests at a time, every alias read as TensorRT-LLM's attention kernels do.
"${bench[@]}" --dataset benchmarks/data/small.jsonl --num-requests 24 --concurrency 8 --repeat 3 \
  --read-aliases repeat --variants full aligned --output-json "$results/unbound.json"
"$python" benchmarks/vs_transformers.py --engine-dir "$engine" --repeat 3 --output-json "$results/vs_transformers.json"
"$python" benchmarks/search_cost.py --output-json "$results/search_cost.json"
"$python" benchmarks/redundancy.py benchmarks/data/traces/r1_aime24.jsonl benchmarks/data/traces/r1_math500.jsonl \
  "$results/evaluation.texts.jsonl" "$results/hard.texts.jsonl" --output-json "$results/redundancy.json"
# Share against accuracy, on the problems that settings were chosen on.
"$python" benchmarks/settings_sweep.py --variant paper \
  --values max_distance=0.9 max_distance=1.0 max_distance=1.1 max_distance=1.2 \
  --output-json "$results/sweep_paper.json"
"$python" benchmarks/settings_sweep.py --variant aligned \
  --values max_aliases=8 max_aliases=2 max_aliases=4 max_distance=0.25 max_distance=0.35 protected_tokens=256 \
  --output-json "$results/sweep_aligned.json"
"$python" benchmarks/triton_serving.py --engine-dir "$engine" \
  --output-json "$results/triton_serving.json"
"$python" benchmarks/rejected_pairs.py --output-json "$results/rejected_pairs.json"
# Host cost of the PyTorch backend's hook on the stand-in, then the model that uses it.
"$python" benchmarks/pytorch_hook.py --output-json "$results/pytorch_hook.json"
"$python" benchmarks/modelled_throughput.py --output-json "$results/modelled_throughput.json"
"$python" benchmarks/triton_serving.py --engine-dir "$engine" --soak-minutes 5 \
  --output-json "$results/triton_soak.json"
# Real text: what stage 1 reaches in the traces, and what sharing does to a small model of them.
real=("$python" benchmarks/real_text.py)
runs_of_4=shingle_tokens=4,min_run_tokens=4
"${real[@]}" reach --output-json "$results/real_text_reach.json"
"${real[@]}" replay --max-tokens 2048 --output-json "$results/real_text_replay.json" \
  --plot "$results/real_text_replay.png"
"${real[@]}" replay --max-tokens 2048 --arms streaming:streaming_window_tokens=128 \
  streaming:streaming_window_tokens=16 aligned:min_run_tokens=16 aligned:min_run_tokens=16,max_gap_tokens=4 \
  aligned:shingle_tokens=8,min_run_tokens=8 "aligned:$runs_of_4,max_distance=0.35" \
  "aligned:$runs_of_4,max_distance=0.7" paper:max_distance=1.0 --output-json "$results/real_text_curve.json"
"${real[@]}" replay --max-tokens 2048 --tokens-per-block 8 --arms aligned "aligned:$runs_of_4" "lexical:$runs_of_4" \
  "drop-duplicate:$runs_of_4" "random:$runs_of_4" "streaming:$runs_of_4" \
  --output-json "$results/real_text_small_blocks.json"
