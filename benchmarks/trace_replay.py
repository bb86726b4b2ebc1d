"""Cost and memory of sharing at the size of a real model: random weights, replayed DeepSeek-R1 traces.

The model computes every step of an in-flight batch; the next tokens come from the traces, cut by a byte-pair tokenizer
that is trained on them. Variants run in turn on the same requests, in rounds; times are of steps in which every request
generates, and a variant's cost is the median over rounds of its mean step over that of `off` in the same round.

    off             no search
    shadow          search, share nothing; how many pairs it compares depends on the traces
    full-searches   shadow, and every search compares max_pairs pairs of blocks from all over the pool: the most that a
                    search costs, whatever the traces repeat
    aligned         search and share
    half-dropped    every second full page of generated text is forgotten, by the order alone; its entries are not read
    half-null       the same pages, whose entries point at one null page and are read there, as TensorRT-LLM's kernels
                    would: what the L2 cache gives. The page of a model with random weights is all zeros, so that this
                    says something of time and nothing else

No cost is given for a variant that compared no pair. Random weights say nothing of accuracy, and their KV distances
need not be those of a trained model. The report is written after each round; the last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch

    from trtllm_memshare.errors import UserError, nearest, run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish, write_report
    from trtllm_memshare.evaluation.fixed_sharing import FULL_SEARCHES
    from trtllm_memshare.evaluation.random_model import SHAPES
    from trtllm_memshare.evaluation.replay_cost import make_setup, replay_rounds
    from trtllm_memshare.evaluation.texts import read_texts
    from trtllm_memshare.report.replay_cost import replay_cost_table
    from trtllm_memshare.runners.torch.paged_decode import CHOICES
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-shape", default="DeepSeek-R1-Distill-Qwen-7B", help=", ".join(SHAPES))
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_aime24.jsonl"))
    parser.add_argument("--batch-size", type=int, default=128, help="requests, all in flight at once")
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--variants", nargs="+", default=["off", "shadow", FULL_SEARCHES, "aligned"])
    parser.add_argument("--repeat", type=int, default=3, help="rounds over all variants")
    parser.add_argument("--budget-s", type=float, help="start no round that would not end within so many seconds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--decode", choices=CHOICES, default="auto", help="what attends for generation requests")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel of a decode step on its own")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    if options.model_shape not in SHAPES:
        raise UserError(f"unknown model shape {options.model_shape} ({nearest(options.model_shape, SHAPES)})")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    setup = make_setup(
        read_texts(options.traces), SHAPES[options.model_shape], options.batch_size, _PROMPT_TOKENS,
        options.output_tokens, options.tokens_per_block, device, use_graphs=not options.no_graphs,
        decode=options.decode,
    )  # fmt: skip
    runner, length = setup.runner, _PROMPT_TOKENS + options.output_tokens
    print(f"device: {device}; {options.model_shape} with random weights, {options.batch_size} x {length} tokens")
    print(f"block distances: {runner.search.description}\ndecode attention: {runner.decode_description}")
    settings = {n: getattr(options, n) for n in ("model_shape", "batch_size", "output_tokens", "tokens_per_block")}
    settings |= {"block_distances": runner.search.description, "decode_attention": runner.decode_description}
    report = make_report({"device": device, **settings})
    rounds = replay_rounds(setup, options.variants, options.repeat, options.budget_s)
    for count, rows in enumerate(rounds, 1):
        report["num_rounds"], report["variants"] = count, rows
        if options.output_json is not None:
            write_report(report, options.output_json)
    if missing := options.repeat - report["num_rounds"]:
        print(f"{missing} rounds of {options.repeat} not run: no time left (--budget-s)")
    print(replay_cost_table(report["variants"]))
    print("random weights: these figures say nothing of accuracy")
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
