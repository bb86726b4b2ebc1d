"""Reads an executor's counts at one moment."""

from __future__ import annotations

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.serving.pressure import Pressure
from trtllm_memshare.serving.request import Phase
from trtllm_memshare.serving.scheduler import Scheduler
from trtllm_memshare.serving.sharing import Sharing
from trtllm_memshare.serving.statistics import ExecutorStats, ExecutorStatus


def read_status(
    scheduler: Scheduler,
    num_submitted: int,
    manager: KVCacheManager,
    sharing: Sharing,
    pressure: Pressure | None,
    stats: ExecutorStats,
    num_failed_steps: int,
    step_seconds: float,
) -> ExecutorStatus:
    """Safe from any thread, since it only reads. ``num_submitted``: requests that the scheduler has not seen yet."""
    running = list(scheduler.running)
    generating = sum(s.phase is Phase.GENERATION for s in running)
    pool, cache = manager.pool, manager.stats()
    return ExecutorStatus(
        num_active=len(running),
        num_waiting=num_submitted + len(scheduler.waiting),
        num_context=len(running) - generating,
        num_context_tokens=sum(len(s.tokens) for s in running if s.phase is Phase.CONTEXT),
        num_generating=generating,
        num_pauses=scheduler.num_pauses,
        num_paused=sum(s.num_pauses > 0 for s in list(scheduler.waiting)),
        num_steps=stats.num_steps,
        num_finished=stats.num_finished,
        max_blocks=pool.num_usable,
        used_blocks=pool.num_used,
        tokens_per_block=manager.tokens_per_block,
        shared_blocks=cache.shared,
        search_seconds=stats.search_seconds,
        num_candidates=sharing.policy.num_candidates,
        refused={**sharing.policy.rejected, **cache.refused},
        num_failed=stats.num_failed,
        num_failed_steps=num_failed_steps,
        step_seconds=step_seconds,
        pressure=None if pressure is None else pressure.status(running, cache.retired_again),
    )
