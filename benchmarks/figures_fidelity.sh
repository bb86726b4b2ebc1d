#!/usr/bin/env bash
# The second part of figures.sh, which calls it: what the method under test costs in accuracy.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
engine=engines/tiny_reasoner
results=benchmarks/results
studies=benchmarks/studies
# The method under test: accuracy and divergence against memory, controls that evict, paired tests, calibration.
for options in "wide --max-batch-size 256" "blocks8 --tokens-per-block 8" "calibrated --preset aligned"; do
  # shellcheck disable=SC2086
  "$python" build_scripts/build_engine.py --memshare --force --output-dir engines/$options
done
fidelity=("$python" benchmarks/fidelity.py --keep-dir build/keep)
data=benchmarks/data
"${fidelity[@]}" --dataset $data/tuning.jsonl --num-problems 100 --no-accuracy \
  --arms aligned aligned:direction=keep-earliest lexical drop-duplicate aligned:compared=v aligned:compared=k \
  aligned:layer_vote=mean aligned:layer_quorum=0.5 aligned:max_gap_tokens=1 aligned:max_gap_tokens=4 \
  aligned:protected_tokens=128 aligned:protected_tokens=32,protected_steps=1 \
  aligned:protected_tokens=16,protected_steps=0 aligned:protected_steps=4 aligned:max_distance=0.25 \
  aligned:max_distance=0.35 aligned:max_distance=0.8 aligned:min_run_tokens=16 \
  aligned:min_run_tokens=48 aligned:max_aliases=2 aligned:max_aliases=4 aligned:undo_rope=false \
  drop-duplicate:direction=keep-earliest random streaming paper \
  --output-json "$results/fidelity_tuning.json"
"${fidelity[@]}" --dataset $data/tuning.jsonl --num-problems 100 --no-accuracy \
  --arms aligned:settled_tokens={16,32,64,128,256} --output-json "$results/fidelity_settled.json"
samples=(--dataset $data/tuning.jsonl --num-problems 40 --samples 4 --replay-problems 160)
"${fidelity[@]}" "${samples[@]}" --temperature 0.7 --arms aligned aligned:scope=group drop-duplicate:scope=group \
  lexical:scope=group random:scope=group --output-json "$results/fidelity_samples.json"
"${fidelity[@]}" "${samples[@]}" --temperature 1.0 --arms aligned aligned:scope=group \
  --output-json "$results/fidelity_samples_hot.json"
"$python" -m benchmarks.studies.sweeps.settings --variant aligned --num-requests 15 --samples 4 --temperature 0.7 \
  --kv-cache-blocks 400 --values scope=request scope=group --output-json "$studies/sweeps/results/sweep_samples.json"
# Which distance foretells the harm of sharing one pair of blocks.
"$python" -m benchmarks.studies.distances --num-problems 200 --keep-dir build/keep \
  --output-json "$studies/distances/results/distance_study.json"
"$python" -m benchmarks.studies.distances --traces --pairs-per-kind 16 \
  --output-json "$studies/distances/results/distance_study_traces.json"
"${fidelity[@]}" --dataset $data/evaluation.jsonl --arms aligned aligned:settled_tokens=64 drop-duplicate random \
  --output-json "$results/fidelity_evaluation.json" --plot "$results/fidelity_evaluation.png"
"${fidelity[@]}" --dataset $data/evaluation.jsonl --num-problems 100 --replay-problems 40 \
  --arms aligned streaming snapkv snapkv:budget=share rkv rkv:undo_rope=true,budget=share \
  --output-json "$results/fidelity_controls.json" --plot "$results/fidelity_controls.png"
"${fidelity[@]}" --dataset $data/evaluation.jsonl --num-problems 100 --replay-problems 40 \
  --arms aligned snapkv:observation_tokens=16 rkv:observation_tokens=16 --output-json "$results/fidelity_controls_window.json"
"${fidelity[@]}" --dataset $data/hard.jsonl --replay-problems 0 \
  --arms aligned aligned:settled_tokens=64 drop-duplicate --output-json "$results/fidelity_hard.json"
"${fidelity[@]}" --dataset $data/repetitive.jsonl --replay-problems 0 --arms aligned aligned:settled_tokens=64 \
  --output-json "$results/fidelity_repetitive.json"
"${fidelity[@]}" --engine-dir engines/blocks8 --dataset $data/tuning.jsonl --num-problems 50 --no-accuracy \
  --arms aligned aligned:settled_tokens=64 aligned:min_run_tokens=16,max_gap_tokens=4 \
  --output-json "$results/fidelity_blocks8.json"
"${fidelity[@]}" --engine-dir engines/wide --dataset $data/paired.jsonl --num-problems 600 --replay-problems 0 \
  --arms aligned drop-duplicate random aligned:settled_tokens=64 --output-json "$results/fidelity_paired.json"
"${fidelity[@]}" --engine-dir engines/wide --dataset $data/paired.jsonl --replay-problems 0 \
  --arms aligned drop-duplicate random aligned:settled_tokens=64 --output-json "$results/fidelity_paired_all.json"
for size in "" _all; do
  "$python" benchmarks/paired_tests.py "$results/fidelity_evaluation.json" "$results/fidelity_paired$size.json" \
    --output-json "$results/paired_tests$size.json"
done
"$python" -m benchmarks.studies.sweeps.settings --variant aligned --num-requests 60 --kv-cache-blocks 400 \
  --values min_pool_use=0 min_pool_use=0.8 min_pool_use=0.95 --output-json "$studies/sweeps/results/sweep_min_pool_use.json"
"$python" -m trtllm_memshare calibrate --engine-dir engines/calibrated --dataset $data/tuning.jsonl --num-problems 50 \
  --replay-problems 25 --max-accuracy-drop 0.01 --keep-dir build/keep --output-json "$results/calibrate.json"
