"""A loop inside a text: what goes are pages of the loop, and nothing changes before one of them went."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.evaluation.loop_study import PAGE_TOKENS, measure_loop
from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens

BEFORE, LOOP, AFTER = 4 * PAGE_TOKENS, 16 * PAGE_TOKENS, 2 * PAGE_TOKENS
IDS = np.random.default_rng(3).integers(4, 60, BEFORE + AFTER).tolist()


@pytest.fixture(scope="module")
def replay(tiny_checkpoint) -> MaskedReplay:
    return MaskedReplay(tiny_checkpoint)


def measured(replay: MaskedReplay, passage: list[int], loop: int = LOOP, **changes: object) -> dict[str, float]:
    boundaries = BoundaryTokens.from_texts(
        ["\n\n" if i == 41 else f"t{i}" for i in range(replay.model.config.vocab_size)]
    )
    return measure_loop(replay, IDS, 8, passage, boundaries, make_config("aligned", **changes), BEFORE, loop)


def test_memory_stays_behind_what_a_loop_writes_and_the_text_before_is_untouched(replay):
    found = measured(replay, list(range(10, 42)))
    assert (found["passage_tokens"], found["pages_before"], found["pages_written_in_loop"]) == (32, 4, 16)
    assert found["pages_held_at_its_end"] < 4 + 16
    assert found["pages_held_halfway"] <= found["pages_held_at_its_end"]
    assert found["loss_change_before"] == 0
    assert found["loss_change_in_loop"] != 0


def test_repeats_that_are_forgotten_know_no_limit_of_aliases(replay):
    """A page stands in for one other at most, or for none."""
    passage, held = list(range(10, 42)), {}
    for becomes in ("alias", "dropped"):
        found = measured(replay, passage, 3 * LOOP, max_aliases=2, retired_becomes=becomes)
        held[becomes] = found["pages_held_at_its_end"]
    assert held["dropped"] < held["alias"]


def test_a_passage_that_comes_once_frees_nothing(replay):
    once = np.random.default_rng(4).integers(4, 60, LOOP).tolist()
    found = measured(replay, once)
    assert (found["pages_held_halfway"], found["pages_held_at_its_end"]) == (4 + 8, 4 + 16)
    assert (found["loss_change_in_loop"], found["loss_change_after"]) == (0, 0)


@pytest.mark.parametrize("kept", [1.0, 0.9])
def test_under_pressure_a_loop_holds_no_more_memory_as_it_goes_on(replay, kept):
    """Whatever the floor: pages of a loop stand again, but for the last 128 tokens."""
    boundaries = BoundaryTokens.from_texts(["\n\n"] * replay.model.config.vocab_size)
    config = make_config("pressure", min_kept=kept)
    found = measure_loop(replay, IDS, 8, list(range(10, 42)), boundaries, config, BEFORE, 4 * LOOP)
    assert found["first_half_stays"] == {}
    assert found["second_half_stays"] == {"recent": 128 // PAGE_TOKENS}
    assert found["pages_held_halfway"] == found["pages_held_at_its_end"]
    # Before the loop there is nothing that stands again: at a floor below 1 one of its pages goes for need.
    assert found["pages_held_at_its_end"] == 4 + 128 // PAGE_TOKENS - (kept < 1)
    assert found["loss_change_before"] == 0


def test_the_published_choice_takes_no_more_of_a_loop_than_its_floor_leaves(replay):
    """It knows no repeats: of 65 pages at the loop's end, the prompt's aside, two fifths may go, looped or not."""
    boundaries = BoundaryTokens.from_texts(["\n\n"] * replay.model.config.vocab_size)
    config = make_config("pressure", min_kept=0.6, need="nearest-earlier", retired_becomes="alias", max_aliases=64)
    found = measure_loop(replay, IDS, 8, list(range(10, 42)), boundaries, config, BEFORE, 4 * LOOP)
    assert found["pages_held_at_its_end"] == 4 + 64 - (4 + 64 - 1) * 2 // 5
    stay = [found["first_half_stays"], found["second_half_stays"]]
    assert {reason for half in stay for reason in half} == {"floor", "recent"}
    assert stay[1]["recent"] == 128 // PAGE_TOKENS


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"max_distance": 0.02}, "distance"), ({"min_run_tokens": 2000}, "no copy"), ({"max_aliases": 2}, "max_aliases")],
)
def test_a_page_stays_for_the_reason_that_was_set(replay, changes, reason):
    assert measured(replay, list(range(10, 42)), **changes)["first_half_stays"].get(reason, 0) >= 2
