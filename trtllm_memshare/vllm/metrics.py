"""Counters beside vLLM's own, in the process of the scheduler.

vLLM's metrics live in the API server's process. ``memshare vllm serve`` sets PROMETHEUS_MULTIPROC_DIR, so both
processes write into one folder and ``/metrics`` shows both; inside one process both are in the same registry anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from trtllm_memshare.vllm.host_request import HostRequest
from trtllm_memshare.vllm.relief import Relief

_COUNTERS = {
    "retired": "KV blocks that pressure gave back to the pool",
    "retired_repeats": "Those of them whose text stands again later in the request",
    "retired_aliased": "Those of them that an earlier page of the request is read in place of",
    "retired_again": "KV blocks given up again by requests that came back from preemption",
    "band_moves": "Requests whose null entries moved to the next band",
    "pauses_avoided": "Times that running requests got KV blocks that were not free without a preemption",
    "failed_reliefs": "Errors of pressure that were caught, each of which left it out until the next step",
}

_GAUGES = {
    "null_entries": "Block table entries at a null page",
    "aliased_entries": "Block table entries at an earlier page of their request",
    "requests_at_floor": "Running requests that gave KV blocks up and may give up none but those that stand again",
    "bytes_saved_now": "Memory of the KV blocks that requests do without now, of all layers on one rank",
}


@dataclass(frozen=True)
class _Registered:
    counters: dict[str, Counter]
    gauges: dict[str, Gauge]
    pressure: Gauge


@cache
def _registered(registry: CollectorRegistry) -> _Registered:
    """Once for a process: a second engine in it counts on."""
    return _Registered(
        {name: Counter(f"memshare_{name}", text, registry=registry) for name, text in _COUNTERS.items()},
        {
            name: Gauge(f"memshare_{name}", text, registry=registry, multiprocess_mode="sum")
            for name, text in _GAUGES.items()
        },
        Gauge("memshare_pressure", "1 while there is pressure", registry=registry, multiprocess_mode="max"),
    )


class Metrics:
    """Brings Prometheus up to date with a ``Relief``. Of two in one process the last that changed has the gauges.

    Args:
      bytes_per_block: of all layers on one rank.
    """

    def __init__(self, bytes_per_block: int, registry: CollectorRegistry = REGISTRY) -> None:
        self._bytes_per_block, self._registered = bytes_per_block, _registered(registry)
        self._reported = dict.fromkeys(_COUNTERS, 0)
        self._state: tuple[dict[str, int], bool] | None = None

    def report(self, relief: Relief, running: Iterable[HostRequest]) -> None:
        """Adds what has happened since the last call; ``running``: the requests that run now."""
        retired_now, at_floor = relief.totals.retired_now, 0
        if retired_now:  # with room nobody is looked at
            at_floor = sum(relief.pages(r.request_id).is_at_floor(r.num_computed_tokens) for r in running)
        totals = {
            **asdict(relief.totals),
            "failed_reliefs": relief.faults.num,
            "requests_at_floor": at_floor,
            "bytes_saved_now": retired_now * self._bytes_per_block,
        }
        is_active = relief.episodes.is_active
        if (totals, is_active) == self._state:
            return  # as in most steps: to set a gauge anew takes Prometheus longer than to look
        self._state = totals, is_active
        for name, counter in self._registered.counters.items():
            counter.inc(totals[name] - self._reported[name])
            self._reported[name] = totals[name]
        for name, gauge in self._registered.gauges.items():
            gauge.set(totals[name])
        self._registered.pressure.set(is_active)
