"""The study on real text: its command on a small scale, and its tables and picture."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks.studies.real_text.study import memory_of_aligned
from benchmarks.studies.real_text.tables import align
from trtllm_memshare.errors import UserError

ROOT = Path(__file__).parents[3]
FOLDERS = [
    "--traces",
    str(ROOT / "benchmarks" / "data" / "traces"),
    "--model-dir",
    str(ROOT / "benchmarks" / "data" / "trace_model"),
]
SMALL = ["--num-texts", "2", "--max-tokens", "400"]


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
    assert document["num_scripts"] == document["num_problems"] == 2
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


def test_reach_is_pooled_over_the_traces_of_a_source(script, monkeypatch, tmp_path, capsys):
    """One trace repeats a passage, the rest do not: settings that take runs of 4 reach it in its source alone."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rng = random.Random(1)
    plain = [" ".join(rng.choices(words, k=150)) for _ in range(18)]
    passage = " ".join(rng.choices(words, k=40)) + ".\n\n"
    plain[0] = passage * 8
    for source, texts in (("r1_aime24", plain[:12]), ("r1_math500", plain[12:])):
        rows = [{"id": i, "problem": f"{source} {i}", "reasoning": t, "content": "4"} for i, t in enumerate(texts)]
        (tmp_path / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = tmp_path / "reach.json"
    monkeypatch.setattr(
        sys, "argv", ["real_text", "reach", "--tokens-per-block", "8", "16", "--output-json", str(report), *FOLDERS[2:],
                      "--traces", str(tmp_path)]
    )  # fmt: skip
    script.main()
    document = json.loads(report.read_text())
    assert document["num_traces"] == {"r1_aime24": 12, "r1_math500": 6}
    rows = {row["settings"]: row for row in document["rows"]}
    found = rows["aligned min_run_tokens=16,max_gap_tokens=0"]
    for size in ("8", "16"):
        counts = found["traces"][size]
        assert counts["shared_blocks"][0] > 0
        pooled = sum(counts["shared_blocks"][:12]) / sum(counts["generated_blocks"][:12])
        assert found["ratio"]["r1_aime24"][size] == pytest.approx(pooled)
    assert rows["aligned"]["ratio"]["r1_math500"]["16"] == 0
    assert "16k" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "held"),
    [("", 10.0), ("streaming_window_tokens=8", 10.0), ("max_gap_tokens=2,budget=share", 20.0)],
)
def test_a_control_is_given_what_aligned_held_with_the_settings_they_have_in_common(overrides, held):
    assert memory_of_aligned({"": 10.0, "max_gap_tokens=2": 20.0}, "streaming", overrides) == held
