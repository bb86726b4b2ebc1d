"""Surprisal is added up in bulk; page by page it comes to what a loop over tokens gives."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict

import numpy as np
import pytest
import torch

from trtllm_memshare.serving.page_surprisal import _MOST_STEPS, PageSurprisal
from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams

SIZE = 4


def state(request_id, num_prompt_tokens):
    return RequestState(request_id, [1], SamplingParams(), RequestHandle(request_id), tokens=[1] * num_prompt_tokens)


class Loop:
    """The same token by token."""

    def __init__(self):
        self.sums = defaultdict(float)

    def note(self, states, log_probs):
        for one, log_prob in zip(states, log_probs.tolist(), strict=True):
            self.sums[one.request_id, len(one.tokens) // SIZE] -= log_prob

    def of(self, request_id, pages):
        return [self.sums[request_id, page] for page in pages.tolist()]


def assert_equal(surprisal, loop, request_id, num_tokens):
    surprisal.catch_up()
    pages = np.arange(num_tokens // SIZE + 3, dtype=np.int32)  # some that nobody has written yet
    np.testing.assert_allclose(surprisal.of(request_id, pages), loop.of(request_id, pages), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_a_loop_over_tokens_gives(seed):
    """Requests come, pause, come back and end; a step now and then is left out by an error, as ``Pressure`` does."""
    rng, surprisal, loop = np.random.default_rng(seed), PageSurprisal(SIZE), Loop()
    running, paused, names = [state(0, 3)], [], iter(range(1, 1000))
    for _ in range(6 * _MOST_STEPS):
        if rng.random() < 0.1:
            running.append(state(next(names), int(rng.integers(1, 30))))
        if paused and rng.random() < 0.1:
            running.append(paused.pop())
        if len(running) > 1 and rng.random() < 0.05:
            paused.append(running.pop(int(rng.integers(len(running)))))
        if len(running) > 1 and rng.random() < 0.05:
            surprisal.forget(running.pop(0).request_id)
        complete = [one for one in running if rng.random() < 0.97] if rng.random() < 0.1 else list(running)
        log_probs = torch.from_numpy(-rng.exponential(2.0, len(complete)).astype(np.float32))
        if rng.random() < 0.95:
            surprisal.note(complete, log_probs)
            loop.note(complete, log_probs)
        for one in complete:
            one.tokens.append(1)
        if rng.random() < 0.1:
            one = running[int(rng.integers(len(running)))]
            assert_equal(surprisal, loop, one.request_id, len(one.tokens))
    for one in [*running, *paused]:
        assert_equal(surprisal, loop, one.request_id, len(one.tokens))


def test_a_request_that_ended_is_not_remembered_by_the_steps_before():
    surprisal, one, other = PageSurprisal(SIZE), state(0, 2), state(1, 2)
    surprisal.note([one, other], torch.tensor([-1.0, -3.0]))
    surprisal.forget(0)
    surprisal.catch_up()
    assert [surprisal.of(name, np.array([0])).tolist() for name in (0, 1)] == [[0.0], [3.0]]


def test_after_the_last_request_nothing_holds_it():
    surprisal, one = PageSurprisal(SIZE), state(0, 2)
    surprisal.note([one], torch.tensor([-1.0]))
    alive = weakref.ref(one.handle)
    surprisal.forget(0)
    del one
    gc.collect()
    assert alive() is None


def test_what_an_error_keeps_from_being_added_up_is_added_up_later(monkeypatch):
    surprisal, one = PageSurprisal(SIZE), state(0, 0)
    surprisal.note([one], torch.tensor([-1.0]))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "stack", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            surprisal.catch_up()
    for _ in range(2):
        surprisal.catch_up()
        assert surprisal.of(0, np.array([0])).tolist() == [1.0]


def test_pages_whose_row_an_error_lost_are_unknown_and_nothing_counts_twice(monkeypatch):
    """A page of which nothing is known ranks as a middling one, not as one that nobody was surprised by."""
    surprisal, one = PageSurprisal(SIZE), state(0, 0)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "stack", lambda *_: 1 / 0)
        for _ in range(_MOST_STEPS):
            surprisal.note([one], torch.tensor([-1.0]))
            one.tokens.append(1)
        with pytest.raises(ZeroDivisionError):
            surprisal.note([one], torch.tensor([-1.0]))
    one.tokens += [1] * SIZE
    surprisal.note([one], torch.tensor([-4.0]))
    surprisal.catch_up()
    lost = _MOST_STEPS // SIZE
    found = surprisal.of(0, np.arange(lost + 3))
    assert np.isnan(found[: lost + 1]).all()  # the step that found the row full is lost with it
    assert found[lost + 1 :].tolist() == [4.0, 0.0]


def test_a_step_that_completes_nobody_changes_nothing():
    """All that it has are chunks of contexts that go on."""
    surprisal, one = PageSurprisal(SIZE), state(0, 0)
    for _ in range(2):
        surprisal.note([], torch.zeros(0))
        surprisal.note([one], torch.tensor([-1.0]))
        one.tokens.append(1)
    surprisal.catch_up()
    assert surprisal.of(0, np.arange(2)).tolist() == [2.0, 0.0]


def test_a_step_that_was_left_out_is_seen_by_any_request():
    """One pauses, a step of the other is lost, and the same two go on: the first one's length fits."""
    surprisal, one, other = PageSurprisal(SIZE), state(0, 0), state(1, 0)
    surprisal.note([one, other], torch.tensor([-1.0, -1.0]))
    one.tokens.append(1)
    other.tokens += [1] * (SIZE + 1)
    surprisal.note([one, other], torch.tensor([-1.0, -7.0]))
    surprisal.catch_up()
    assert surprisal.of(1, np.arange(2)).tolist() == [1.0, 7.0]


def test_log_probabilities_of_other_requests_are_refused():
    with pytest.raises(ValueError, match="1 requests need as many log-probabilities, got 2"):
        PageSurprisal(SIZE).note([state(0, 0)], torch.zeros(2))


def test_steps_are_not_kept_for_ever():
    surprisal, one = PageSurprisal(SIZE), state(0, 0)
    for _ in range(3 * _MOST_STEPS):
        surprisal.note([one], torch.tensor([-1.0]))
        one.tokens.append(1)
        assert len(surprisal._steps) <= _MOST_STEPS


def test_another_request_of_that_length_does_not_go_on_with_the_row():
    surprisal, one, other = PageSurprisal(SIZE), state(0, 1), state(1, 2)
    surprisal.note([one], torch.tensor([-1.0]))
    surprisal.note([other], torch.tensor([-7.0]))
    surprisal.catch_up()
    assert [surprisal.of(name, np.array([0])).tolist() for name in (0, 1)] == [[1.0], [7.0]]


@pytest.mark.parametrize("num_tokens", [2 * SIZE, 3 * SIZE - 1])
def test_a_lost_token_leaves_its_page_unknown_and_no_other(num_tokens):
    surprisal = PageSurprisal(SIZE)
    surprisal.lose([state(0, num_tokens)])
    assert np.isnan(surprisal.of(0, np.arange(4))).tolist() == [False, False, True, False]
