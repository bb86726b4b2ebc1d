"""What the page on real text rests on: sharing costs less than was asked for, and the model does look back."""

from __future__ import annotations

import json
import math
from pathlib import Path

RESULTS = Path(__file__).parents[3] / "benchmarks" / "studies" / "real_text" / "results"


def test_the_goal_at_the_default_setting_is_held():
    report = json.loads((RESULTS / "real_text_replay.json").read_text())
    (default,) = [a for a in report["arms"] if a["variant"] == "aligned" and not a["overrides"]]
    assert default["perplexity_increase"] < 0.01


def test_the_model_looks_back():
    """A copy costs far less than a guess, and losing what is 128 tokens away costs more than sharing may."""
    report = json.loads((RESULTS / "real_text_curve.json").read_text())
    assert report["copy_loss"] < math.log(2048) / 4
    assert all(a["perplexity_increase"] > 0.01 for a in report["arms"] if a["variant"] == "streaming")
