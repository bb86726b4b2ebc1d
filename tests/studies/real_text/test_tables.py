"""The study on real text: its command on a small scale, and its tables and picture."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.studies.real_text.tables import align
from trtllm_memshare.errors import UserError

ROOT = Path(__file__).parents[3]
FOLDERS = [
    "--traces",
    str(ROOT / "benchmarks" / "data" / "traces"),
    "--model-dir",
    str(ROOT / "benchmarks" / "data" / "trace_model"),
]
SMALL = ["--num-texts", "3", "--max-tokens", "400"]


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("benchmarks.studies.real_text.__main__")


def run(script, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/studies/real_text/__main__.py", *arguments, *FOLDERS])
    script.main()


def test_a_replay_compares_every_arm_with_the_full_cache(script, monkeypatch, tmp_path, capsys):
    """No trace repeats itself in 400 tokens: `aligned` is the full cache, a window of 16 tokens is far from it."""
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    arms = ["--arms", "aligned", "streaming:streaming_window_tokens=16,streaming_sink_tokens=0"]
    run(script, monkeypatch, "replay", *SMALL, *arms, "--output-json", str(report), "--plot", str(plot))
    document = json.loads(report.read_text())
    aligned, streaming = document["arms"]
    assert document["num_scripts"] == document["num_problems"] == 3
    assert aligned["shared_ratio"] == 0
    assert aligned["perplexity_increase"] == pytest.approx(0, abs=1e-6)
    assert streaming["memory_ratio"] < 0.9
    assert streaming["mean_divergence"] > 0.01
    assert streaming["perplexity"] != aligned["perplexity"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == document
    assert any(line.startswith("streaming") and "window_tokens=16" in line for line in printed)


def test_controls_hold_as_much_as_aligned_with_the_same_settings(script, monkeypatch, tmp_path):
    report, short = tmp_path / "report.json", "shingle_tokens=2,min_run_tokens=2,protected_tokens=16,protected_steps=0"
    arms = [f"{name}:{short}" for name in ("aligned", "streaming", "snapkv", "rkv")]
    small = ["--num-texts", "2", "--max-tokens", "600"]
    run(script, monkeypatch, "replay", *small, "--arms", *arms, "--output-json", str(report))
    aligned, *controls = json.loads(report.read_text())["arms"]
    assert aligned["memory_ratio"] < 0.99
    for arm in controls:
        assert arm["memory_ratio"] == pytest.approx(aligned["memory_ratio"], abs=0.02), arm["variant"]
        assert arm["mean_divergence"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "streaming"], r"streaming holds as much as aligned with the same settings, got it without"),
        (["--max-tokens", "20"], r"--max-tokens 20 leaves no room behind a prompt of \d+"),
        (["--arms", "alined"], r"unknown variant alined \(did you mean aligned\?\)"),
    ],
)
def test_errors_of_users(script, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        run(script, monkeypatch, "replay", *SMALL, "--num-texts", "1", *arguments)


def test_tables_align_their_columns():
    assert align([["a", "b"], ["long", "1.5"]]).splitlines() == ["a       b", "---------", "long  1.5"]
