"""What a cache in fp8 costs, with all pages and with pages given up: rows, one for each text and arm.

The change of the next word, or with ``--facts`` whether facts that were stated once are recalled. Rows that exist are
not computed again. Linear layers are computed in float32.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from itertools import islice
from pathlib import Path

try:
    import torch
    from transformers import AutoTokenizer

    from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.masked_replay import MaskedReplay, nothing_retired
    from trtllm_memshare.evaluation.page_arms import DEFAULT, Budget, retire
    from trtllm_memshare.evaluation.page_study import PAGE_TOKENS
    from trtllm_memshare.evaluation.real_rows import RowFile, change_row, full_row
    from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
    from trtllm_memshare.evaluation.recall_study import compute_recall
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

TYPES = {"bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
ARMS = tuple((name, kept) for kept in (1.0, 0.5, 0.25) for name in TYPES)
"""Type of the cache, and share of the generated pages that is kept, chosen by the default ranking."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=20, help="most texts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of a text (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/studies/fp8_cache/results/rows.jsonl"))
    parser.add_argument("--facts", choices=TYPES, help="recall of facts from a cache of this type, whole and half kept")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    replay, rows = MaskedReplay(arguments.model_dir), RowFile(arguments.output)
    if arguments.facts:
        stored = TYPES[arguments.facts]
        compute_recall(replay, tokenizer, ["full", DEFAULT], Budget(), arguments.texts, rows, stored=stored)
        return
    for text in islice(token_texts(read_traces(), tokenizer, arguments.tokens), arguments.texts):
        count, full = len(text.ids), None
        for name, kept in ARMS:
            key = {
                "text": text.trace.name,
                "arm": name,
                "min_kept": kept,
                "tokens_per_block": PAGE_TOKENS,
                "tokens": count,
            }
            if key in rows:
                continue
            if full is None:
                full = replay.read(text.ids, PAGE_TOKENS)
                rows.add(full_row(text, full), unless_there=True)
            gone = nothing_retired(count, PAGE_TOKENS)
            if kept < 1:
                seed = zlib.crc32(text.trace.name.encode())
                gone = retire(DEFAULT, Budget(kept), text.num_prompt_tokens, count, full.facts, seed)
            rows.add({**key, **change_row(text, replay.change(full, gone, TYPES[name]), gone)})


if __name__ == "__main__":
    run_command_line(main)
