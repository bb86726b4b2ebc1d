"""Stage 1 against a quadratic search, and its list of ready blocks."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.run_matcher import RunMatcher
from trtllm_memshare.search.step_matcher import StepMatcher

SIZE = 16


def feed(matcher, tokens, step):
    for first in range(0, len(tokens), step):
        matcher.append(np.array(tokens[first : first + step], np.int32))
        matcher.ready_blocks()


@pytest.fixture
def repeated_text():
    """A body, a gap, the body at a shift that is no multiple of the block size, and a tail."""
    rng = np.random.default_rng(3)
    body = rng.integers(10, 70, 6 * SIZE)
    return np.concatenate([rng.integers(10, 70, 5), body, rng.integers(10, 70, 21), body, rng.integers(10, 70, 40)])


@pytest.mark.parametrize("step", [1, 3, 16, 500])
def test_every_block_of_a_repeat_is_found_whatever_the_pace(repeated_text, boundaries, step):
    matcher = RunMatcher(make_config("aligned"), SIZE, 1, boundaries)
    feed(matcher, repeated_text, step)
    assert matcher.ready_blocks() == [1, 2, 3, 4, 5]
    shift = 6 * SIZE + 21
    for block in matcher.ready_blocks():
        (positions,) = matcher.counterparts(block)
        assert (positions == np.arange(block * SIZE, (block + 1) * SIZE) + shift).all()


def test_keep_earliest_offers_the_newer_blocks(repeated_text, boundaries):
    matcher = RunMatcher(make_config("aligned", direction="keep-earliest"), SIZE, 1, boundaries)
    feed(matcher, repeated_text, 16)
    shift, ready = 6 * SIZE + 21, matcher.ready_blocks()
    assert ready == [8, 9, 10, 11, 12]
    assert (matcher.counterparts(8)[0] == np.arange(8 * SIZE, 9 * SIZE) - shift).all()


def test_counterparts_hold_equal_tokens_in_long_runs(boundaries):
    """On text with many short repeats, every counterpart is checked against the definition."""
    rng = np.random.default_rng(5)
    phrases = [rng.integers(10, 14, rng.integers(3, 60)) for _ in range(6)]
    tokens = np.concatenate([phrases[i] for i in rng.integers(0, 6, 60)])
    config = make_config("aligned")
    matcher = RunMatcher(config, SIZE, 1, boundaries)
    feed(matcher, tokens, 4)
    ready = matcher.ready_blocks()
    assert ready
    for block in ready:
        old = np.arange(block * SIZE, (block + 1) * SIZE)
        (new,) = matcher.counterparts(block)
        assert (tokens[old] == tokens[new]).all()
        for o, n in zip(old, new, strict=True):
            low, high = 0, 1
            while o - low - 1 >= 0 and tokens[o - low - 1] == tokens[n - low - 1]:
                low += 1
            while n + high < len(tokens) and tokens[o + high] == tokens[n + high]:
                high += 1
            assert low + high >= config.min_run_tokens


def test_a_gap_is_bridged_only_when_allowed(repeated_text, boundaries):
    changed = repeated_text.copy()
    changed[5 + 6 * SIZE + 21 + 40] += 1
    found = {}
    for gap in (0, 1):
        matcher = RunMatcher(make_config("aligned", max_gap_tokens=gap), SIZE, 1, boundaries)
        feed(matcher, changed, 4)
        found[gap] = matcher.ready_blocks()
    block_of_change = (5 + 40) // SIZE
    assert block_of_change in found[1]
    assert block_of_change not in found[0]


def test_settled_blocks_come_back_after_a_pause_only(repeated_text, boundaries):
    matcher = RunMatcher(make_config("aligned"), SIZE, 1, boundaries)
    feed(matcher, repeated_text, 16)
    ready = matcher.ready_blocks()
    for block in ready:
        matcher.settle(block)
    assert matcher.ready_blocks() == []
    matcher.restore(ready[2])
    assert matcher.ready_blocks() == [ready[2]]
    matcher.reopen()
    assert matcher.ready_blocks() == ready


def test_step_matcher_pairs_blocks_of_similar_steps(boundaries):
    rng = np.random.default_rng(2)
    newline = int(np.flatnonzero(boundaries.ends_line)[0])
    step = [*rng.integers(10, 60, 47).tolist(), newline]
    other = [*rng.integers(10, 60, 47).tolist(), newline]
    tokens = [10] * 15 + [newline] + step + other + step + other[:5]
    config = make_config("paper")
    matcher = StepMatcher(config, SIZE, 16, boundaries)
    feed(matcher, tokens, 4)
    assert matcher.ready_blocks() == [7, 8, 9]
    assert [int(p[0]) // SIZE for p in matcher.counterparts(7)] == [1, 2, 3]


@pytest.mark.parametrize(("same", "paired"), [(19, True), (18, False)])
def test_a_cosine_on_the_step_matchers_threshold_counts(boundaries, same, paired):
    newline = int(np.flatnonzero(boundaries.ends_line)[0])
    plain = np.flatnonzero(~boundaries.ends_line & ~boundaries.ends_sentence & ~boundaries.opens_step)
    words = plain[-32:].tolist()
    step = [*words[:24], newline]  # 25 different tokens; with the line end 20 of them, or 19, agree with the other step
    other = [*words[:same], *words[24 : 48 - same], newline]
    matcher = StepMatcher(make_config("paper", min_step_cosine=0.8), 8, 16, boundaries)
    feed(matcher, [10] * 15 + [newline] + step + other + step[:5], 4)
    assert bool(matcher.ready_blocks()) is paired


def test_a_step_that_never_ends_protects_no_more_than_the_cap(boundaries):
    """One word for ever after ordinary text: protection by steps used to hold all of it."""
    config = make_config("aligned", max_protected_tokens=256)
    matcher = RunMatcher(config, SIZE, 1, boundaries)
    feed(matcher, [*np.random.default_rng(3).integers(10, 70, 200), *[20] * 1300], 1)
    assert matcher.protected_from() == 1500 - 256
    assert matcher.ready_blocks()[-1] >= 1500 // SIZE - 3  # so nearly all of the loop can go
    unbounded = RunMatcher(make_config("aligned", max_protected_tokens=10**6), SIZE, 1, boundaries)
    feed(unbounded, [20] * 1500, 100)
    assert unbounded.protected_from() <= 0


@pytest.mark.parametrize("kind", [RunMatcher, StepMatcher])
@pytest.mark.parametrize("seed", range(4))
def test_a_matcher_that_is_not_due_has_nothing_to_offer_and_nothing_is_lost_by_not_asking(boundaries, kind, seed):
    """One is asked after every few tokens, the other only when it is due; steps are found when they are needed."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(10, 70, rng.integers(3, 90)) for _ in range(6)]
    tokens = np.concatenate([phrases[i] for i in rng.integers(0, 6, 40)])
    config = make_config("aligned" if kind is RunMatcher else "paper")
    always, when_due = kind(config, SIZE, 1, boundaries), kind(config, SIZE, 1, boundaries)
    unseen: list[int] = []
    first = 0
    while first < len(tokens):
        some = tokens[first : first + int(rng.integers(1, 20))].astype(np.int32)
        always.append(some)
        unseen += some.tolist()
        first += len(some)
        offered = always.ready_blocks()
        if when_due.is_due(len(unseen)):
            when_due.append(np.array(unseen, np.int32))
            unseen.clear()
            assert when_due.ready_blocks() == offered
            if rng.random() < 0.3:
                assert when_due.protected_from() == always.protected_from()
        else:
            assert not offered
        for block in offered[: int(rng.integers(0, 2))]:
            for matcher in (always, when_due):
                matcher.settle(block)


@pytest.mark.parametrize("at", range(6))
def test_a_look_that_an_error_stopped_begins_anew(boundaries, monkeypatch, at):
    """One token for ever has a run at a shift of one block, longer than what was looked at before the error."""
    rng, works, calls = np.random.default_rng(1), RunMatcher._record, []
    text = np.concatenate([np.full(300, 7), rng.integers(10, 70, 100), np.full(200, 7)]).astype(np.int32)

    def fail(self, first, last):
        calls.append(first)
        if len(calls) == at + 1:
            raise MemoryError
        works(self, first, last)

    monkeypatch.setattr(RunMatcher, "_record", fail)
    matcher = RunMatcher(make_config("pressure"), SIZE, 1, boundaries)
    matcher.append(text)
    with pytest.raises(MemoryError):
        matcher.ready_blocks()
    ready = matcher.ready_blocks()
    assert len(ready) > 20
    for block in ready:
        (positions,) = matcher.counterparts(block)
        assert (text[positions] == text[block * SIZE : (block + 1) * SIZE]).all()
