"""Modelled throughput of TensorRT-LLM's PyTorch backend where KV memory binds, with and without sharing.

**Modelled, not measured**: TensorRT-LLM does not run here. Its KV cache manager and its executor loop are the tests'
fakes, which hold the recorded semantics (what frees a block, what a policy counts as still needed, pauses that
recompute); the adapter on top is the real one. The duration of an iteration comes from a bandwidth model:

    decode   (bytes of the weights + bytes of K and V that all requests read, aliases each time) / bandwidth; null pages
             are counted both ways, since TensorRT-LLM's kernels read them and the GPU's cache saves some of it: `ratio`
             is without them, `ratio_null_read` charges an entry that names one like any page
    prefill  2 * parameters * tokens / FLOP rate, where it is longer than the reading of the weights
    others   a fixed time for launches and host; with sharing its measured host cost, taken as proportional to the
             requests and not hidden behind the GPU, and reads and copies of pages. What V2 copies to the host and back
             costs nothing, which favours TensorRT-LLM alone

Text is scripted: answers of the bundled model, or real DeepSeek-R1 traces. Scripted text has no K and V, so that stage
2 is left out (preset `lexical`; it would refuse some of what is shared here), and preset `pressure` gives up the oldest
pages: how many go and when does not depend on which. The last line is JSON.

    PYTHONPATH=tests python -m trtllm_pytorch.modelled_throughput
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtllm_pytorch.modelled_executor import (
    GUARANTEED_NO_EVICT,
    MANAGERS,
    MAX_UTILIZATION,
    Machine,
    load_texts,
    run,
)

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.document import make_report, publish


def _hook_s_per_request(hook: dict[str, Any], preset: str) -> float:
    """Seconds of host time that the hook takes for a request in an iteration, as measured; else those of `lexical`."""
    found = hook["rows"].get(preset.partition(":")[0], hook["rows"]["lexical"])
    return float(found["hook_ms_mean"]) * 1e-3 / float(hook["requests"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["toy", "r1_aime24"], choices=["toy", "r1_aime24"])
    parser.add_argument(
        "--presets", nargs="+", default=["off", "lexical", "pressure"], help="off comes first; NAME[:KEY=VALUE,...]"
    )
    parser.add_argument("--num-requests", type=int, default=150, help="at most; real traces give fewer")
    parser.add_argument("--in-flight", type=int, help="most requests outstanding at once; default: all come at once")
    parser.add_argument("--policies", nargs="+", default=[MAX_UTILIZATION, GUARANTEED_NO_EVICT])
    parser.add_argument("--manager", default="V1", choices=MANAGERS, help="TensorRT-LLM's KV cache manager")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="pool over what all outstanding hold")
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--hook-report", type=Path, default=Path("benchmarks/results/pytorch_hook.json"))
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    hook = json.loads(options.hook_report.read_text())
    size, rows = options.tokens_per_block, []
    print(f"MODELLED: {Machine()}")
    titles = f"{'req/s':>7} {'ratio':>6} {'null read':>9} {'in flight':>9} {'step ms':>8} {'paused':>6} {'given up':>8}"
    print(f"{'workload':<10} {'policy':<20} {'pool':<6} {'':<22} {titles}")
    for workload in options.workloads:
        texts, boundaries = load_texts(workload, options.num_requests)
        outstanding = min(256, options.in_flight or len(texts), len(texts))
        demand = round(sum(-(-(len(p) + len(o)) // size) for p, o in texts) / len(texts) * outstanding)
        longest = -(-max(len(p) + len(o) for p, o in texts) // size)
        for share, policy in itertools.product(options.shares, options.policies):
            blocks, base = max(round(share * demand), longest + 2), None
            for preset in options.presets:
                name, hook_s = (None, 0.0) if preset == "off" else (preset, _hook_s_per_request(hook, preset))
                machine = Machine(hook_s_per_request=hook_s)
                row = run(
                    texts, boundaries, policy, name, blocks, size, machine, options.in_flight, options.manager
                )  # fmt: skip
                null_read = row["request_throughput_req_s_null_read"]
                base = base or row["request_throughput_req_s"]
                row |= {"workload": workload, "policy": policy, "preset": name or "full", "share": share}
                row |= {"kv_cache_blocks": blocks, "num_requests": len(texts), "hook_s_per_request": hook_s}
                row |= {"ratio": row["request_throughput_req_s"] / base, "ratio_null_read": null_read / base}
                rows.append(row)
                print(
                    f"{workload:<10} {policy:<20} {share:<6} {row['preset']:<22} "
                    f"{row['request_throughput_req_s']:>7.2f} {row['ratio']:>6.2f} "
                    f"{row['ratio_null_read']:>9.2f} {row['mean_requests_in_flight']:>9.1f} "
                    f"{row['mean_step_ms']:>8.2f} {row['paused']:>6} {row['shared_block_fraction']:>8.1%}"
                )
    model = {name: value for name, value in asdict(Machine()).items() if name != "hook_s_per_request"}  # in each row
    figures = {"modelled": True, "machine_model": model, "tokens_per_block": size, "in_flight": options.in_flight}
    figures |= {"kv_cache_manager": options.manager}
    figures |= {"hook_report": {"file": options.hook_report.as_posix(), "date": hook["date"]}, "rows": rows}
    command = " ".join(["PYTHONPATH=tests python -m trtllm_pytorch.modelled_throughput", *sys.argv[1:]])
    publish(make_report(figures, command), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
