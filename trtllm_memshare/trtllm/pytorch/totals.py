"""What sharing has done so far for one manager, by name: what metrics and the statistics file say, on either route."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_memshare.trtllm.pytorch.pressure_stats import PressureStats
from trtllm_memshare.trtllm.pytorch.sharing import Sharing

Totals = dict[str, Any]
"""Counters since the start; ``aliased_entries`` and what ends on ``_now``, ``active`` or ``floor`` are of this moment.

``rejected``, ``refused`` and ``retired_pages`` are counters by reason.
"""

NOTHING: Totals = {
    "blocks_shared": 0,
    "blocks_forgotten": 0,
    "blocks_shadowed": 0,
    "blocks_generated": 0,
    "blocks_retired_of_finished": 0,
    "pages_copied": 0,
    "saved_bytes": 0,
    "aliased_entries": 0,
    "candidates": 0,
    "rejected": {},
    "refused": {},
    "errors": 0,
    "requests_failed": 0,
    "host_seconds": 0.0,
    "search_seconds": 0.0,
    "pauses": 0,
    "pauses_avoided": 0,
    "pressure_episodes": 0,
    "pressure_active": False,
    "retired_pages": {},
    "retired_now": 0,
    "bytes_saved_now": 0,
    "requests_at_floor": 0,
}
"""Every name, and what it is where nothing has happened."""


def page_bytes(pool: torch.Tensor) -> int:
    """Of all layers on this rank, K and V."""
    return pool[0].numel() * pool.element_size()


def pressure_totals(stats: PressureStats, num_resumed: int, num_at_floor: int) -> Totals:
    """Those of pressure.

    Args:
      num_resumed: pages given up again by requests that came back from a pause.
      num_at_floor: running requests that have given pages up and are at their floor: only what repeats may go still.
    """
    return {
        "pauses_avoided": stats.avoided.num,
        "pressure_episodes": stats.episodes.num,
        "pressure_active": stats.episodes.is_active,
        "retired_pages": {**stats.retired_pages, "resumed": num_resumed},
        "requests_at_floor": num_at_floor,
    }


def overlay_totals(shared: Sharing) -> Totals:
    """Of the route around TensorRT-LLM's own manager."""
    stats, pressure = shared.manager.stats(), shared.pressure
    retired_now = sum(known.pages.num_given_up for known in shared.requests)
    size = page_bytes(shared.pool)
    by_pressure = (
        {}
        if pressure is None
        else pressure_totals(pressure.stats, shared.giving_up.num_resumed, pressure.num_at_floor())
    )
    return {
        **NOTHING,
        "blocks_shared": stats.shared,
        "blocks_forgotten": stats.forgotten,
        "blocks_shadowed": stats.shadowed,
        "blocks_generated": stats.generated,
        "blocks_retired_of_finished": stats.retired_at_end,
        "pages_copied": shared.tail.num_copies,
        "saved_bytes": (stats.shared + stats.forgotten) * size,
        "aliased_entries": stats.aliased_entries,
        "candidates": shared.policy.num_candidates,
        "rejected": dict(shared.policy.rejected),
        "refused": stats.refused,
        "errors": shared.failures.num_errors,
        "requests_failed": shared.failures.num_failed_requests,
        "host_seconds": shared.seconds,
        "search_seconds": shared.search_seconds,
        "pauses": shared.pauses.num,
        "retired_now": retired_now,
        "bytes_saved_now": retired_now * size,
        **by_pressure,
    }
