"""What admission foresees: sizes at floors, peaks just before somebody ends, learned lengths."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_memshare.serving.forecast import Lengths, Prospect, least_blocks, peak_blocks

SIZE = 8


def prospect(tokens, end, prompt=8, kept=0.5, protected=16):
    return Prospect(tokens, prompt, end, kept, protected)


def test_least_blocks_are_prompt_what_is_kept_and_the_one_being_written():
    one = [prospect(8, 200)]
    for tokens, blocks in ((8, 1), (9, 2), (32, 4), (64, 1 + 4 + 1), (200, 1 + 12 + 1), (72, 1 + 4 + 1)):
        assert least_blocks(one, np.array([tokens]), SIZE).tolist() == [blocks]
    assert least_blocks([prospect(8, 200, kept=0.0)], np.array([200]), SIZE).tolist() == [1 + 3 + 1]  # protected
    assert least_blocks([prospect(8, 200, kept=1.0)], np.array([200]), SIZE).tolist() == [25]


def test_the_peak_lies_just_before_somebody_ends():
    old, young = prospect(180, 200, kept=1.0), prospect(8, 200, kept=1.0)
    assert peak_blocks([old, young], SIZE) == 25 + 4  # the old one ends when the young one has 28 tokens
    assert peak_blocks([young, young], SIZE) == 50
    assert peak_blocks([], SIZE) == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(st.integers(9, 100), st.integers(0, 100), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        min_size=1,
        max_size=6,
    )
)
def test_no_step_until_the_end_holds_more_than_the_peak(requests):
    prospects = [prospect(tokens, tokens + more, kept=kept) for tokens, more, kept in requests]
    peak, most = peak_blocks(prospects, SIZE), 0
    for step in range(101):
        there = [p for p in prospects if p.num_tokens + step <= p.end]
        if there:
            most = max(most, int(least_blocks(there, np.array([p.num_tokens + step for p in there]), SIZE).sum()))
    assert peak == most


def test_lengths_are_what_was_asked_for_until_others_have_ended():
    lengths = Lengths()
    for _ in range(7):
        lengths.learn(100)
    assert lengths.expect(10, 2000, SIZE) == 2000
    lengths.learn(150)
    assert 100 <= lengths.expect(10, 2000, SIZE) <= 150
    assert lengths.expect(140, 2000, SIZE) == 140 + 4 * SIZE
    assert lengths.expect(10, 60, SIZE) == 60
