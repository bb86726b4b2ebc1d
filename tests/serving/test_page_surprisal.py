"""Surprisal is added up in bulk; page by page it comes to what a loop over tokens gives."""

from __future__ import annotations

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
    surprisal, one = PageSurprisal(SIZE), state(0, 2)
    surprisal.note([one], torch.tensor([-1.0]))
    surprisal.forget(0)
    assert surprisal.of(0, np.array([0])).tolist() == [0.0]


def test_an_error_counts_nothing_twice():
    surprisal, one = PageSurprisal(SIZE), state(0, 0)
    surprisal.note([one], torch.tensor([-1.0]))
    one.tokens.append(1)
    surprisal.note([one], torch.tensor([-1.0, -1.0]))  # does not stack with the one before
    with pytest.raises(RuntimeError):
        surprisal.of(0, np.array([0]))
    one.tokens.append(1)
    surprisal.note([one], torch.tensor([-4.0]))
    assert surprisal.of(0, np.array([0])).tolist() == [4.0]
    assert surprisal.of(0, np.array([0])).tolist() == [4.0]


def test_steps_are_not_kept_for_ever():
    surprisal, one = PageSurprisal(SIZE), state(0, 0)
    for _ in range(3 * _MOST_STEPS):
        surprisal.note([one], torch.tensor([-1.0]))
        one.tokens.append(1)
        assert len(surprisal._steps) <= _MOST_STEPS
