"""Pressure on several ranks: one choice for all, whatever each of them would choose, and a stop where one differs."""

from __future__ import annotations

import threading

import pytest
from fakes.reading_runner import VOCAB_SIZE, ReadingRunner, repeating_text

from trtllm_memshare.ranks.agreement import RankAgreement, RankDisagreementError
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

SIZE = 8
TEXTS = BoundaryTokens.from_texts([f"w{i}" for i in range(VOCAB_SIZE)])
SETTINGS = {"need": "random", "retired_becomes": "dropped", "protected_tokens": 16, "min_run_tokens": 500}


class Meeting:
    """Ranks that are threads of one process."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.size, self._slots, self._barrier = rank, len(slots), slots, barrier

    def gather(self, value):
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast(self, value, root=0):
        return self._exchange(value)[root]

    def _exchange(self, value):
        self._slots[self.rank] = value
        self._barrier.wait(30)
        values = list(self._slots)
        self._barrier.wait(30)
        return values


def serve(communicator, at_step):
    """Digests of the tables after every step; each rank draws pages from a seed of its own."""
    config = make_config("pressure", **{**SETTINGS, "control_seed": communicator.rank})
    executor = Executor(
        ReadingRunner(110, SIZE), config, TEXTS, 320, 8, 64, agreement=RankAgreement(communicator, communicator.size)
    )
    for first in range(4, 10):
        executor.submit([first, *repeating_text(first + 1000)[1:16]], SamplingParams(200))
    digests = []
    while executor.has_work:
        at_step(executor, communicator.rank, len(digests))
        executor.step()
        executor.manager.check_integrity()
        digests.append(executor.manager.state_digest())
    return digests, executor.pressure.stats.retired_pages["needed_least"]


def on_ranks(count, at_step=lambda executor, rank, step: None):
    slots, barrier, results = [None] * count, threading.Barrier(count), [None] * count

    def run(rank):
        try:
            results[rank] = serve(Meeting(rank, slots, barrier), at_step)
        except RankDisagreementError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_gives_up_the_pages_that_the_first_one_chose():
    results = on_ranks(3)
    assert results[0][1] > 20
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("differs", [0, 1])
def test_a_rank_that_differs_stops_all_of_them_at_the_next_choice(differs):
    def disturb(executor, rank, step):
        if rank == differs and step == 40:
            executor.manager.pool.generation[5] += 1

    for error in on_ranks(2, disturb):
        assert isinstance(error, RankDisagreementError)
        assert "block tables or candidates of ranks [1] differ from those of rank 0" in str(error)
