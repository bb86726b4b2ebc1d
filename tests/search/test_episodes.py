"""When pressure counts as over: the rule that every way of serving keeps, and the lines that say so."""

from __future__ import annotations

import json
import logging

import pytest

from trtllm_memshare.search.episodes import QUIET_STEPS, Episodes
from trtllm_memshare.search.relief_faults import ReliefFaults

NUM_PAGES, LOW = 100, 0.55
AT_LOW = 55


@pytest.fixture
def episodes(caplog) -> Episodes:
    caplog.set_level(logging.INFO, "trtllm_memshare.pressure")
    return Episodes(NUM_PAGES, LOW)


def lines(caplog) -> list[dict]:
    return [json.loads(record.message) for record in caplog.records]


def test_reliefs_that_follow_one_another_are_one_episode(episodes, caplog):
    for relief in range(5):
        episodes.relieved(97, 4, 10 * relief)
        for _ in range(QUIET_STEPS - 1):
            episodes.look(20, 10 * relief + 10)
        assert episodes.is_active
    episodes.look(20, 50)
    assert not episodes.is_active
    assert episodes.num == 1
    assert lines(caplog) == [
        {"event": "pressure_begins", "used_blocks": 97, "max_blocks": NUM_PAGES, "running": 4},
        {"event": "pressure_ends", "used_blocks": 20, "max_blocks": NUM_PAGES, "retired_pages": 50},
    ]


def test_use_above_the_low_watermark_is_pressure_however_long_nothing_is_given_up(episodes):
    episodes.relieved(97, 4, 0)
    for _ in range(3 * QUIET_STEPS):
        episodes.look(AT_LOW + 1, 5)
    assert episodes.is_active
    episodes.look(AT_LOW, 5)
    assert not episodes.is_active


def test_several_steps_may_be_told_at_once(episodes):
    episodes.relieved(97, 4, 0)
    episodes.look(0, 5, QUIET_STEPS - 1)
    assert episodes.is_active
    episodes.look(0, 5, 1)
    assert not episodes.is_active


def test_an_episode_counts_the_pages_of_its_own(episodes, caplog):
    episodes.relieved(97, 4, 3)
    episodes.end(0, 10)
    episodes.end(0, 10)  # nobody is left, twice
    episodes.look(0, 10, QUIET_STEPS)
    episodes.relieved(98, 2, 10)
    episodes.end(7, 11)
    assert episodes.num == 2
    assert [line.get("retired_pages") for line in lines(caplog)] == [None, 7, None, 1]


def test_an_error_is_counted_each_time_and_told_once_for_each_place(caplog):
    faults = ReliefFaults()
    for _ in range(3):
        for error in (MemoryError("of the\nhost"), RuntimeError("x")):
            with faults.caught():
                raise error
    with faults.caught():
        raise RuntimeError("the same kind, elsewhere")
    assert faults.num == 7
    told = lines(caplog)
    assert [line["error"] for line in told] == [
        "MemoryError: of the host",
        "RuntimeError: x",
        "RuntimeError: the same kind, elsewhere",
    ]
    assert all(line["at"].startswith("test_episodes.py:") for line in told)
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_is_not_caught(error):
    faults = ReliefFaults()
    with pytest.raises(error), faults.caught():
        raise error
    assert faults.num == 0


def test_with_several_ranks_an_error_ends_them():
    faults = ReliefFaults(are_fatal=True)
    with pytest.raises(MemoryError), faults.caught():
        raise MemoryError
    assert faults.num == 0
