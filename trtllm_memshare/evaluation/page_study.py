"""Rows of the study of pages: arms over real texts, one row an arm and text, nothing computed twice."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trtllm_memshare.evaluation.head_retirement import HeadRetirements
from trtllm_memshare.evaluation.masked_replay import FullPass, MaskedReplay
from trtllm_memshare.evaluation.page_arms import Budget, retire
from trtllm_memshare.evaluation.real_rows import RowFile, change_row, full_row
from trtllm_memshare.evaluation.real_texts import TokenText
from trtllm_memshare.evaluation.recorded_runner import retire_by_preset
from trtllm_memshare.evaluation.retirement import Retirements
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

PAGE_TOKENS = 16
"""Of the pages that facts are collected for; longer ones are made of them."""

PRESETS = ("aligned",)
"""Arms without a budget: a preset of the product shares what it finds, over the full cache's K and V."""
BY_HEAD = "attention-by-head"
"""The reference that no engine can serve: single tokens, for each layer and KV head on its own."""

_HALF = Budget()


@dataclass(frozen=True)
class Task:
    """One row to compute.

    Attributes:
      arm: name in ``page_arms``, one of ``PRESETS``, or ``BY_HEAD``.
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
    boundaries: BoundaryTokens | None = None,
) -> None:
    """Computes the rows that are not there yet, all of a text before the next.

    Args:
      texts: texts and the rows that are wanted of each.
      rows: where rows are, and go.
      may_go_on: asked before each text.
      boundaries: step boundaries of the tokenizer, which presets need.
    """
    for text, tasks in texts:
        if not may_go_on():
            return
        full: FullPass | None = None
        for task in tasks:
            key = {
                "text": text.trace.name,
                "arm": task.arm,
                "min_kept": 1.0 if task.arm in PRESETS else task.budget.min_kept,
                "tokens_per_block": PAGE_TOKENS * task.pages_merged,
                "tokens": len(text.ids),
            }
            if key in rows:
                continue
            if full is None:
                full = replay.read(text.ids, PAGE_TOKENS)
                rows.add(full_row(text, full), unless_there=True)
            retirements = _retire(task, text, full, replay, boundaries)
            rows.add({**key, **change_row(text, replay.change(full, retirements), retirements)})


def _retire(
    task: Task, text: TokenText, full: FullPass, replay: MaskedReplay, boundaries: BoundaryTokens | None
) -> Retirements | HeadRetirements:
    """What a row's arm gives up while its text is written."""
    if task.arm in PRESETS:
        return retire_as_preset(task.arm, full, text.num_prompt_tokens, replay, boundaries)
    if task.arm == BY_HEAD:
        budget = task.budget
        return replay.choose_by_head(full, text.num_prompt_tokens, budget.min_kept, budget.protected_tokens)
    facts = full.facts if task.pages_merged == 1 else full.facts.merged(task.pages_merged)
    seed = zlib.crc32(text.trace.name.encode())
    return retire(task.arm, task.budget, text.num_prompt_tokens, len(text.ids), facts, seed)


def retire_as_preset(
    preset: str, full: FullPass, num_prompt_tokens: int, replay: MaskedReplay, boundaries: BoundaryTokens | None
) -> Retirements:
    """What one of ``PRESETS`` gives up while a text is written; raises ValueError without boundaries."""
    if boundaries is None:
        raise ValueError(f"arm {preset} cuts text into steps, got no boundaries of the tokenizer")
    return retire_by_preset(make_config(preset), full, num_prompt_tokens, replay.model, boundaries)
