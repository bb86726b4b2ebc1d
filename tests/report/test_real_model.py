"""Rows of the real model are whole, every arm has a name and its place in the picture, and few rows are enough."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from trtllm_memshare.evaluation.page_arms import ANEW, ARMS, PAIRED
from trtllm_memshare.evaluation.page_study import BY_HEAD, PRESETS
from trtllm_memshare.evaluation.real_rows import read_rows
from trtllm_memshare.report.real_model import LABELS, main_table, summary
from trtllm_memshare.report.real_model_plots import plot_curve, plot_loss_and_recall

ROOT = Path(__file__).resolve().parents[2]
ROWS = read_rows(ROOT / "benchmarks" / "results" / "real_model.jsonl")
RESULTS = ROOT / "benchmarks" / "studies" / "real_model" / "results"
RECALL = read_rows(RESULTS / "recall.jsonl")


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
    assert found["questions"] >= 300  # that the full cache answers
    for row in ROWS:
        if row["arm"] not in ("full", *PRESETS) and row["tokens_per_block"] == 16:
            # The last 128 tokens stay, so a little more than the share is held.
            assert row["min_kept"] <= row["memory_share"] <= row["min_kept"] + 0.08


def test_pictures_have_every_arm_at_its_place(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot_loss_and_recall(ROWS, RECALL, tmp_path / "both.png")
    half = [row for row in ROWS if row.get("tokens_per_block") == 16 and row["arm"] in ("random", "redundancy-k")]
    longer = [{**row, "text": f"longer {row['text']}", "tokens": 10**5} for row in half if row["min_kept"] == 0.5][:6]
    plot_curve([*half, *longer], tmp_path / "curve.png", "a model")
    both, curve = drawn
    asked = {row["arm"] for row in RECALL} - {"full", *PRESETS, ANEW}
    assert len(both.legends[0].texts) == len(asked)
    labelled = {bars.get_label(): bars for bars in both.axes[0].containers}
    random, once = (labelled[name] for name in sorted(labelled) if name.startswith("random pages"))
    assert once.lines[0].get_xydata()[0, 1] == pytest.approx(142 / 329)
    assert random.lines[0].get_xydata().tolist() == [[0.0, pytest.approx(173 / 329)]]
    shown = len({row["text"] for row in longer})
    assert curve.axes[0].get_title() == f"a model on {shown} reasoning texts of 100,000 tokens"
    assert {text.get_text() for text in curve.axes[0].get_legend().texts} == {"random pages", "redundancy of K"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("both.png", "curve.png"))


def test_few_rows_make_a_table_without_rows():
    assert main_table(ROWS[:2]).count("\n") == 1
