"""Rows to results: pairing by text, means by problem, p-values, a choice that has not seen what it is judged on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trtllm_memshare.evaluation.page_table import Setting, compare, leave_one_out, loss_by_position, recall, select
from trtllm_memshare.evaluation.real_rows import RowFile, read_rows
from trtllm_memshare.evaluation.statistics import sign_flip, standard_error


def row(text, arm, loss, problem=None, **more):
    return {
        "text": text,
        "arm": arm,
        "problem": problem or text,
        "model": "m",
        "min_kept": 0.5,
        "tokens_per_block": 16,
        "tokens": 2048,
        "loss_change": loss,
        "divergence": loss / 2,
        "agreement": 0.9,
        "memory_share": 0.5,
        "by_position": {"0": [loss * 10, 10], "256": [0.0, 30]},
        **more,
    }


ROWS = [
    *(row(f"t{i}", "random", 0.10 + i / 100) for i in range(4)),
    *(row(f"t{i}", "redundancy-k", 0.08 + i / 100) for i in range(4)),
    *(row(f"t{i}", "attention-redundancy", 0.11 - i / 100) for i in range(4)),
    row("other", "redundancy-k", 9.0),  # without a partner
    row("t0", "redundancy-k", 9.0, min_kept=0.25),
]


def test_arms_are_paired_by_text_and_setting():
    found = compare(ROWS, "redundancy-k")
    assert found is not None
    assert (found.texts, found.problems) == (4, 4)
    assert found.difference == pytest.approx(-0.02)
    assert found.difference_error == pytest.approx(0.0, abs=1e-12)
    assert found.ratio == pytest.approx(0.095 / 0.115)
    assert found.p == pytest.approx(2 / 16)
    assert compare(ROWS, "redundancy-k", setting=Setting(0.25)) is None
    assert len(select(ROWS, "redundancy-k")) == 5


def test_texts_of_one_problem_count_once():
    rows = [
        row("a", "random", 0.1, "p"), row("b", "random", 0.1, "p"), row("c", "random", 0.1, "q"),
        row("a", "redundancy-k", 0.2, "p"), row("b", "redundancy-k", 0.2, "p"), row("c", "redundancy-k", 0.0, "q"),
    ]  # fmt: skip
    found = compare(rows, "redundancy-k")
    assert found is not None
    assert (found.texts, found.problems) == (3, 2)
    assert found.difference == pytest.approx(0.0)  # +0.1 and -0.1; by text it would be +0.033
    assert found.difference_error == pytest.approx(0.1)


def test_the_choice_is_judged_on_the_problem_it_has_not_seen():
    # On each three of four problems the arm that is best there is the worse one on the fourth.
    rows = [*(row(f"t{i}", "random", 1.0) for i in range(3))]
    for i in range(3):
        rows.append(row(f"t{i}", "redundancy-k", 0.1 if i == 0 else 0.9))
        rows.append(row(f"t{i}", "attention-redundancy", 0.8 if i == 0 else 0.5))
    found = leave_one_out(rows, ["redundancy-k", "attention-redundancy"])
    assert found is not None
    comparison, chosen = found
    assert chosen == {"attention-redundancy": 1, "redundancy-k": 2}
    assert comparison.loss_change == pytest.approx((0.8 + 0.9 + 0.9) / 3)
    assert leave_one_out(rows[:2], ["redundancy-k"]) is None


def test_loss_by_position_weighs_tokens():
    assert loss_by_position([row("a", "x", 1.0), row("b", "x", 3.0)]) == {0: 2.0, 256: 0.0}


def question(kind, right, distance=300, kept=1.0):
    return {"kind": kind, "right": right, "distance": distance, "pages_kept": kept}


def test_recall_counts_what_the_full_cache_answers():
    def rows(arm, flags):
        return {"text": "t", "arm": arm, "min_kept": 0.5, "questions": [question(*f) for f in flags]}

    kinds = [("code", 300), ("name", 900), ("name", 500), ("place", 700)]
    made = [
        rows("full", [(k, i < 3, d) for i, (k, d) in enumerate(kinds)]),
        rows("random", [(k, i == 0 or i == 3, d) for i, (k, d) in enumerate(kinds)]),
        rows("redundancy-k", [(k, True, d) for k, d in kinds]),
    ]
    found = {r.arm: r for r in recall(made)}
    assert (found["random"].right, found["random"].asked) == (1, 3)  # the fourth is not asked
    assert (found["redundancy-k"].right, found["redundancy-k"].by_kind["name"]) == (3, (2, 2))
    assert found["redundancy-k"].by_distance == {400: (1, 1), 600: (1, 1), 1100: (1, 1)}
    assert found["redundancy-k"].p == pytest.approx(0.5)
    assert found["random"].p is None


def test_sign_flips():
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.25)
    assert sign_flip(np.array([1.0, -1.0])) == 1.0
    assert sign_flip(np.random.default_rng(3).random(10) * 1e4 + 0.1) == 2 / 1024  # large ones, whose sums are rounded
    assert math.isnan(sign_flip(np.array([1.0, np.nan])))
    many = np.random.default_rng(0).normal(0.0, 1.0, 40)
    assert sign_flip(many + 1.0) < 0.001
    slight = many - many.mean() + 0.17
    z = slight.mean() / standard_error(slight)
    assert sign_flip(slight) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert math.isnan(standard_error(np.array([1.0])))


def test_rows_are_found_again_and_a_torn_line_is_passed_over(tmp_path):
    path = tmp_path / "rows" / "table.jsonl"
    rows = RowFile(path)
    rows.add(row("a", "random", 0.1))
    rows.add(row("a", "random", 0.2), unless_there=True)
    with path.open("a") as file:
        file.write('{"text": "b", "ar')
    again = RowFile(path)
    assert row("a", "random", 0.5) in again
    assert row("b", "random", 0.5) not in again
    assert [r["loss_change"] for r in read_rows(path)] == [0.1]
    again.add(row("b", "random", 0.3))
    assert [r["loss_change"] for r in read_rows(path)] == [0.1, 0.3]
