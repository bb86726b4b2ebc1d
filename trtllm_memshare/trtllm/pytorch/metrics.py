"""Totals of one process, for Prometheus and for a file that ``python -m trtllm_memshare bench`` reads."""

from __future__ import annotations

import json
import logging
import os
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.registry import REGISTRY

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.settings import PREFIX, Settings
from trtllm_memshare.trtllm.pytorch.sharing import Sharing

log = logging.getLogger("trtllm_memshare")


def totals(shared: Sharing, bytes_per_block: int) -> dict[str, Any]:
    """Counters since the start and gauges as of now, by name.

    Args:
      shared: the manager's sharing.
      bytes_per_block: of all layers on this rank, K and V.
    """
    stats = shared.manager.stats()
    return {
        "blocks_shared": stats.shared,
        "blocks_forgotten": stats.forgotten,
        "blocks_shadowed": stats.shadowed,
        "blocks_generated": stats.generated,
        "blocks_retired_of_finished": stats.retired_at_end,
        "pages_copied": shared.tail.num_copies,
        "saved_bytes": (stats.shared + stats.forgotten) * bytes_per_block,
        "aliased_entries": stats.aliased_entries,
        "candidates": shared.policy.num_candidates,
        "rejected": dict(shared.policy.rejected),
        "refused": stats.refused,
        "errors": shared.failures.num_errors,
        "requests_failed": shared.failures.num_failed_requests,
        "host_seconds": shared.seconds,
        "search_seconds": shared.search_seconds,
    }


_COUNTERS = {
    "blocks_shared": "KV blocks freed by sharing",
    "blocks_forgotten": "KV blocks given up under pressure",
    "saved_bytes": "Bytes of KV cache freed",
    "pages_copied": "Pages moved into the place of a freed one",
    "candidates": "Pairs of blocks compared",
    "errors": "Errors of sharing that were caught; the first stops new sharing",
    "requests_failed": "Requests ended alone because their block table could not be vouched for",
    "host_seconds": "Host time spent on sharing",
    "search_seconds": "Time of the comparisons",
}


@dataclass(frozen=True)
class _Metrics:
    counters: dict[str, Counter]
    turned_down: Counter
    aliased: Gauge


@cache
def _metrics(registry: CollectorRegistry) -> _Metrics:
    """Once for a process: a second LLM in it counts on."""
    return _Metrics(
        {name: Counter(f"memshare_{name}", text, registry=registry) for name, text in _COUNTERS.items()},
        Counter("memshare_decisions_refused", "Candidates and decisions turned down", ["reason"], registry=registry),
        Gauge("memshare_aliased_entries", "Block table entries beyond one a page", registry=registry),
    )


@cache
def _serve(port: int, registry: CollectorRegistry) -> None:
    """Starts the endpoint, once for a process. Raises UserError if the port is taken."""
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise UserError(f"{PREFIX}METRICS_PORT {port} cannot be opened: {error.strerror} (choose another)") from error


class Reporter:
    """Keeps metrics and the statistics file up to date, every ``stats_interval`` iterations.

    The metrics are in prometheus_client's registry, so a process with PROMETHEUS_MULTIPROC_DIR shows them where
    TensorRT-LLM shows its own; with ``metrics_port`` they also have an endpoint on loopback.
    """

    def __init__(self, shared: Sharing, settings: Settings, registry: CollectorRegistry = REGISTRY) -> None:
        self._shared, self._settings = shared, settings
        pool = shared.pool
        self._bytes_per_block = pool[0].numel() * pool.element_size()
        self._step, self._told = 0, False
        self._metrics = _metrics(registry)
        self._reported: dict[str, float] = {}
        if settings.metrics_port is not None:
            _serve(settings.metrics_port, registry)

    def count_step(self) -> None:
        """One iteration more."""
        self._step += 1
        if self._step % self._settings.options.stats_interval == 0:
            self.report()

    def report(self) -> None:
        """Brings everything up to date."""
        now = totals(self._shared, self._bytes_per_block)
        for name, counter in self._metrics.counters.items():
            counter.inc(self._growth(name, now[name]))
        for reason, count in {**now["rejected"], **now["refused"]}.items():
            self._metrics.turned_down.labels(reason=reason).inc(self._growth(f"refused {reason}", count))
        self._metrics.aliased.set(now["aliased_entries"])
        if self._settings.stats_file is not None:
            self._write(self._settings.stats_file, {"iterations": self._step, **now})

    def close(self) -> None:
        """The last report."""
        self.report()

    def _write(self, stats_file: Path, document: dict[str, Any]) -> None:
        """Whoever reads the file sees the old one or the new one. A full disk must not stop the server."""
        draft = stats_file.with_name(f".{stats_file.name}.{uuid.uuid4().hex}")
        try:
            draft.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(draft, stats_file)
        except OSError as error:
            if not self._told:
                log.warning("statistics cannot be written to %s: %s", stats_file, error.strerror)
            self._told = True

    def _growth(self, name: str, total: float) -> float:
        growth = total - self._reported.get(name, 0)
        self._reported[name] = total
        return growth
