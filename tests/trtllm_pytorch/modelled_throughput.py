"""Modelled throughput of TensorRT-LLM's PyTorch backend where KV memory binds, with and without sharing.

**Modelled, not measured**: TensorRT-LLM does not run here. Its KV cache manager and its executor loop are the tests'
fakes, which hold the recorded semantics (what frees a block, what a policy counts as still needed, pauses that
recompute); the adapter on top is the real one. The duration of an iteration comes from a bandwidth model:

    decode   (bytes of the weights + bytes of K and V that all requests read, aliases each time, null pages never: they
             stay in the cache of the GPU) / bandwidth
    prefill  2 * parameters * tokens / FLOP rate, where it is longer than the reading of the weights
    others   a fixed time for launches and host; with sharing its measured host cost, taken as proportional to the
             requests and not hidden behind the GPU, and reads and copies of pages

Text is scripted: answers of the bundled model, or real DeepSeek-R1 traces. Scripted text has no K and V, so that stage
2 is left out (preset `lexical`; it would refuse some of what is shared here), and preset `pressure` gives up the oldest
pages: how many go and when does not depend on which. The last line is JSON.

    PYTHONPATH=tests python -m trtllm_pytorch.modelled_throughput
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from trtllm_pytorch.modelled_executor import GUARANTEED_NO_EVICT, MAX_UTILIZATION, Machine, load_texts, run

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["toy", "r1_aime24"], choices=["toy", "r1_aime24"])
    parser.add_argument("--presets", nargs="+", default=["off", "lexical", "pressure"], help="off comes first")
    parser.add_argument("--num-requests", type=int, default=150, help="at most; real traces give fewer")
    parser.add_argument("--share", type=float, default=0.25, help="pool over the demand of all requests at once")
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--hook-report", type=Path, default=Path("benchmarks/results/pytorch_hook.json"))
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    hook = json.loads(options.hook_report.read_text())
    size, rows = options.tokens_per_block, []
    print(f"MODELLED: {Machine()}")
    titles = f"{'req/s':>7} {'ratio':>6} {'in flight':>9} {'step ms':>8} {'paused':>6} {'given up':>8}"
    print(f"{'workload':<10} {'policy':<20} {'':<9} {titles}")
    for workload in options.workloads:
        texts, boundaries = load_texts(workload, options.num_requests)
        demand = sum(-(-(len(p) + len(o)) // size) for p, o in texts[:256])
        longest = -(-max(len(p) + len(o) for p, o in texts) // size)
        blocks = max(round(options.share * demand), longest + 2)
        for policy in (MAX_UTILIZATION, GUARANTEED_NO_EVICT):
            base = None
            for preset in options.presets:
                per_request = (
                    hook["rows"].get(preset, hook["rows"]["lexical"])["hook_ms_mean"] * 1e-3 / hook["requests"]
                    if preset != "off"
                    else 0.0
                )
                machine = Machine(hook_s_per_request=per_request)
                row = run(texts, boundaries, policy, None if preset == "off" else preset, blocks, size, machine)
                base = base or row["request_throughput_req_s"]
                row |= {
                    "workload": workload,
                    "policy": policy,
                    "preset": preset if preset != "off" else "full",
                    "kv_cache_blocks": blocks,
                }
                row |= {"num_requests": len(texts), "ratio": row["request_throughput_req_s"] / base}
                rows.append(row)
                print(
                    f"{workload:<10} {policy:<20} {row['preset']:<9} {row['request_throughput_req_s']:>7.2f} "
                    f"{row['ratio']:>6.2f} {row['mean_requests_in_flight']:>9.1f} {row['mean_step_ms']:>8.2f} "
                    f"{row['paused']:>6} {row['shared_block_fraction']:>8.1%}"
                )
    figures = {"modelled": True, "machine_model": asdict(Machine()), "tokens_per_block": size, "share": options.share}
    publish(make_report({**figures, "rows": rows}), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
