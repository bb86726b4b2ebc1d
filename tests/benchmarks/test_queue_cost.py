"""The queue's benchmark on a runner without a model: everybody is answered and nothing is left."""

from __future__ import annotations

from fakes.counting_runner import CountingRunner

from benchmarks.queue_cost import measure
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor


def test_a_round_measures_a_queue_that_waits_and_leaves_nothing(boundaries):
    runner = CountingRunner(num_blocks=4 * 2000 // 16)
    with Executor(runner, make_config("off"), boundaries, 2000, 4) as executor:  # type: ignore[arg-type]
        figures = measure(executor, batch=4, num_requests=50, new_tokens=1999, window_s=0.02)
    assert set(figures) == {
        *("step_before_ms", "submit_s", "queue_mib", "step_with_queue_ms", "cancel_s", "step_after_ms")
    }
    status = executor.status()
    assert (status.num_active, status.num_waiting, status.num_finished) == (0, 0, 54)
    assert executor.manager.pool.num_used == 0
