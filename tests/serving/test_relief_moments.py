"""When pressure gives pages up, when it does not, and what it ranks them by: on a runner without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes.reading_runner import VOCAB_SIZE
from serving.test_pressure import SIZE, make_executor, submit

from trtllm_memshare.serving.request import Phase


@pytest.mark.parametrize(("high", "low"), [(0.9, 0.7), (0.8, 0.8)])
def test_use_stays_at_or_below_the_high_watermark_while_pages_may_go(high, low):
    """Not only where somebody would be paused; and nothing goes before the next step would pass it."""
    executor = make_executor(110, high_watermark=high, low_watermark=low, min_kept=0.25)
    submit(executor, 6)
    manager, stats, running = executor.manager, executor.pressure.stats, executor._scheduler.running
    while executor.has_work:
        used, before = manager.pool.num_used, sum(stats.retired_pages.values())
        wanted = sum(s.phase is Phase.GENERATION and manager.fills_last_block(s.request_id) for s in running)
        executor.step()
        assert manager.pool.num_used <= high * 110
        if sum(stats.retired_pages.values()) > before:
            assert used + wanted > high * 110
    assert sum(stats.retired_pages.values()) > 20


def test_relief_is_back_once_use_was_below_the_high_watermark():
    """Though all were at their floors before."""
    executor = make_executor(60, high_watermark=0.9, low_watermark=0.7)
    submit(executor, 3, min_kept=1.0)  # 81 blocks, of which none may go
    executor.run_until_idle()
    assert executor.stats.num_pauses > 0
    submit(executor, 3, min_kept=0.25)
    most = 0
    while executor.has_work:
        executor.step()
        most = max(most, executor.manager.pool.num_used)
    assert most <= 0.9 * 60


def test_what_may_go_goes_though_it_is_less_than_is_wanted():
    executor = make_executor(110, high_watermark=0.6, low_watermark=0.05)
    submit(executor, 6)
    manager, stats = executor.manager, executor.pressure.stats
    while not stats.retired_pages["needed_least"]:
        assert manager.pool.num_used <= 0.6 * 110 + 6  # a step takes a block for each at most
        executor.step()
    status = executor.status()
    assert manager.pool.num_used > 0.05 * 110
    assert status.pressure.num_at_floor == status.num_active == 6


def test_no_pressure_begins_where_nobody_has_anything_to_give():
    executor = make_executor(40)
    submit(executor, 3, memshare=False)
    executor.run_until_idle()
    assert executor.pressure.episodes.num == 0


def test_a_page_is_ranked_by_the_surprisal_of_the_tokens_that_were_chosen():
    """The runner gives each token a logit of 10, beside a 9 and zeros."""
    executor, needs = make_executor(60, need="surprisal"), []
    executor.pressure.watch = lambda retirement: needs.extend(retirement.need.tolist())
    submit(executor, 3)
    executor.run_until_idle()
    logits = torch.zeros(VOCAB_SIZE)
    logits[0], logits[1] = 10.0, 9.0
    np.testing.assert_allclose(needs, -SIZE * float(torch.log_softmax(logits, 0)[0]), rtol=1e-3)
    assert len(needs) > 20


def test_where_admission_fails_requests_run_one_after_the_other(monkeypatch):
    executor, most = make_executor(60), 0
    monkeypatch.setattr(executor.pressure._admission, "fits", lambda *_: 1 / 0)
    handles = submit(executor, 3, new_tokens=20)
    for _ in range(200):
        executor.step()
        most = max(most, len(executor._scheduler.running))
    assert all(len(handle.result(0).token_ids) == 20 for handle in handles)
    assert most == 1
