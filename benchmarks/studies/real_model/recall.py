"""Facts stated once: what each arm still knows of them at the end of a text, one row an arm and text, resumable."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from trtllm_memshare.engine.smollm2 import DEFAULT_DIR
from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.masked_replay import FullPass, MaskedReplay, nothing_retired
from trtllm_memshare.evaluation.page_arms import Budget, retire
from trtllm_memshare.evaluation.real_rows import RowFile
from trtllm_memshare.evaluation.real_texts import read_traces, token_texts
from trtllm_memshare.evaluation.retirement import NEVER, Retirements
from trtllm_memshare.evaluation.stated_facts import AskedText, make_asked_text

TEXT_TOKENS, SOURCE_TOKENS, PAGE_TOKENS = 1280, 1500, 16
ARMS = (
    "full", "random", "redundancy-k", "redundancy-signature", "attention-redundancy", "surprisal-redundancy",
    "surprisal-led-signature", "attention-surprisal-redundancy", "rkv", "streaming", "paper-null", "paper-alias",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path, default=DEFAULT_DIR, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=50, help="most texts (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--min-kept", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/real_model_recall.jsonl"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_dir, local_files_only=True)
    replay, rows = MaskedReplay(arguments.model_dir, "bfloat16"), RowFile(arguments.output)
    budget = Budget(arguments.min_kept)
    for index, text in enumerate(token_texts(read_traces(), tokenizer, SOURCE_TOKENS)):
        if index >= arguments.texts:
            break
        seed = zlib.crc32(text.trace.name.encode())
        body = text.ids[text.num_prompt_tokens :]
        asked = make_asked_text(text.ids[: text.num_prompt_tokens], body, tokenizer, TEXT_TOKENS, seed)
        full: FullPass | None = None
        for arm in arguments.arms:
            key = {
                "text": text.trace.name,
                "arm": arm,
                "min_kept": budget.min_kept,
                "tokens_per_block": PAGE_TOKENS,
                "tokens": TEXT_TOKENS,
            }
            if key in rows:
                continue
            full = full or replay.read(asked.ids, PAGE_TOKENS)
            if arm == "full":
                retirements = nothing_retired(TEXT_TOKENS, PAGE_TOKENS)
            else:
                retirements = retire(arm, budget, asked.num_prompt_tokens, TEXT_TOKENS, full.facts, seed)
            logits = replay.answers(full, retirements, asked.asks)
            rows.add({**key, "model": text.trace.model, "questions": judge(asked, logits, retirements)})


def judge(asked: AskedText, logits: list[torch.Tensor], retirements: Retirements) -> list[dict[str, Any]]:
    """Of each question its kind, whether the answer would be given greedily, its distance and what is left of it."""
    found = []
    gone = retirements.retired_at < NEVER
    for i, question in enumerate(asked.questions):
        length = asked.answer_lengths[i]
        said = logits[i][-length - 1 : -1].argmax(-1).tolist()
        first, last = asked.places[i]
        pages = np.arange(first // PAGE_TOKENS, last // PAGE_TOKENS + 1)
        found.append(
            {
                "kind": question.kind,
                "right": said == asked.asks[i][-length:],
                "distance": len(asked.ids) - last,
                "pages_kept": round(float(1 - gone[pages].mean()), 3),
            }
        )
    return found


if __name__ == "__main__":
    run_command_line(main)
