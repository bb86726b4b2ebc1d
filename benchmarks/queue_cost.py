"""What a long queue costs the executor's thread: memory, submitting, the steps meanwhile, and cancelling all of it.

As many requests as a batch takes generate; the others wait and are cancelled by their callers while steps go on. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

try:
    import psutil
    from transformers import AutoTokenizer

    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.runners.engines import load_engine
    from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
    from trtllm_memshare.search.config import make_config
    from trtllm_memshare.search.steps import BoundaryTokens
    from trtllm_memshare.serving.executor import Executor
    from trtllm_memshare.serving.request import RequestHandle, SamplingParams
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_WAIT_S = 600  # a wait that is longer is an error


def cancel_all(handles: Sequence[RequestHandle]) -> float:
    """Seconds until every caller has an answer."""
    started = time.perf_counter()
    for handle in handles:
        handle.cancel()
    reasons = {handle.result(_WAIT_S).finish_reason for handle in handles}
    seconds = time.perf_counter() - started
    assert reasons == {"cancelled"}, reasons
    return seconds


def step_ms(executor: Executor, window_s: float) -> float:
    """Milliseconds of a step, by the steps that end in ``window_s`` seconds."""
    before = executor.status().num_steps
    time.sleep(window_s)
    return window_s * 1e3 / max(1, executor.status().num_steps - before)


def measure(executor: Executor, batch: int, num_requests: int, new_tokens: int, window_s: float) -> dict[str, float]:
    """One round on an executor whose thread runs; ``batch`` requests generate meanwhile."""
    running = [executor.submit([5 + i], SamplingParams(new_tokens)) for i in range(batch)]
    while executor.status().num_generating < batch:
        time.sleep(0.01)
    before_ms, memory, started = step_ms(executor, window_s), psutil.Process().memory_info().rss, time.perf_counter()
    waiting = [executor.submit([5 + i % 60], SamplingParams(new_tokens)) for i in range(num_requests)]
    submit_s = time.perf_counter() - started
    figures = {
        "step_before_ms": before_ms,
        "submit_s": submit_s,
        "queue_mib": (psutil.Process().memory_info().rss - memory) / 2**20,
        "step_with_queue_ms": step_ms(executor, window_s),
        "cancel_s": cancel_all(waiting),
        "step_after_ms": step_ms(executor, window_s),  # a step grows with its requests: before and after enclose it
    }
    cancel_all(running)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--num-requests", type=int, default=100_000, help="requests that wait")
    parser.add_argument("--batch", type=int, default=64, help="requests that generate meanwhile")
    parser.add_argument("--window-s", type=float, default=2.0, help="seconds over which steps are counted")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    longest = engine.build.max_seq_len
    boundaries = BoundaryTokens.from_tokenizer(AutoTokenizer.from_pretrained(engine.model_dir), engine.vocab_size)
    runner = TorchRunner(load_model(engine.model_dir), options.batch * -(-longest // 16), 16)
    rounds = []
    for _ in range(options.repeat):
        with Executor(runner, make_config("off"), boundaries, longest, options.batch) as executor:
            rounds.append(measure(executor, options.batch, options.num_requests, longest - 1, options.window_s))
        print("  ".join(f"{name} {value:.3f}" for name, value in rounds[-1].items()))
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    medians["queue_mib"] = max(r["queue_mib"] for r in rounds)  # later rounds use the memory of the first again
    publish(
        make_report({"num_requests": options.num_requests, "batch": options.batch, **medians, "rounds": rounds}),
        options.output_json,
    )


if __name__ == "__main__":
    run_command_line(main)
