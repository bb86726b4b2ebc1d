"""vLLM alone against vLLM with memory pressure: same model, pool, requests and answers' lengths, on a CPU.

Prompts are problems of recorded DeepSeek-R1 traces, answers get a share of their traces' lengths and no end token. The
demand is what all requests in flight hold at their ends; pools are parts of it. Every arm is a process of its own. All
requests are there at the start. Seconds are counted twice: on the clock, and as the process's own CPU time, which other
work on the machine does not lengthen; the engine runs on one thread.

The arms: ``vllm`` is vLLM as it comes. ``admission`` is our admission alone, nothing retired. A number is ``min_kept``
with the need ``redundancy``; ``random`` and ``age`` are needs at ``min_kept`` 0.5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.evaluation.machine import describe_machine
from trtllm_memshare.vllm import SCHEDULER_CLASS, WORKER_CLASS

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
}  # fmt: skip
_LONGEST_PROMPT = 96  # tokens of a problem that are used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--null-pages", type=Path, default=Path("models/smollm2-null"), help="of vllm calibrate")
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_math500.jsonl"))
    parser.add_argument("--parts", type=int, nargs="+", default=[4], help="pools: one over these of the demand")
    parser.add_argument("--arms", nargs="+", default=["vllm", "admission", "0.75", "0.5", "0.25", "random"])
    parser.add_argument("--admission", default="lookahead", choices=["vllm", "lookahead", "max-tokens"])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--in-flight", type=int, default=8, help="vLLM's max_num_seqs")
    parser.add_argument("--shorter-by", type=int, default=16, help="answers are this part of their traces")
    parser.add_argument("--longest-answer", type=int, default=256, help="tokens")
    parser.add_argument("--block-size", type=int, default=32, help="tokens; on a CPU vLLM takes multiples of 32")
    parser.add_argument("--protected-tokens", type=int, default=32)
    parser.add_argument("--output-json", type=Path, help="runs are added to those in it")
    parser.add_argument("--run-arm", nargs=2, metavar=("ARM", "BLOCKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_arm:
        print(json.dumps(_run_arm(options, options.run_arm[0], int(options.run_arm[1]))))
        return
    work = workload(options)
    document: dict[str, Any] = {"workload": describe(options, work), "machine": describe_machine(), "runs": []}
    if options.output_json and options.output_json.is_file():
        document = {**document, "runs": json.loads(options.output_json.read_text())["runs"]}
    for part in options.parts:
        blocks = -(-document["workload"]["demand_blocks"] // part) + 2  # vLLM's null block and the null page
        for arm in options.arms:
            run = {"part": part, "arm": arm, "date": str(date.today()), **_in_process(arm, blocks)}
            document["runs"].append(run)
            print(_line(run), flush=True)
            if options.output_json:
                options.output_json.write_text(json.dumps(document, indent=1) + "\n")


def _in_process(arm: str, blocks: int) -> dict[str, Any]:
    line = [sys.executable, *sys.argv, "--run-arm", arm, str(blocks)]
    ran = subprocess.run(line, env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"arm {arm} with {blocks} blocks failed: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.splitlines()[-1])


def workload(options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(prompt's token ids, tokens to generate) of each request: the traces in order, again and again."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    rows = [json.loads(line) for line in options.traces.read_text().splitlines()]
    work = []
    for index in range(options.requests):
        row = rows[index % len(rows)]
        prompt = tokenizer(row["problem"])["input_ids"][:_LONGEST_PROMPT]
        length = min(len(tokenizer(row["reasoning"])["input_ids"]) // options.shorter_by, options.longest_answer)
        # A second request of a trace asks the same of other tokens, so that the prefix cache plays no part.
        work.append((prompt if index < len(rows) else prompt[::-1], length))
    return work


def describe(options: argparse.Namespace, work: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    final = [-(-(len(prompt) + length) // options.block_size) for prompt, length in work]
    return {
        "model": options.model_dir.name, "traces": str(options.traces), "requests": len(work),
        "in_flight": options.in_flight, "block_size": options.block_size, "prompt_tokens": sum(len(p) for p, _ in work),
        "answer_tokens": sum(n for _, n in work), "longest_answer": max(n for _, n in work),
        "protected_tokens": options.protected_tokens, "admission": options.admission,
        "demand_blocks": round(sum(final) / len(final) * options.in_flight),
    }  # fmt: skip


def _run_arm(options: argparse.Namespace, arm: str, blocks: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    work = workload(options)
    longest = max(len(prompt) + length for prompt, length in work)
    llm = LLM(
        str(options.model_dir), dtype="float32", enforce_eager=True, max_num_seqs=options.in_flight,
        max_model_len=-(-longest // options.block_size) * options.block_size, block_size=options.block_size,
        num_gpu_blocks_override=blocks, enable_prefix_caching=False, disable_log_stats=False, seed=0,
        **arm_options(options, arm),
    )  # fmt: skip
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=2), use_tqdm=False)  # warm-up
    for index, (prompt, length) in enumerate(work):
        parameters = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
    clock, cpu = time.perf_counter(), time.process_time()
    ends, cpu_ends, answers, steps, in_flight = [], [], {}, 0, 0
    while engine.has_unfinished_requests():
        steps += 1
        outputs = engine.step()
        in_flight += len(scheduler.running)
        for output in outputs:
            if output.finished:
                ends.append(time.perf_counter() - clock)
                cpu_ends.append(time.process_time() - cpu)
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
    lengths = [len(answers[i]) for i in range(len(work))]
    if lengths != [length for _, length in work]:
        raise UserError(f"answers must have their traces' lengths, got {lengths}")
    relief = getattr(scheduler, "relief", None)
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return {
        "blocks": blocks, "seconds": ends[-1], "cpu_seconds": cpu_ends[-1], "steps": steps,
        "mean_in_flight": in_flight / steps, "preemptions": metrics["vllm:num_preemptions"],
        "prompt_tokens_computed": metrics["vllm:prompt_tokens"], "answer_tokens": sum(lengths),
        "latency": {q: float(np.percentile(ends, int(q[1:]))) for q in ("p50", "p99")},
        "cpu_latency": {q: float(np.percentile(cpu_ends, int(q[1:]))) for q in ("p50", "p99")},
        "retired": relief.totals.retired if relief else 0,
        "answers_hash": _hash(answers), "all_free": _all_free(scheduler),
    }  # fmt: skip


def arm_options(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    if arm == "vllm":
        return {}
    settings: dict[str, Any] = {"need": "redundancy", "min_kept": 0.5}
    if arm == "admission":
        settings = {"need": "age", "min_kept": 1.0}
    elif arm in ("random", "age"):
        settings["need"] = arm
    else:
        settings["min_kept"] = float(arm)
    settings |= {
        "null_pages": str(options.null_pages), "protected_tokens": options.protected_tokens,
        "admission": options.admission,
    }  # fmt: skip
    return {"scheduler_cls": SCHEDULER_CLASS, "worker_cls": WORKER_CLASS, "additional_config": {"memshare": settings}}


def _hash(answers: dict[int, list[int]]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(sorted(answers.items())).encode()).hexdigest()[:16]


def _all_free(scheduler: Any) -> bool:
    pool = scheduler.kv_cache_manager.block_pool
    return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)


def _line(run: dict[str, Any]) -> str:
    rate = run["answer_tokens"] / run["cpu_seconds"]
    latency = run["cpu_latency"]
    return (
        f"1/{run['part']} {run['arm']:<10} {run['blocks']} blocks: {run['cpu_seconds']:.0f} CPU s, "
        f"{run['seconds']:.0f} s, {rate:.0f} tokens/CPU s, in flight {run['mean_in_flight']:.1f}, preempted "
        f"{run['preemptions']:.0f}, p50 {latency['p50']:.0f}, p99 {latency['p99']:.0f} CPU s, retired {run['retired']}"
    )


if __name__ == "__main__":
    run_command_line(main)
