"""Trains the bundled reasoning model. How the committed weights were made is in their training_log.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch

    from build_scripts.tiny_reasoner.training import TrainingConfig, train
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("trtllm_memshare/assets/tiny_reasoner"))
    parser.add_argument("--num-steps", type=int, default=defaults.num_steps, help="optimizer steps")
    parser.add_argument("--minutes", type=float, help="train for this long instead of a number of steps")
    parser.add_argument("--tokens-per-step", type=int, default=defaults.tokens_per_step)
    parser.add_argument("--muon-learning-rate", type=float, default=defaults.muon_learning_rate)
    parser.add_argument("--adam-learning-rate", type=float, default=defaults.adam_learning_rate)
    shares = "share of batches with whole transcripts"
    parser.add_argument(
        "--early-full-share", type=float, default=defaults.early_full_share, help=f"{shares}, first 70 %%"
    )
    parser.add_argument("--late-full-share", type=float, default=defaults.late_full_share, help=f"{shares}, last 30 %%")
    parser.add_argument("--init-from", type=Path, help="go on from this checkpoint (default: random weights)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32 throughout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    output_dir, device, init_from = (options.pop(name) for name in ("output_dir", "device", "init_from"))
    print(f"training on {device}" + (f" for {options['minutes']} minutes" if options["minutes"] else ""))
    train(TrainingConfig(**options), output_dir, device, init_from)


if __name__ == "__main__":
    main()
