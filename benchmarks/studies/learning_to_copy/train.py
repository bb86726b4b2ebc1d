"""Trains the model of real reasoning text on the committed traces. How the committed weights were made is in their
training_log.json."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

try:
    import torch

    from benchmarks.studies.learning_to_copy.training import TraceTrainingConfig, train
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.corpus import TRACES
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("benchmarks/data/trace_model"))
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of the traces")
    parser.add_argument("--minutes", type=float, help="train for this long instead of a number of steps")
    for field in fields(TraceTrainingConfig):
        if field.name not in ("minutes", "bf16", "start_head"):
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=type(field.default), default=field.default, help=field.name)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32 throughout")
    parser.add_argument("--no-start-head", dest="start_head", action="store_false", help="all heads start at random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    output_dir, device, traces = (options.pop(name) for name in ("output_dir", "device", "traces"))
    train(TraceTrainingConfig(**options), output_dir, device, traces)


if __name__ == "__main__":
    run_command_line(main)
