"""Facts stated once: what each arm still knows of them at the end of a text, one row an arm and text, resumable."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from benchmarks.studies.real_model.plan import parse_shard
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay
    from trtllm_memshare.evaluation.page_arms import ANEW, Budget
    from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, PRESETS
    from trtllm_memshare.evaluation.real_rows import RowFile
    from trtllm_memshare.evaluation.recall_study import TEXT_TOKENS, compute_recall
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

ARMS = (
    "full", "random", "redundancy-k", "redundancy-signature", "redundancy-recency-signature", "attention-redundancy",
    "attention-redundancy-recency", "surprisal-redundancy", "surprisal-led-signature",
    "surprisal-led-recency-signature", "attention-surprisal-redundancy", "rkv", "snapkv", "redundancy-v", "streaming",
    "paper-null", "paper-alias", *PRESETS, ANEW,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=52, help="most texts, seven questions each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TEXT_TOKENS, help="of a text (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="every Nth text from the Ith")
    parser.add_argument("--seconds", type=float, help="start no text after so many (default: no limit)")
    parser.add_argument("--min-kept", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--page-tokens", type=int, default=PAGE_TOKENS, help="of the pages that go (default: 16)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/studies/real_model/results/recall.jsonl"))
    arguments = parser.parse_args()
    if arguments.page_tokens < 1 or arguments.page_tokens % PAGE_TOKENS:
        parser.error(f"--page-tokens must be a multiple of {PAGE_TOKENS}, got {arguments.page_tokens}")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    replay, rows = MaskedReplay(arguments.model_dir, "bfloat16", arguments.device), RowFile(arguments.output)
    started = time.monotonic()

    def may_go_on() -> bool:
        return arguments.seconds is None or time.monotonic() - started < arguments.seconds

    compute_recall(
        replay,
        tokenizer,
        arguments.arms,
        Budget(arguments.min_kept),
        arguments.texts,
        rows,
        may_go_on,
        shard=arguments.shard,
        boundaries=BoundaryTokens.from_tokenizer(tokenizer, replay.model.config.vocab_size),
        num_tokens=arguments.tokens,
        page_tokens=arguments.page_tokens,
    )


if __name__ == "__main__":
    run_command_line(main)
