"""What choosing the next tokens costs: milliseconds of a step by vocabulary, requests in flight and decoding.

Logits are random with thirty likely tokens a row. On a CPU the process's own seconds are counted, one thread; on a GPU
the clock, tokens read back included. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import product
from pathlib import Path

try:
    import torch

    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams
    from trtllm_memshare.serving.sampling import Sampler
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

DECODING = {
    "greedy": SamplingParams(),
    "temperature 0.6, top-p 0.95": SamplingParams(temperature=0.6, top_p=0.95),
    "temperature 1": SamplingParams(temperature=1.0),
}


def sampling_ms(vocab_size: int, batch: int, params: SamplingParams, device: str, repeat: int) -> float:
    """Median milliseconds of one call."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, vocab_size, generator=draw)
    logits[:, :30] += 12
    logits = logits.to(device)
    states = [RequestState(i, [4], params.with_seed(i), RequestHandle(i), tokens=[4]) for i in range(batch)]
    sampler, clock, times = Sampler(), time.process_time if device == "cpu" else time.perf_counter, []
    for _ in range(repeat + 1):  # the first one warms up
        started = clock()
        sampler.sample(logits, states)
        times.append(clock() - started)
    return statistics.median(times[1:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[49_152, 151_936], help="SmolLM2's and Qwen's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {"vocab_size": size, "batch": batch, "decoding": name,
         "ms": sampling_ms(size, batch, DECODING[name], options.device, options.repeat)}
        for size, batch, name in product(options.vocab_sizes, options.batches, DECODING)
    ]  # fmt: skip
    for row in rows:
        print(f"{row['vocab_size']:>7} {row['batch']:>3} {row['decoding']:<28} {row['ms']:8.2f} ms")
    publish(make_report({"device": options.device, "rows": rows}), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
