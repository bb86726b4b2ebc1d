"""Schedules without a model: the floor decides how many run."""

from __future__ import annotations

import pytest

from benchmarks.studies.pressure.modelless import serve
from trtllm_memshare.search.steps import BoundaryTokens

TEXTS = BoundaryTokens.from_texts([f"w{i}" for i in range(400)])
REQUESTS = [([7, 8, 9] * 5, [i + (5 * t) % 331 for t in range(400)]) for i in range(6)]


def test_a_pool_with_room_takes_as_many_steps_as_the_longest_request():
    row = serve("full", REQUESTS, TEXTS, 200, 6)
    assert (row["num_steps"], row["paused_requests"], row["peak_blocks"]) == (400, 0, 6 * 26)


def test_how_many_are_in_flight_is_the_mean_over_all_steps():
    """With room each request is there for as many steps as it writes tokens; peaks of a timeline would say more."""
    texts = [([7] * 15, [8] * length) for length in (1500, 200, 700)]
    row = serve("full", texts, TEXTS, 400, 3)
    assert row["num_steps"] == 1500
    assert row["mean_in_flight"] * row["num_steps"] == pytest.approx(1500 + 200 + 700)


@pytest.mark.parametrize("in_flight", [2, 6])
def test_floors_let_more_run_and_fewer_be_paused(in_flight):
    full = serve("full", REQUESTS, TEXTS, 56, in_flight)
    half = serve("pressure:min_kept=0.5,protected_tokens=32", REQUESTS, TEXTS, 57, in_flight)
    assert half["num_steps"] <= full["num_steps"]
    assert half["paused_requests"] <= full["paused_requests"]
    assert full["mean_in_flight"] <= in_flight
    if in_flight == 6:
        assert half["num_steps"] < 0.75 * full["num_steps"]
        assert half["pressure"]["retired_pages"]["needed_least"] > 0
