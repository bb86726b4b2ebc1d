"""Rows of the study of pages: arms over real texts, one row an arm and text, nothing computed twice."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trtllm_memshare.evaluation.masked_replay import FullPass, MaskedReplay
from trtllm_memshare.evaluation.page_arms import Budget, retire
from trtllm_memshare.evaluation.real_rows import RowFile, change_row, full_row
from trtllm_memshare.evaluation.real_texts import TokenText

PAGE_TOKENS = 16
"""Of the pages that facts are collected for; longer ones are made of them."""

_HALF = Budget()


@dataclass(frozen=True)
class Task:
    """One row to compute.

    Attributes:
      arm: name in ``page_arms``.
      pages_merged: length of a page, in pages of ``PAGE_TOKENS``.
    """

    arm: str
    budget: Budget = _HALF
    pages_merged: int = 1


def compute_rows(
    replay: MaskedReplay,
    texts: Iterable[tuple[TokenText, list[Task]]],
    rows: RowFile,
    may_go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Computes the rows that are not there yet, all of a text before the next.

    Args:
      texts: texts and the rows that are wanted of each.
      rows: where rows are, and go.
      may_go_on: asked before each text.
    """
    for text, tasks in texts:
        if not may_go_on():
            return
        full: FullPass | None = None
        for task in tasks:
            key = {
                "text": text.trace.name,
                "arm": task.arm,
                "min_kept": task.budget.min_kept,
                "tokens_per_block": PAGE_TOKENS * task.pages_merged,
                "tokens": len(text.ids),
            }
            if key in rows:
                continue
            if full is None:
                full = replay.read(text.ids, PAGE_TOKENS)
                rows.add(full_row(text, full), unless_there=True)
            facts = full.facts if task.pages_merged == 1 else full.facts.merged(task.pages_merged)
            seed = zlib.crc32(text.trace.name.encode())
            retirements = retire(task.arm, task.budget, text.num_prompt_tokens, len(text.ids), facts, seed)
            rows.add({**key, **change_row(text, replay.change(full, retirements), retirements)})
