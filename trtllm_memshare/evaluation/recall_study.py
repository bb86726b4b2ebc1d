"""Rows of the study of facts stated once: what each arm still knows at the end of a text."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.evaluation.masked_replay import FullPass, MaskedReplay, nothing_retired
from trtllm_memshare.evaluation.page_arms import ANEW, Budget, retire
from trtllm_memshare.evaluation.page_facts import TextFacts
from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, PRESETS, retire_as_preset
from trtllm_memshare.evaluation.real_rows import RowFile
from trtllm_memshare.evaluation.real_texts import TRACES, read_traces, token_texts
from trtllm_memshare.evaluation.retirement import NEVER, Retirements
from trtllm_memshare.evaluation.stated_facts import AskedText, make_asked_text
from trtllm_memshare.search.steps import BoundaryTokens

TEXT_TOKENS = 1280
_MORE_TOKENS = 220
"""By so much a trace is longer than the text that is made of it."""


def compute_recall(
    replay: MaskedReplay,
    tokenizer: Any,
    arms: list[str],
    budget: Budget,
    num_texts: int,
    rows: RowFile,
    may_go_on: Callable[[], bool] = lambda: True,
    traces: Path = TRACES,
    shard: tuple[int, int] = (0, 1),
    boundaries: BoundaryTokens | None = None,
    num_tokens: int = TEXT_TOKENS,
    stored: torch.dtype | None = None,
    page_tokens: int = PAGE_TOKENS,
) -> None:
    """Computes the rows that are not there yet, all arms of a text before the next.

    Args:
      arms: names in ``page_arms``, ``PRESETS``, ``ANEW`` and ``full``. A preset has no budget; the row has the run's.
      num_texts: first texts of the traces.
      may_go_on: asked before each text.
      shard: (i, n): every nth text from the ith.
      boundaries: step boundaries of the tokenizer, which presets need.
      num_tokens: of a text with the facts in it, whole pages.
      stored: type of every arm's cache, None = float32.
      page_tokens: of the pages that go, a multiple of ``PAGE_TOKENS``; a preset has its own.
    """
    long_enough = token_texts(read_traces(traces), tokenizer, num_tokens + _MORE_TOKENS)
    for text in islice(long_enough, shard[0], num_texts, shard[1]):
        if not may_go_on():
            return
        seed = zlib.crc32(text.trace.name.encode())
        prompt, body = text.ids[: text.num_prompt_tokens], text.ids[text.num_prompt_tokens :]
        asked = make_asked_text(prompt, body, tokenizer, num_tokens, seed)
        full: FullPass | None = None
        for arm in arms:
            key = {
                "text": text.trace.name,
                "arm": arm,
                "min_kept": budget.min_kept,
                "tokens_per_block": page_tokens,
                "tokens": num_tokens,
            }
            if key in rows:
                continue
            full = full or replay.read(asked.ids, PAGE_TOKENS)
            facts = full.facts if page_tokens == PAGE_TOKENS else full.facts.merged(page_tokens // PAGE_TOKENS)
            if arm == ANEW:
                seeds = [zlib.crc32(f"{text.trace.name} {i}".encode()) for i in range(len(asked.asks))]
                each = [_retire("random", budget, asked, facts, seed) for seed in seeds]
                asks = zip(each, asked.asks, strict=True)
                logits = [replay.answers(full, r, [ask], stored)[0] for r, ask in asks]
            else:
                if arm in PRESETS:
                    retirements = retire_as_preset(arm, full, asked.num_prompt_tokens, replay, boundaries)
                else:
                    retirements = _retire(arm, budget, asked, facts, seed)
                each = [retirements] * len(asked.asks)
                logits = replay.answers(full, retirements, asked.asks, stored)
            rows.add({**key, "model": text.trace.model, "questions": judge(asked, logits, each)})


def _retire(arm: str, budget: Budget, asked: AskedText, facts: TextFacts, seed: int) -> Retirements:
    if arm == "full":
        return nothing_retired(len(asked.ids), facts.tokens_per_block)
    return retire(arm, budget, asked.num_prompt_tokens, len(asked.ids), facts, seed)


def judge(asked: AskedText, logits: list[torch.Tensor], retirements: list[Retirements]) -> list[dict[str, Any]]:
    """Of each question its kind, whether the answer would be given greedily, its distance and what is left of it.

    Args:
      logits: of each question, float32 ``[tokens of ask and answer, vocab_size]``.
      retirements: of each question, what was given up when it was asked.

    Returns:
      kind, right, distance (tokens from the end of the statement to the end of the text) and pages_kept (the share of
      the statement's pages that are there) of each.
    """
    found = []
    for i, question in enumerate(asked.questions):
        length = asked.answer_lengths[i]
        said = logits[i][-length - 1 : -1].argmax(-1).tolist()
        first, last = asked.places[i]
        gone, size = retirements[i].retired_at < NEVER, retirements[i].tokens_per_block
        pages = np.arange(first // size, last // size + 1)
        found.append(
            {
                "kind": question.kind,
                "right": said == asked.asks[i][-length:],
                "distance": len(asked.ids) - last,
                "pages_kept": round(float(1 - gone[pages].mean()), 3),
            }
        )
    return found
