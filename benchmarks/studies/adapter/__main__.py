"""Trains a low-rank adapter of a real model on chained sums with re-checks in words, and writes the merged checkpoint.

An answer of the model that comes out can be right or wrong, which no other real model here has:
``python benchmarks/real_engine.py --model OUTPUT/merged`` builds its engine, and ``memshare bench`` with a data set of
``benchmarks/data`` counts right answers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch

    from benchmarks.studies.adapter.training import AdapterConfig, train
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import publish
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_DEFAULTS = AdapterConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, required=True, help="the adapter, and merged/")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rank", type=int, default=_DEFAULTS.rank, help="of every linear layer (default: %(default)s)")
    parser.add_argument("--max-terms", type=int, default=_DEFAULTS.max_terms, help="of a sum (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=_DEFAULTS.num_steps, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, help="instead: train so long")
    parser.add_argument("--tokens-per-step", type=int, default=_DEFAULTS.tokens_per_step, help="default: %(default)s")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device: {device}; {options.model_dir}, rank {options.rank}", flush=True)
    config = AdapterConfig(options.rank, options.max_terms, options.num_steps, options.minutes, options.tokens_per_step)
    publish(train(options.model_dir, options.output_dir, config, device), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
