"""The table of what goes: arms on real reasoning texts with a real model, one row an arm and text, resumable.

Rows that exist are not computed again. All arms of a text come before the next text, and texts take turns over the
models that wrote them, so that any part of the table is a balanced one.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from benchmarks.studies.real_model.plan import NUM_TEXTS, PLAN, TEXT_TOKENS, parse_shard, tasks_of
    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay
    from trtllm_memshare.evaluation.page_arms import Budget
    from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, Task, compute_rows
    from trtllm_memshare.evaluation.real_rows import RowFile
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS, help="most texts (default: %(default)s)")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=TEXT_TOKENS, help="of a text (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", help="only these, at --min-kept (default: the study's)")
    parser.add_argument("--min-kept", type=float, default=0.5, help="of --arms (default: %(default)s)")
    parser.add_argument("--page-tokens", type=int, nargs="+", default=[PAGE_TOKENS], help="of --arms (default: 16)")
    parser.add_argument("--every-arm", action="store_true", help="of every text (default: the study's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="every Nth text from the Ith")
    parser.add_argument("--seconds", type=float, help="start no text after so many (default: no limit)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/real_model.jsonl"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    replay = MaskedReplay(arguments.model_dir, arguments.compute, arguments.device)
    texts = islice(enumerate(token_texts(read_traces(), tokenizer, arguments.tokens)), arguments.texts)
    shard, num_shards = arguments.shard
    budget = Budget(arguments.min_kept)
    if any(size < 1 or size % PAGE_TOKENS for size in arguments.page_tokens):
        parser.error(f"--page-tokens must be multiples of {PAGE_TOKENS}, got {arguments.page_tokens}")
    merged = [size // PAGE_TOKENS for size in arguments.page_tokens]
    chosen = [Task(arm, budget, count) for count in merged for arm in arguments.arms or ()]
    chosen = list(PLAN) if arguments.every_arm else chosen
    wanted = ((text, chosen or tasks_of(index)) for index, text in texts if index % num_shards == shard)
    rows, started = RowFile(arguments.output), time.monotonic()

    def may_go_on() -> bool:
        return arguments.seconds is None or time.monotonic() - started < arguments.seconds

    boundaries = BoundaryTokens.from_tokenizer(tokenizer, replay.model.config.vocab_size)
    compute_rows(replay, wanted, rows, may_go_on, boundaries)


if __name__ == "__main__":
    run_command_line(main)
