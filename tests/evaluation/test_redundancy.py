"""Redundancy measures on cases worked by hand, and the published figures of the committed traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nightly import at_night

from trtllm_memshare.evaluation.redundancy import (
    best_block_agreement,
    best_earlier_cosine,
    measure,
    windows_seen_before,
    words_in_repeats,
)

DIGITS = (1, 1, 1, 1, 3, 3, 3, 2, 2, 2, 2, 2)  # to which the ratios below are documented, in percent
TRACES = Path(__file__).parents[2] / "benchmarks" / "data" / "traces"


def test_cosine_of_bags_ignores_order_but_not_counts():
    best = best_earlier_cosine([["a", "b"], ["b", "a"], ["a", "a"], ["c"]])
    np.testing.assert_allclose(best, [0, 1, 1 / np.sqrt(2), 0], atol=1e-6)


def test_a_cosine_on_a_threshold_is_the_same_number_whatever_the_counts():
    for times in range(1, 40):  # 9 of 10 words agree: the cosine is 0.9, which is not over 0.9
        step = [f"w{i}" for i in range(10)] * times
        other = [w if w != "w0" else "else" for w in step]
        assert best_earlier_cosine([step, other])[1] == 0.9


def test_windows_and_cover():
    ids = np.array([1, 2, 3, 4, 9, 1, 2, 3, 4])
    assert windows_seen_before(ids, 4).tolist() == [False] * 5 + [True]
    assert words_in_repeats(ids, 4) == 4
    assert words_in_repeats(np.array([5] * 7), 4) == 0  # every earlier copy overlaps
    assert words_in_repeats(np.array([5] * 8), 4) == 4
    assert windows_seen_before(ids, 10).size == 0


def test_block_agreement_by_phase():
    ids = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 4, 5, 99])
    assert best_block_agreement(ids, 4, "any").tolist() == [0, 0, 0, 0.75]
    assert best_block_agreement(ids, 4, "same").tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("r1_math500", (1350, 108, 8.9, 4.2, 7.3, 2.4, 1.459, 0.165, 0.0, 4.18, 0.68, 0.0, 0.79, 3.25)),
        at_night("r1_aime24", (6675, 475, 10.2, 4.4, 9.4, 3.1, 2.044, 0.270, 0.039, 5.92, 0.97, 0.16, 0.92, 4.80)),
    ],
)
def test_the_traces_measure_as_documented(name, expected):
    rows = (TRACES / f"{name}.jsonl").read_text().splitlines()
    m = measure([json.loads(row)["reasoning"] for row in rows])
    ratios = [m.steps_over[0.8], m.steps_over[0.9], m.words_in_steps_over[0.8], m.words_in_steps_over[0.9]]
    ratios += [*m.windows_seen.values(), *m.words_covered.values(), m.near_blocks_same, m.near_blocks_any]
    assert (round(m.words_per_text), int(m.steps_per_text)) == expected[:2]
    assert [round(100 * r, digits) for r, digits in zip(ratios, DIGITS, strict=True)] == list(expected[2:])


@pytest.mark.parametrize("texts", [[], ["a", " \n"]])
def test_nothing_to_measure_is_an_error(texts):
    with pytest.raises(ValueError, match="at least one word, got"):
        measure(texts)


def test_short_texts_have_no_windows():
    m = measure(["a b c\n\nc b A", "a b c"])
    assert (m.num_texts, m.words_per_text, m.steps_per_text) == (2, 4.5, 1.5)
    assert m.steps_over == {0.8: 1 / 3, 0.9: 1 / 3}  # the third step repeats another text
    assert m.words_in_steps_over == {0.8: 3 / 9, 0.9: 3 / 9}
    assert m.windows_seen == m.words_covered == {8: 0.0, 16: 0.0, 32: 0.0}
    assert (m.near_blocks_same, m.near_blocks_any) == (0.0, 0.0)


def test_repeats_of_another_text_do_not_count():
    text = " ".join(f"w{i}" for i in range(40))
    m = measure([text, text])
    assert set(m.windows_seen.values()) == {0.0}
    assert (m.near_blocks_any, m.steps_over[0.8]) == (0.0, 0.0)
