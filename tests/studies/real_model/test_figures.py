"""Figures of facts stated once: what one arm answers alone, and whether that can be chance."""

from __future__ import annotations

import pytest

from benchmarks.studies.real_model.figures import (
    beside_short,
    compared,
    corrected_p,
    gained,
    loss_in_pages,
    lost,
    num_compared,
    ratio_bound,
    recall_p,
    recalled_behind,
    recalled_in_pages,
    unseen,
    within,
)
from trtllm_memshare.report.real_model import distance_table


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


def test_facts_are_counted_by_how_far_back_they_stood():
    asked = {"full": (True, True, True, False), "new": (True, True, False, True)}
    rows = [
        {
            "text": "a",
            "arm": arm,
            "min_kept": 0.5,
            "tokens": 4096,
            "questions": [
                {"kind": "code", "pages_kept": 1.0, "distance": distance, "right": is_right}
                for distance, is_right in zip((1000, 1001, 4000, 4001), right, strict=True)
            ],
        }
        for arm, right in asked.items()
    ]
    assert recalled_behind(rows, "new", 1000) == "1 of 2"
    assert recalled_behind(rows, "new", 500) == "2 of 3"
    table = distance_table([{**row, "arm": {"new": "random"}.get(row["arm"], row["arm"])} for row in rows])
    assert table.splitlines()[0] == "| what goes | to 1024 | to 4096 |"  # by quarters that have a question
    assert table.splitlines()[-1] == "| random pages | 2/2 | 0/1 |"


def replayed(problem: str, arm: str, loss: float, by_position: dict | None = None, tokens: int = 4096) -> dict:
    of_setting = {"min_kept": 0.5, "tokens_per_block": 16, "tokens": tokens, "memory_share": 0.5}
    measured = {"loss_change": loss, "divergence": loss, "agreement": 0.9, "by_position": by_position}
    return {"text": problem, "problem": problem, "arm": arm, **of_setting, **measured}


def test_longer_pages_are_held_against_short_ones_in_the_same_texts():
    def asked(text, arm, size, *right):
        more = {"kind": "code", "pages_kept": 1.0, "distance": 9}
        questions = [{"right": r, **more} for r in right]
        return {"text": text, "arm": arm, "min_kept": 0.5, "tokens_per_block": size, "questions": questions}

    short = [asked("a", "full", 16, True, True, False), asked("a", "new", 16, True, True, True)]
    short += [asked("b", "full", 16, True), asked("b", "new", 16, True)]
    long = [asked("a", "new", 544, False, True, True)]
    assert recalled_in_pages([short, long], "new", 544) == "1 of 2"
    assert recalled_in_pages([short, long], "new", 16) == "2 of 2"


def test_the_loss_of_longer_pages_is_that_of_their_own_texts():
    def lost_in(text, size, change):
        return {"text": text, "arm": "new", "min_kept": 0.5, "tokens": 4096, "tokens_per_block": size,
                "loss_change": change}  # fmt: skip

    short = [lost_in("a", 16, 0.25), lost_in("b", 16, 0.75), lost_in("c", 16, 9.0)]
    long = [lost_in("a", 544, 0.5), lost_in("b", 544, 0.0)]
    assert [loss_in_pages([short, long], "new", size) for size in (16, 544)] == [0.5, 0.25]


def test_problems_that_chose_a_weight_are_left_out_of_what_it_is_judged_on():
    study = [replayed("seen", "random-once", 0.1, tokens=2048), replayed("new", "random", 0.1, tokens=2048)]
    losses = {"seen": 0.0, "new": 0.03, "newer": 0.05}
    longer = [replayed(p, arm, loss if arm == "a" else 0.1) for p, loss in losses.items() for arm in ("a", "random")]
    assert unseen([study, longer], "ratio", "a", 4096) == pytest.approx(0.4)
    assert unseen([study, longer], "texts", "a", 4096) == 2


def test_a_part_of_a_text_is_held_against_an_earlier_part_of_the_same():
    parts = {"0": [9.0, 256], "512": [0.1 * 256, 256], "1792": [0.3 * 768, 768], "2048": [0.05 * 256, 256]}
    rows = [replayed(str(i), "random", 0.1, parts) for i in range(12)]
    assert within(rows, "early", "random", 4096) == pytest.approx(0.25)
    assert within(rows, "late", "random", 4096) == pytest.approx(0.05)
    assert within(rows, "p", "random", 4096) < 0.002


def test_longer_texts_are_held_against_the_same_texts_at_the_study_s_length():
    short = [replayed(name, "a", 0.2, tokens=2048) for name in ("x", "y", "alone")]
    longer = [replayed(name, "a", 0.1) for name in ("x", "y")]
    assert beside_short([short, longer], "difference", "a", 4096) == pytest.approx(-0.1)
    assert beside_short([short, longer], "texts", "a", 4096) == 2


def test_a_ratio_lies_within_its_bounds_which_take_texts_of_one_problem_together():
    rows = [replayed(str(i), "random", 1.0) for i in range(12)]
    rows += [replayed(str(i), "snapkv", 0.5 + 0.1 * (i % 5)) for i in range(12)]
    low, high = (ratio_bound(rows, bound, "snapkv", tokens=4096) for bound in ("low", "high"))
    assert low < compared(rows, "ratio", "snapkv", tokens=4096) < high
    again = [{**row, "text": row["text"] + " again"} for row in rows]
    for bound, value in (("low", low), ("high", high)):
        assert ratio_bound(rows + again, bound, "snapkv", tokens=4096) == pytest.approx(value)


def test_each_of_several_comparisons_with_random_pages_counts_for_its_correction():
    rows = [replayed(str(i), "random", 1.0, tokens=2048) for i in range(12)]
    rows += [replayed(str(i), "snapkv", 0.5, tokens=2048) for i in range(12)]
    alone = corrected_p(rows, "snapkv")
    rows += [
        replayed(str(i), arm, 1.0 + 0.1 * (-1) ** i, tokens=2048) for i in range(12) for arm in ("rkv", "streaming")
    ]
    assert (num_compared(rows), alone) == (3, compared(rows, "p", "snapkv"))
    assert corrected_p(rows, "snapkv") == pytest.approx(3 * alone)
    assert corrected_p(rows, "rkv") == 1.0
