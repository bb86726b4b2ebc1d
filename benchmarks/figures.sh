#!/usr/bin/env bash
# Repeats every committed figure that needs no GPU: bash benchmarks/figures.sh [python]. It takes some hours on two cores
# (not timed as a whole); let nothing else run meanwhile. gpu_suite.sh does the same for a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
engine=engines/tiny_reasoner
results=benchmarks/results
studies=benchmarks/studies
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
"$python" -m benchmarks.studies.sweeps.pools --output-json "$studies/sweeps/results/pressure_curve.json" \
  --plot "$studies/sweeps/results/pressure_curve.png"
"$python" -m benchmarks.studies.sweeps.pools --dataset benchmarks/data/repetitive.jsonl --shares 0.25 --repeat 3 \
  --output-json "$studies/sweeps/results/pressure_repetitive.json"
# Where memory does not bind: eight requests at a time, every alias read as TensorRT-LLM's attention kernels do.
"${bench[@]}" --dataset benchmarks/data/small.jsonl --num-requests 24 --concurrency 8 --repeat 3 \
  --read-aliases repeat --variants full aligned --output-json "$results/unbound.json"
"$python" benchmarks/vs_transformers.py --engine-dir "$engine" --repeat 3 --output-json "$results/vs_transformers.json"
"$python" benchmarks/search_cost.py --output-json "$results/search_cost.json"
"$python" benchmarks/redundancy.py benchmarks/data/traces/r1_aime24.jsonl benchmarks/data/traces/r1_math500.jsonl \
  "$results/evaluation.texts.jsonl" "$results/hard.texts.jsonl" --output-json "$results/redundancy.json"
# Share against accuracy, on the problems that settings were chosen on.
"$python" -m benchmarks.studies.sweeps.settings --variant paper \
  --values max_distance=0.9 max_distance=1.0 max_distance=1.1 max_distance=1.2 \
  --output-json "$studies/sweeps/results/sweep_paper.json"
"$python" -m benchmarks.studies.sweeps.settings --variant aligned \
  --values max_aliases=8 max_aliases=2 max_aliases=4 max_distance=0.25 max_distance=0.35 protected_tokens=256 \
  --output-json "$studies/sweeps/results/sweep_aligned.json"
"$python" -m benchmarks.triton_serving --engine-dir "$engine" \
  --output-json "$results/triton_serving.json"
# Host cost of the PyTorch backend's hook on the stand-in, then the model that uses it.
PYTHONPATH=tests "$python" -m trtllm_pytorch.pytorch_hook --output-json "$results/pytorch_hook.json"
PYTHONPATH=tests "$python" -m trtllm_pytorch.modelled_throughput --output-json "$results/modelled_throughput.json"
"$python" -m benchmarks.triton_soak --engine-dir "$engine" --minutes 30 --output-json "$results/triton_soak.json"
# The weights of the model of the traces come from benchmarks/studies/learning_to_copy/train.py (35 minutes) and are not made anew.
# Real text: what stage 1 reaches in the traces, and what sharing does to a small model of them.
real=("$python" -m benchmarks.studies.real_text)
runs_of_4=shingle_tokens=4,min_run_tokens=4
"$python" -m benchmarks.studies.learning_to_copy --output-json "$studies/learning_to_copy/results/learning_to_copy.json"
"${real[@]}" reach --output-json "$studies/real_text/results/real_text_reach.json"
"${real[@]}" replay --max-tokens 2048 --output-json "$studies/real_text/results/real_text_replay.json" \
  --plot "$studies/real_text/results/real_text_replay.png"
"${real[@]}" replay --max-tokens 2048 --arms streaming:streaming_window_tokens=128 \
  streaming:streaming_window_tokens=16 aligned:min_run_tokens=16 aligned:min_run_tokens=16,max_gap_tokens=4 \
  aligned:shingle_tokens=8,min_run_tokens=8 "aligned:$runs_of_4,max_distance=0.35" \
  "aligned:$runs_of_4,max_distance=0.7" paper:max_distance=1.0 --output-json "$studies/real_text/results/real_text_curve.json"
"${real[@]}" replay --max-tokens 2048 --tokens-per-block 8 --arms aligned "aligned:$runs_of_4" "lexical:$runs_of_4" \
  "drop-duplicate:$runs_of_4" "random:$runs_of_4" "streaming:$runs_of_4" \
  --output-json "$studies/real_text/results/real_text_small_blocks.json"
# The method under test: accuracy and divergence against memory, controls that evict, paired tests, calibration.
for options in "wide --max-batch-size 256" "blocks8 --tokens-per-block 8" "calibrated"; do
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
