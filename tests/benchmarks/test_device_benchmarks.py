"""What the benchmarks of a device say where something did not run: no figure without its work behind it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import search_timing
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.config import make_config

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


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
    command = ["-m", "benchmarks.block_search", "--device", "cpu", "--pairs", "1", "--repeat", "1", "--dtypes", "int8"]
    subprocess.run(
        [sys.executable, *command, "--models", *models, "--output-json", report],
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    (row,) = json.loads(report.read_text())["rows"]
    assert row["model"] == ", ".join(models)
    assert row["read_mb"] == pytest.approx(64 * 2 * 8 * 32 * 128 * 2 / 1e6)
    assert row["reference_us"] > 0
    assert "kernel_us" not in row
    assert [p.name for p in report.parent.iterdir()] == ["report.json"]


FIGURES = {"search_time_fraction": 0.0, "shared_block_fraction": 0.0, "mean_used_blocks": 1.0, "peak_used_blocks": 1,
           "step_ms_last_tenth": 1.0}  # fmt: skip


def entry(step_ms: float, pairs: int) -> dict:
    return {"step_ms_mean": step_ms, "pairs_compared": pairs, **FIGURES}


def test_a_cost_is_the_median_of_rounds_and_absent_where_nothing_was_compared(script):
    summarize = script("trace_replay").summarize
    rounds = [
        {"off": entry(off, 0), "shadow": entry(off * 1.5, 0), "full-searches": entry(full, 640)}
        for off, full in ((10, 11), (20, 20.2), (10, 10.5))
    ]
    rows = summarize(rounds)
    assert rows["shadow"]["over_off"] is None
    assert rows["shadow"]["no_over_off"] == "no pair was compared"
    assert rows["full-searches"]["over_off"] == pytest.approx(0.05)
    assert rows["full-searches"]["over_off_range"] == pytest.approx([0.01, 0.1])
    assert rows["full-searches"]["step_ms_mean"] == 11
    assert rows["off"]["over_off"] is None
    assert [line.split()[2] for line in script("trace_replay").table(rows).splitlines()[1:]] == ["-", "-", "+5.0%"]


def test_full_searches_compare_max_pairs_whatever_the_text_holds(script, boundaries, monkeypatch):
    trace_replay = script("trace_replay")
    monkeypatch.setattr(trace_replay, "_PROMPT_TOKENS", 8)
    runner = TorchRunner(trace_replay.make_model(trace_replay.SHAPES["small"], 96, "cpu"), 16, 8)
    rng = np.random.default_rng(0)
    scripts = [rng.permutation(60)[:40].astype(np.int32) for _ in range(2)]
    shadow = trace_replay.replay(runner, "shadow", boundaries, scripts)
    full = trace_replay.replay(runner, "full-searches", boundaries, scripts)
    assert shadow["pairs_compared"] == 0
    config = make_config("aligned")
    # One step for the prompts, 31 more; the first search, at step 0, finds no full block.
    assert full["pairs_compared"] == config.max_pairs * (32 // config.search_interval)
    assert full["candidates"] == full["shared_block_fraction"] == 0


@pytest.mark.parametrize("variant", ["half-dropped", "half-null"])
def test_every_second_generated_page_is_forgotten(script, boundaries, monkeypatch, variant):
    """48 tokens, of which 32 are generated: four full pages of eight, of which two go."""
    trace_replay = script("trace_replay")
    monkeypatch.setattr(trace_replay, "_PROMPT_TOKENS", 8)
    model = trace_replay.make_model(trace_replay.SHAPES["small"], 96, "cpu")
    runner = TorchRunner(model, 17, 8, null_page_set=trace_replay.zero_null_page(model.config, 96))
    rng = np.random.default_rng(0)
    scripts = [rng.permutation(60)[:48].astype(np.int32) for _ in range(2)]
    found = {name: trace_replay.replay(runner, name, boundaries, scripts) for name in ("off", variant)}
    assert found["off"]["peak_used_blocks"] == 12
    assert found[variant]["peak_used_blocks"] == 8
    assert found[variant]["pairs_compared"] == 0
    assert trace_replay.summarize([found])[variant]["over_off"] is not None
