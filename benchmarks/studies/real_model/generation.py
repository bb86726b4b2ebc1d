"""Free-running continuations of real reasoning texts, greedy and sampled: one row an arm, text and decoding, resumable.

Arms that forget are held at a share of what they have written. The texts of one group are in flight at once, and all
arms of a group come before the next.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from trtllm_memshare.engine.checkpoint import read_checkpoint
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.free_generation import ARMS, Length, compute_generations
    from trtllm_memshare.evaluation.real_rows import RowFile
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
    from trtllm_memshare.runners.torch.runner import load_model
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

MAIN = (
    "full", "surprisal-led-recency-signature", "surprisal-led-signature", "redundancy-signature",
    "redundancy-recency-signature", "random-once", "paper-alias", "aligned",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=16, help="most texts, two requests each (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=8, help="texts of a group (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(MAIN), help=f"default: {' '.join(MAIN)}")
    parser.add_argument("--min-kept", type=float, default=0.5, help="of arms that forget (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=Length.prompt, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=Length.output, help="at most (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="start no arm after so many (default: no limit)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/studies/real_model/results/generation.jsonl"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    model = load_model(arguments.model_dir, arguments.device)
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, model.config.vocab_size)
    texts = islice(token_texts(read_traces(), tokenizer, arguments.prompt_tokens), arguments.texts)
    length = Length(arguments.prompt_tokens, arguments.new_tokens)
    rows, started = RowFile(arguments.output), time.monotonic()

    def may_go_on() -> bool:
        return arguments.seconds is None or time.monotonic() - started < arguments.seconds

    stop = read_checkpoint(arguments.model_dir).stop_token_ids
    while may_go_on() and (group := list(islice(texts, arguments.at_once))):
        compute_generations(model, boundaries, stop, group, arguments.arms, length, rows, may_go_on, arguments.min_kept)


if __name__ == "__main__":
    run_command_line(main)
