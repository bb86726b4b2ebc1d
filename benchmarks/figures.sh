#!/usr/bin/env bash
# Repeats the figures of the bundled model and of real_text: bash benchmarks/figures.sh [python]. Each other study's page
# has its own command. It takes some hours on two cores
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
  --variants full paper aligned lexical drop-duplicate random streaming --repeat 3 \
  --output-json "$results/evaluation.json" --plot "$results/evaluation.png" \
  --output-texts "$results/evaluation.texts.jsonl"
"${bench[@]}" --dataset benchmarks/data/hard.jsonl \
  --variants full paper aligned lexical shadow drop-duplicate random streaming --repeat 3 \
  --output-json "$results/hard.json" --plot "$results/hard.png" --output-texts "$results/hard.texts.jsonl"
# Throughput where memory binds: a quarter of the full cache's peak demand.
"${bench[@]}" --dataset benchmarks/data/evaluation.jsonl --num-requests 150 --kv-cache-share 0.25 \
  --variants full pressure pressure:need=random pressure:min_kept=0.25 \
  --output-json "$studies/pressure/results/toy_quarter.json"
"${bench[@]}" --dataset benchmarks/data/evaluation.jsonl --num-requests 150 --kv-cache-blocks 666 \
  --variants aligned pressure:min_kept=0.75 --output-json "$studies/pressure/results/toy_more.json"
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
"$python" benchmarks/queue_cost.py --output-json "$results/queue_cost.json"
"$python" benchmarks/sampling_cost.py --output-json "$results/sampling_cost.json"
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
modelled=("$python" -m trtllm_pytorch.modelled_throughput)
floors=(off pressure:min_kept=0.75 pressure:min_kept=0.62 pressure:min_kept=0.53 pressure:min_kept=0.5 pressure:min_kept=0.25)
PYTHONPATH=tests "${modelled[@]}" --output-json "$results/modelled_throughput.json"
PYTHONPATH=tests "${modelled[@]}" --workloads r1_aime24 --output-json "$results/modelled_pressure.json"
PYTHONPATH=tests "${modelled[@]}" --workloads r1_aime24 --policies MAX_UTILIZATION --shares 0.125 0.25 0.5 1 \
  --presets "${floors[@]}" --output-json "$results/modelled_pools.json"
PYTHONPATH=tests "${modelled[@]}" --workloads r1_aime24 --policies MAX_UTILIZATION --shares 0.125 0.25 0.5 \
  --in-flight 24 --presets "${floors[@]}" --output-json "$results/modelled_stream.json"
PYTHONPATH=tests "${modelled[@]}" --workloads r1_aime24 --policies MAX_UTILIZATION --shares 0.125 0.25 0.5 \
  --in-flight 24 --manager V2 --presets "${floors[@]}" --output-json "$results/modelled_stream_v2.json"
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
bash benchmarks/figures_fidelity.sh "$python"
