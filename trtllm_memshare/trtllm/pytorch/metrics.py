"""Totals of one process, for Prometheus and for a file that ``python -m trtllm_memshare bench`` reads."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.registry import REGISTRY

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.settings import PREFIX, Settings
from trtllm_memshare.trtllm.pytorch.totals import Totals

log = logging.getLogger("trtllm_memshare")

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
    "pauses": "Requests paused or suspended for want of blocks",
}
_PRESSURE = {
    "active": "pressure_active",
    "at_floor": "requests_at_floor",
    "retired_now": "retired_now",
    "bytes_saved_now": "bytes_saved_now",
    "episodes": "pressure_episodes",
    "pauses_avoided": "pauses_avoided",
}
"""Values of the label of ``memshare_pressure``, which are those on Triton, and the totals that they show."""


@dataclass(frozen=True)
class _Metrics:
    counters: dict[str, Counter]
    turned_down: Counter
    retired: Counter
    aliased: Gauge
    pressure: Gauge


@cache
def _metrics(registry: CollectorRegistry) -> _Metrics:
    """Once for a process: a second LLM in it counts on."""
    return _Metrics(
        {name: Counter(f"memshare_{name}", text, registry=registry) for name, text in _COUNTERS.items()},
        Counter("memshare_decisions_refused", "Candidates and decisions turned down", ["reason"], registry=registry),
        Counter("memshare_retired_pages", "Pages given up under pressure", ["reason"], registry=registry),
        Gauge("memshare_aliased_entries", "Block table entries beyond one a page", registry=registry),
        Gauge(
            "memshare_pressure",
            "Pressure: whether it is on, requests at their floor, pages and bytes done without now; times that it "
            "began and pauses avoided since the start",
            ["pressure_metric"],
            registry=registry,
            multiprocess_mode="sum",
        ),
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

    Args:
      totals: reads them.
    """

    def __init__(
        self, totals: Callable[[], Totals], settings: Settings, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._totals, self._settings = totals, settings
        self._step, self._told = 0, False
        self._metrics = _metrics(registry)
        self._reported: dict[str, float] = {}
        if settings.metrics_port is not None:
            _serve(settings.metrics_port, registry)

    def count_step(self) -> None:
        """One iteration more; raises nothing."""
        self._step += 1
        if self._step % self._settings.options.stats_interval == 0:
            self.report()

    def report(self) -> None:
        """Brings everything up to date; raises nothing, since TensorRT-LLM's loop would end with it."""
        try:
            self._report()
        except Exception as error:
            self._tell(f"metrics cannot be brought up to date: {type(error).__name__}: {error}")

    def close(self) -> None:
        """The last report."""
        self.report()

    def _report(self) -> None:
        now, metrics = self._totals(), self._metrics
        for name, counter in metrics.counters.items():
            counter.inc(self._growth(name, now[name]))
        for reason, count in {**now["rejected"], **now["refused"]}.items():
            metrics.turned_down.labels(reason=reason).inc(self._growth(f"refused {reason}", count))
        for reason, count in now["retired_pages"].items():
            metrics.retired.labels(reason=reason).inc(self._growth(f"retired {reason}", count))
        metrics.aliased.set(now["aliased_entries"])
        for label, name in _PRESSURE.items():
            metrics.pressure.labels(pressure_metric=label).set(now[name])
        if self._settings.stats_file is not None:
            self._write(self._settings.stats_file, {"iterations": self._step, **now})

    def _write(self, stats_file: Path, document: dict[str, Any]) -> None:
        """Whoever reads the file sees the old one or the new one. A full disk must not stop the server."""
        draft = stats_file.with_name(f".{stats_file.name}.{uuid.uuid4().hex}")
        try:
            draft.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(draft, stats_file)
        except OSError as error:
            self._tell(f"statistics cannot be written to {stats_file}: {error.strerror}")

    def _tell(self, what: str) -> None:
        if not self._told:
            log.warning("%s", what)
        self._told = True

    def _growth(self, name: str, total: float) -> float:
        growth = total - self._reported.get(name, 0)
        self._reported[name] = total
        return growth
