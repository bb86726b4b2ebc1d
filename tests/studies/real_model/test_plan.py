"""The plan of the table names every kind of row that is committed, so that one command makes it again."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.real_model.plan import tasks_of
from benchmarks.studies.real_model.recall import ARMS
from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, PRESETS
from trtllm_memshare.evaluation.real_rows import read_rows

ROOT = Path(__file__).parents[3]


def test_every_kind_of_row_of_the_table_is_planned_for_some_text():
    rows = read_rows(ROOT / "benchmarks/results/real_model.jsonl")
    tasks = [task for index in range(40) for task in tasks_of(index)]
    planned = {(t.arm, 1.0 if t.arm in PRESETS else t.budget.min_kept, t.pages_merged * PAGE_TOKENS) for t in tasks}
    there = {(r["arm"], r["min_kept"], r["tokens_per_block"]) for r in rows if r["arm"] != "full"}
    assert there <= planned


def test_every_arm_of_recall_is_planned():
    rows = read_rows(ROOT / "benchmarks/studies/real_model/results/recall.jsonl")
    assert {row["arm"] for row in rows} <= set(ARMS)
