"""What pressure does to vLLM's schedule, counted in steps: its own scheduler, answers of given lengths, no model.

The same work as ``vllm_pressure.py``: how many steps all requests take, how many are in flight, who is preempted, and
how many tokens are computed, those computed again after a preemption included. Nothing here depends on the machine. A
step of a batch costs about the same however many requests are in it while memory bounds it, so steps stand for time.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vllm_pressure import arm_options, describe, workload
from trtllm_memshare.errors import run_command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2"), help="its tokenizer and shape")
    parser.add_argument("--null-pages", type=Path, default=Path("models/smollm2-null"), help="of vllm calibrate")
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_math500.jsonl"))
    parser.add_argument("--parts", type=int, nargs="+", default=[4], help="pools: one over these of the demand")
    parser.add_argument("--arms", nargs="+", default=["vllm", "admission", "0.75", "0.5", "0.25"])
    parser.add_argument("--admissions", nargs="+", default=["lookahead"], help="vllm, lookahead or max-tokens")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--in-flight", type=int, default=16, help="vLLM's max_num_seqs")
    parser.add_argument("--shorter-by", type=int, default=4, help="answers are this part of their traces")
    parser.add_argument("--longest-answer", type=int, default=1024, help="tokens")
    parser.add_argument("--block-size", type=int, default=16, help="tokens")
    parser.add_argument("--protected-tokens", type=int, default=128)
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR")
    work = workload(options)
    options.admission = None  # of each run
    described = describe(options, work)
    runs = []
    for part in options.parts:
        blocks = -(-described["demand_blocks"] // part) + 2  # vLLM's null block and the null page
        for arm in options.arms:
            for admission in options.admissions if arm != "vllm" else ["vllm"]:
                options.admission = admission
                run = {"part": part, "arm": arm, "admission": admission, **_run(options, work, arm, blocks)}
                runs.append(run)
                print(_line(run), flush=True)
    document = {"workload": described, "date": str(date.today()), "runs": runs}
    if options.output_json:
        options.output_json.write_text(json.dumps(document, indent=1) + "\n")


def _run(options: argparse.Namespace, work: list[tuple[list[int], int]], arm: str, blocks: int) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    scheduler = _scheduler(options, work, arm, blocks)
    for index, (prompt, length) in enumerate(work):
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        scheduler.add_request(
            Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=sampling, pooling_params=None)
        )
    steps = in_flight = computed = preempted = 0
    ends = []
    while scheduler.requests:
        output = scheduler.schedule()
        steps += 1
        in_flight += len(output.num_scheduled_tokens)
        computed += output.total_num_scheduled_tokens
        preempted += len(output.preempted_req_ids or ())
        names = list(output.num_scheduled_tokens)
        # A request that still reads its text samples nothing; any token will do for the others.
        sampled = [[] if scheduler.requests[name].is_prefill_chunk else [steps % 1000 + 10] for name in names]
        before = len(scheduler.requests)
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled
            ),
        )
        ends += [steps] * (before - len(scheduler.requests))
    relief = getattr(scheduler, "relief", None)
    pool = scheduler.kv_cache_manager.block_pool
    return {
        "blocks": blocks, "steps": steps, "mean_in_flight": in_flight / steps, "preemptions": preempted,
        "tokens_computed": computed, "p50_steps": float(np.percentile(ends, 50)),
        "p99_steps": float(np.percentile(ends, 99)), "retired": relief.totals.retired if relief else 0,
        "all_free": pool.get_num_free_blocks() == pool.num_gpu_blocks - 1,
    }  # fmt: skip


def _scheduler(options: argparse.Namespace, work: list[tuple[list[int], int]], arm: str, blocks: int) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    longest = max(len(prompt) + length for prompt, length in work)
    arguments = arm_options(options, arm)
    if arm not in ("vllm", "random"):
        arguments["additional_config"]["memshare"]["need"] = "age"  # which pages go does not change how many
    config = EngineArgs(
        model=str(options.model_dir), dtype="float32", enforce_eager=True, max_num_seqs=options.in_flight,
        max_model_len=-(-longest // options.block_size) * options.block_size, block_size=options.block_size,
        enable_prefix_caching=False, max_num_batched_tokens=2048, **arguments,
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=options.block_size, num_kv_heads=1, head_size=64, dtype=torch.float32)
    cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    kind = config.scheduler_config.get_scheduler_cls() if arm != "vllm" else Scheduler
    return kind(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=options.block_size, log_stats=False,
    )  # fmt: skip


def _line(run: dict[str, Any]) -> str:
    return (
        f"1/{run['part']} {run['arm']:<10} {run['admission']:<10} {run['blocks']} blocks: {run['steps']} steps, "
        f"in flight {run['mean_in_flight']:.1f}, preempted {run['preemptions']}, computed {run['tokens_computed']}, "
        f"p50 {run['p50_steps']:.0f}, p99 {run['p99_steps']:.0f}, retired {run['retired']}"
    )


if __name__ == "__main__":
    run_command_line(main)
