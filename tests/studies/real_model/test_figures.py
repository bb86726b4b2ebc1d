"""Figures of facts stated once: what one arm answers alone, and whether that can be chance."""

from __future__ import annotations

import pytest

from benchmarks.studies.real_model.figures import gained, lost, recall_p


def row(text: str, arm: str, *right: bool) -> dict:
    return {"text": text, "arm": arm, "min_kept": 0.5, "questions": [{"right": r} for r in right]}


ROWS = [
    row("a", "full", True, True, False),
    row("a", "new", True, True, True),  # the third the full cache does not know
    row("a", "old", False, True, False),
    row("b", "full", True, True, True),
    row("b", "new", False, True, True),
    row("b", "old", True, False, False),
    row("c", "full", True),
    row("c", "new", True),  # nothing to hold it against
]


def test_only_questions_that_both_arms_were_asked_and_the_full_cache_answers_count():
    assert (gained(ROWS, "new", "old"), lost(ROWS, "new", "old")) == (3, 1)
    assert (gained(ROWS, "old", "new"), lost(ROWS, "old", "new")) == (1, 3)


def test_texts_are_what_is_drawn():
    many = [row(str(i), arm, *[arm != "old"] * 5) for i in range(12) for arm in ("full", "new", "old")]
    assert recall_p(many, "new", "old") < 0.002
    one = [row("a", arm, *[arm != "old"] * 60) for arm in ("full", "new", "old")]
    assert recall_p(one, "new", "old") == pytest.approx(1.0)
