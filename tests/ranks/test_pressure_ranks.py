"""Pressure on several ranks: one choice for all, whatever each of them would choose, and a stop where one differs."""

from __future__ import annotations

import pytest
from fakes.rank_threads import on_ranks
from fakes.reading_runner import VOCAB_SIZE, ReadingRunner, repeating_text

from trtllm_memshare.ranks.agreement import RankDisagreementError
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

SIZE = 8
TEXTS = BoundaryTokens.from_texts([f"w{i}" for i in range(VOCAB_SIZE)])
SETTINGS = {"need": "random", "retired_becomes": "dropped", "protected_tokens": 16, "min_run_tokens": 500}


def serve(agreement, rank, at_step=lambda executor, step: None):
    """Digests of the tables after every step; each rank draws pages from a seed of its own."""
    config = make_config("pressure", **{**SETTINGS, "control_seed": rank})
    executor = Executor(ReadingRunner(110, SIZE), config, TEXTS, 320, 8, 64, agreement=agreement)
    for first in range(4, 10):
        executor.submit([first, *repeating_text(first + 1000)[1:16]], SamplingParams(200))
    digests = []
    while executor.has_work:
        at_step(executor, len(digests))
        executor.step()
        executor.manager.check_integrity()
        digests.append(executor.manager.state_digest())
    return digests, executor.pressure.stats.retired_pages["needed_least"]


def test_every_rank_gives_up_the_pages_that_the_first_one_chose():
    results = on_ranks(3, serve)
    assert results[0][1] > 20
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("differs", [0, 1])
def test_a_rank_that_differs_stops_all_of_them_at_the_next_choice(differs):
    def serve_disturbed(agreement, rank):
        def disturb(executor, step):
            if rank == differs and step == 40:
                executor.manager.pool.generation[5] += 1

        return serve(agreement, rank, disturb)

    for error in on_ranks(2, serve_disturbed):
        assert isinstance(error, RankDisagreementError)
        assert "block tables or candidates of ranks [1] differ from those of rank 0" in str(error)
