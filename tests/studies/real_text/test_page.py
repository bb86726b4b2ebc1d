"""The page on real text: its tables are those of the committed reports, and what it names exists."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.studies.real_text.tables import copying_table, fidelity_table, reach_table

ROOT = Path(__file__).parents[3]
STUDY = ROOT / "benchmarks" / "studies" / "real_text"
PAGE = (STUDY / "README.md").read_text()
RESULTS = STUDY / "results"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("learning_to_copy", copying_table),
        ("real_text_reach", reach_table),
        ("real_text_replay", fidelity_table),
        ("real_text_curve", fidelity_table),
        ("real_text_small_blocks", fidelity_table),
    ],
)
def test_tables_are_the_committed_reports(name, table):
    (path,) = STUDY.parent.glob(f"*/results/{name}.json")
    for line in table(json.loads(path.read_text())).splitlines():
        assert line in PAGE


def test_named_paths_exist():
    named = re.findall(r"`((?:trtllm_memshare|benchmarks|build_scripts|docs)/[\w./]+)`", PAGE)
    assert len(set(named)) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_training_figures_are_those_of_the_log():
    log = json.loads((ROOT / "benchmarks" / "data" / "trace_model" / "training_log.json").read_text())
    kept = next(e for e in log["log"] if e["step"] == log["kept_step"])
    assert f"{log['tokens']['train']:,} tokens" in PAGE
    assert f"step {log['kept_step']} of {log['config']['num_steps']}" in PAGE
    assert f"{kept['validation_loss']:.2f} nats" in PAGE


def test_the_goal_at_the_default_setting_is_held_against_the_report():
    report = json.loads((RESULTS / "real_text_replay.json").read_text())
    (default,) = [a for a in report["arms"] if a["variant"] == "aligned" and not a["overrides"]]
    assert default["perplexity_increase"] < 0.01
    assert f"{100 * default['perplexity_increase']:+.3f} %" in PAGE


def test_the_page_says_how_far_the_model_looks_back():
    """A copy costs far less than a guess, and losing what is 128 tokens away costs more than sharing may."""
    report = json.loads((RESULTS / "real_text_curve.json").read_text())
    assert report["copy_loss"] < math.log(2048) / 4
    assert f"{report['copy_loss']:.2f} nats" in PAGE
    windows = {a["overrides"]: a["perplexity_increase"] for a in report["arms"] if a["variant"] == "streaming"}
    for increase in windows.values():
        assert increase > 0.01
        assert f"{100 * increase:.1f} %" in PAGE


@pytest.mark.parametrize("name", ["real_text_replay", "real_text_small_blocks"])
def test_differences_between_arms_are_those_of_the_texts(name):
    """`aligned` less each control at runs of 4, paired by text: mean and standard error in 0.01 nats."""
    arms = json.loads((RESULTS / f"{name}.json").read_text())["arms"]
    changes = {a["variant"]: a["loss_change_by_text"] for a in arms if a["overrides"].startswith("shingle_tokens=4")}
    aligned = changes.pop("aligned")
    for control in ("drop-duplicate", "random", "streaming"):
        pairs = [100 * (a - c) for a, c in zip(aligned, changes[control], strict=True)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        assert f"{statistics.mean(pairs):+.2f} ({error:.2f})" in PAGE, control
