"""What requests hold at their floors."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.floors import blocks_at_floors, most_protected, peak_at_floors

SIZE = 8


def at_floor(tokens, prompt=8, kept=0.5, protected=16, size=SIZE):
    return blocks_at_floors(np.array([tokens]), np.array([prompt]), np.array([kept]), protected, size)


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(8, 1), (9, 2), (32, 4), (64, 1 + 4 + 1), (200, 1 + 12 + 1), (72, 1 + 4 + 1)]
)
def test_prompt_what_is_kept_and_the_block_being_written(tokens, blocks):
    assert at_floor(tokens) == blocks


def test_protected_tokens_and_min_kept():
    assert at_floor(200, kept=0.0) == 1 + 3 + 1
    assert at_floor(200, kept=1.0) == 25
    assert at_floor(100 + 30 * 32, prompt=100, kept=0.0, protected=128, size=32) == 4 + 5 + 1
    assert at_floor(34 * 32, prompt=100, protected=0, size=32) == 4 + 15 + 1
    assert at_floor(50, prompt=50, protected=128, size=32) == 2


def test_steps_count_as_the_most_that_they_may_protect():
    def most(tokens, **steps):
        return most_protected(make_config("pressure", protected_tokens=tokens, **steps))

    one_step = {"protected_steps": 1, "max_protected_tokens": 100}
    assert [most(64, protected_steps=0), most(64, **one_step), most(128, **one_step)] == [64, 100, 128]


def test_requests_add_up():
    tokens, prompts, kept = np.array([64, 200]), np.array([8, 8]), np.array([0.5, 0.0])
    assert blocks_at_floors(tokens, prompts, kept, 16, SIZE) == 6 + 5
    none = np.zeros(0, np.int64)
    assert blocks_at_floors(none, none, np.zeros(0), 16, SIZE) == 0


def test_the_peak_is_that_of_the_worst_step():
    """Against every step counted by itself; who starts later ends later, and is there at its full length until then."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 7))
        prompts = rng.integers(1, 60, n)
        tokens, left = prompts + rng.integers(0, 200, n), rng.integers(0, 200, n)
        steps = left + rng.integers(0, 50, n) * rng.integers(0, 2, n)
        kept, free = rng.choice([0.0, 0.5, 0.9, 1.0], n), rng.integers(0, 4, n)
        shared = rng.integers(0, prompts // SIZE + 1)
        worst = max(
            blocks_at_floors(
                (tokens + np.minimum(step, left))[there],
                prompts[there],
                kept[there],
                16,
                SIZE,
                free[there],
                shared[there],
            )
            for step in range(int(steps.max()) + 1)
            for there in [steps >= step]
        )
        assert peak_at_floors(tokens, left, steps, prompts, kept, 16, SIZE, free, shared) == worst


def test_requests_that_end_make_room_for_those_that_grow():
    prompts, kept = np.array([8, 8]), np.ones(2)
    staggered = peak_at_floors(np.array([200, 16]), np.array([8, 192]), np.array([8, 192]), prompts, kept, 0, SIZE)
    assert staggered == 26 + 3  # when the first one ends; both at their longest are 52
    assert peak_at_floors(np.array([200, 16]), np.array([8, 192]), np.array([192, 192]), prompts, kept, 0, SIZE) == 52
