"""An executor over the runner that counts, and what must hold of it at the end."""

from __future__ import annotations

from fakes.counting_runner import CountingRunner

from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor

PROMPTS = [[5], [20, 21, 22], [40, 41]]
WAIT = 20  # seconds; a wait that is not answered fails the test


def make(boundaries, runner: CountingRunner | None = None, **options) -> Executor:
    return Executor(runner or CountingRunner(), make_config("off"), boundaries, max_seq_len=400, **options)  # type: ignore[arg-type]


def assert_clean(executor: Executor) -> None:
    executor.manager.check_integrity()
    assert executor.manager.pool.num_used == 0
    assert not executor.has_work
