"""The plan of the table names every kind of row that is committed, so that one command makes it again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.studies.real_model.plan import PLAN
from benchmarks.studies.real_model.recall import ARMS
from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, PRESETS
from trtllm_memshare.evaluation.real_rows import read_rows

ROOT = Path(__file__).parents[3]


def test_the_plan_has_every_committed_row_and_no_more():
    rows = read_rows(ROOT / "benchmarks/results/real_model.jsonl")
    there = Counter((r["arm"], r["min_kept"], r["tokens_per_block"]) for r in rows if r["arm"] != "full")
    planned = {
        (task.arm, 1.0 if task.arm in PRESETS else task.budget.min_kept, task.pages_merged * PAGE_TOKENS): len(texts)
        for task, texts in PLAN.items()
    }
    assert there == planned


def test_every_arm_of_recall_is_planned():
    rows = read_rows(ROOT / "benchmarks/studies/real_model/results/recall.jsonl")
    assert {row["arm"] for row in rows} <= set(ARMS)
