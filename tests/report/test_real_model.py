"""The page of the real model says what its rows say, and its tables and pictures can be made of few rows too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtllm_memshare.evaluation.page_arms import ANEW, ARMS, PAIRED
from trtllm_memshare.evaluation.page_study import BY_HEAD, PRESETS
from trtllm_memshare.evaluation.real_rows import read_rows
from trtllm_memshare.report.generation import generation_tables
from trtllm_memshare.report.real_model import LABELS, fill_page, main_table, page_tables, summary
from trtllm_memshare.report.real_model_plots import plot_curve, plot_loss_and_recall

ROOT = Path(__file__).resolve().parents[2]
ROWS = read_rows(ROOT / "benchmarks" / "results" / "real_model.jsonl")
RESULTS = ROOT / "benchmarks" / "studies" / "real_model" / "results"
RECALL = read_rows(RESULTS / "recall.jsonl")
LOOPS = json.loads((RESULTS / "loops.json").read_text())
GENERATION = read_rows(RESULTS / "generation.jsonl")
PAGE = (ROOT / "docs" / "real_model.md").read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_made_of_the_committed_rows(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(PAGE, encoding="utf-8")
    fill_page(copy, page_tables(ROWS, RECALL, LOOPS) | generation_tables(GENERATION))
    assert copy.read_text(encoding="utf-8") == PAGE


def test_every_arm_has_a_name_and_every_row_its_arm():
    arms = {row["arm"] for row in [*ROWS, *RECALL]}
    assert arms <= set(LABELS)
    assert arms - {"full", *PRESETS, BY_HEAD, ANEW} <= {*ARMS, *PAIRED}
    assert {name for name in ARMS if name not in LABELS} <= {"surprisal-redundancy-signature"}


def test_rows_are_unique_and_complete():
    keys = [(r["text"], r["arm"], r.get("min_kept"), r.get("tokens_per_block"), r["tokens"]) for r in ROWS]
    assert len(set(keys)) == len(keys)
    found = summary(ROWS, RECALL)
    assert len(found["models"]) == 5
    assert found["questions"] >= 50
    for row in ROWS:
        if row["arm"] not in ("full", *PRESETS) and row["tokens_per_block"] == 16:
            # The last 128 tokens stay, so a little more than the share is held.
            assert row["min_kept"] <= row["memory_share"] <= row["min_kept"] + 0.08


def test_pictures(tmp_path):
    plot_loss_and_recall(ROWS, RECALL, tmp_path / "both.png")
    half = [row for row in ROWS if row.get("tokens_per_block") == 16 and row["arm"] in ("random", "redundancy-k")]
    plot_curve(half, tmp_path / "curve.png")
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("both.png", "curve.png"))


def test_few_rows_make_a_table_without_rows_and_a_missing_mark_is_named(tmp_path):
    assert main_table(ROWS[:2]).count("\n") == 1
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no mark <!-- main -->"):
        fill_page(page, {"main": "x"})
