"""What the benchmarks of a device say where something did not run: no figure without its work behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_script import run_script

from benchmarks.gpu import search_timing

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def test_a_row_says_why_it_has_no_reference(monkeypatch):
    pool = search_timing.Pool(search_timing.ModelShape(1, 1, 32, 1e4), torch.float32, 2, 8, "cpu")
    monkeypatch.setattr(search_timing, "_SET_BYTES", 0)
    calls = []

    def fails_at_two_pairs(pool, new_rows, *_):
        calls.append(len(new_rows))
        if len(new_rows) == 2:
            raise RuntimeError("no memory\nmore")

    monkeypatch.setattr(search_timing, "block_distance", fails_at_two_pairs)
    rows = [{"pairs": 1}, {"pairs": 2}, {"pairs": 100}]
    late = iter([False, False, True])
    for _ in search_timing.references(rows, pool, 1, lambda: next(late)):
        pass
    assert rows[2]["reference_us"] > 0
    assert set(calls[:2]) == {64, 36}  # in slices
    assert rows[1] == {"pairs": 2, "no_reference": "RuntimeError: no memory"}
    assert rows[0] == {"pairs": 1, "no_reference": "no time left (--reference-budget-s)"}


def test_models_of_one_shape_are_one_row_of_the_report(tmp_path):
    report = tmp_path / "deep" / "report.json"
    models = ["QwQ-32B", "DeepSeek-R1-Distill-Qwen-32B"]
    options = ["--device", "cpu", "--pairs", "1", "--repeat", "1", "--dtypes", "int8", "--models", *models]
    done = run_script(ROOT / "benchmarks" / "block_search.py", *options, "--output-json", str(report))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(report.read_text())["rows"]
    assert row["model"] == ", ".join(models)
    assert row["read_mb"] == pytest.approx(64 * 2 * 8 * 32 * 128 * 2 / 1e6)
    assert row["reference_us"] > 0
    assert "kernel_us" not in row
    assert [p.name for p in report.parent.iterdir()] == ["report.json"]
