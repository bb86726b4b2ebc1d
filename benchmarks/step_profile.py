"""Where the time of a decode step goes: a replay of written text by a model with random weights, watched.

Three runs of the same requests after a warm-up: one that only a clock watches (step, the model's CUDA graph in it, the
rest), one with the interpreter's profiler (which functions of the host) and, on a GPU, one with the GPU's profiler
(which kernels, and how long the GPU is at work in a step). Only decode steps are watched. The report is written after
each run; the last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch

    from trtllm_memshare.errors import UserError, nearest, run_command_line
    from trtllm_memshare.evaluation.document import make_report, publish, write_report
    from trtllm_memshare.evaluation.random_model import SHAPES
    from trtllm_memshare.evaluation.replay_cost import make_setup, replay_setup, warm_up
    from trtllm_memshare.evaluation.step_profile import SKIPPED_STEPS, HostProfile, KernelProfile
    from trtllm_memshare.evaluation.texts import read_texts
    from trtllm_memshare.runners.torch.paged_decode import CHOICES
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_PROMPT_TOKENS = 64
_FIGURES = ("step_ms_mean", "step_ms_median", "graph_ms_mean", "rest_ms_mean", "num_steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-shape", default="DeepSeek-R1-Distill-Qwen-7B", help=", ".join(SHAPES))
    parser.add_argument("--traces", type=Path, default=Path("benchmarks/data/traces/r1_aime24.jsonl"))
    parser.add_argument("--batch-size", type=int, default=64, help="requests, all in flight at once")
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--variant", default="off", help="as of benchmarks/trace_replay.py")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--decode", choices=CHOICES, default="auto", help="what attends for generation requests")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    if options.model_shape not in SHAPES:
        raise UserError(f"unknown model shape {options.model_shape} ({nearest(options.model_shape, SHAPES)})")
    if options.output_tokens <= SKIPPED_STEPS:
        got = f"got {options.output_tokens} (96 take a few seconds on a GPU)"
        raise UserError(f"--output-tokens must be above {SKIPPED_STEPS}, whose steps go by unwatched, {got}")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    setup = make_setup(
        read_texts(options.traces), SHAPES[options.model_shape], options.batch_size, _PROMPT_TOKENS,
        options.output_tokens, options.tokens_per_block, device, decode=options.decode,
    )  # fmt: skip
    settings = {n: getattr(options, n) for n in ("model_shape", "batch_size", "output_tokens", "variant")}
    report = make_report({"device": device, **settings, "decode_attention": setup.runner.decode_description})
    print(f"device: {device}; {options.model_shape} with random weights, {options.batch_size} requests", flush=True)
    warm_up(setup)
    plain = replay_setup(setup, options.variant)
    report["plain"] = {name: plain[name] for name in _FIGURES}
    watchers: dict[str, HostProfile | KernelProfile] = {"host": HostProfile()}
    if device == "cuda":
        watchers["gpu"] = KernelProfile()
    for name, watcher in watchers.items():
        if options.output_json is not None:
            write_report(report, options.output_json)
        replay_setup(setup, options.variant, run_step=watcher)
        report[name] = watcher.summary()
        for row in report[name]["functions" if name == "host" else "kernels"]:
            print(f"{name}: {row['ms_a_step']:8.3f} ms {row['calls_a_step']:8.1f} calls  {next(iter(row.values()))}")
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
