"""A soak: clients ask while one process after another is killed; what was lost, how long, and what is left."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import Counter, defaultdict
from itertools import cycle, islice
from typing import Any

import psutil

from benchmarks.triton_load.clients import Clients, Ends
from benchmarks.triton_load.server import TritonServer, cpu_pressure_s, cpu_seconds

VICTIMS = ("tensorrt_llm", "ensemble", "tritonserver", "preprocessing", "postprocessing")
MAX_READY_S = 10.0
MAX_GROWTH = 1.1
_SAMPLE_S = 5.0
_SETTLE_S = 60.0
_REASON = "the model tensorrt_llm went away while it worked on this request"
_STARTING = "the model tensorrt_llm cannot be reached"


def is_true_reason(text: str) -> bool:
    """Whether an error says what happened: the executor's process died."""
    return _REASON in text or _STARTING in text


class Soak:
    """See the module.

    Args:
      server: ready.
      clients: what loads it.
      minutes: of load.
      crashes: kills, at even intervals.
    """

    def __init__(self, server: TritonServer, clients: Clients, minutes: float, crashes: int) -> None:
        self._server, self._clients, self._crashes = server, clients, crashes
        self._seconds = 60 * minutes
        self.samples: list[dict[str, Any]] = []
        self.recoveries: list[dict[str, Any]] = []
        self._away: list[tuple[float, float]] = []

    async def run(self) -> dict[str, Any]:
        """Returns figures, with everything that went wrong under ``faults``."""
        await asyncio.to_thread(self._sample)
        began = time.monotonic()
        load = asyncio.create_task(self._clients.run(began + self._seconds))
        for number, victim in enumerate(islice(cycle(VICTIMS), self._crashes), 1):
            await self._sample_until(began + number * self._seconds / (self._crashes + 1))
            await asyncio.to_thread(self._sample, before_crash=True)
            await asyncio.to_thread(self._kill, victim)
        await self._sample_until(began + self._seconds)
        await asyncio.to_thread(self._sample, before_crash=True)
        await load
        give_up = time.monotonic() + _SETTLE_S
        while self._server.metric('block_type="used"') != 0 and time.monotonic() < give_up:
            await asyncio.sleep(0.2)
        self._sample()
        ends = self._clients.ends
        found = {
            "requests": dict(ends.counts), "reasons": dict(ends.reasons), "recoveries": self.recoveries,
            "closings": dict(Counter(c.how for c in ends.closed)),
            "closed_without_a_crash": len(unexplained := ends.closed_outside(self._away)),
            "closed_so": dict(Counter(c.how for c in unexplained)), "client_lag_s": round(self._clients.max_lag_s, 2),
            "restarts_counted": self._server.metric("memshare_server_restarts"),
            "leaked_blocks": self._server.metric('block_type="used"'), "samples": self.samples,
        }  # fmt: skip
        return {**found, "faults": faults_of(found, ends, self._crashes)}

    def _kill(self, victim: str) -> None:
        old = self._server.processes()
        spare_cpu_s = sum(map(cpu_seconds, self._server.spare()))
        killed_at, pressure_s = time.monotonic(), cpu_pressure_s()
        old[victim].kill()
        while self._server.is_ready() and time.monotonic() < killed_at + _SETTLE_S:
            time.sleep(0.02)
        red_at = time.monotonic()
        self._server.wait_until_ready()
        ready_at = time.monotonic()
        self._away.append((killed_at, ready_at))
        self.recoveries.append(
            {
                "killed": victim,
                "red_after_s": round(red_at - killed_at, 2),
                "ready_after_s": round(ready_at - killed_at, 2),
                "cpu_s": round(self._server.cpu_s() - spare_cpu_s, 2),
                "waited_for_cpu": round((cpu_pressure_s() - pressure_s) / (ready_at - killed_at), 2),
            }
        )
        print(f"killed {victim}: ready again after {ready_at - killed_at:.1f} s", flush=True)

    async def _sample_until(self, deadline: float) -> None:
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _SAMPLE_S))
            await asyncio.to_thread(self._sample)  # it reads all of /proc: on the clients' loop it would hold them up

    def _sample(self, before_crash: bool = False) -> None:
        held: dict[str, Any] = {}
        for name, process in self._server.processes().items():
            try:
                rss = round(process.memory_info().rss / 2**20, 1)
                held[name] = {"rss_mb": rss, "fds": process.num_fds(), "threads": process.num_threads()}
            except psutil.Error:
                continue
        shared = len(self._server.shared_memory())
        num_spare = len(self._server.spare())
        self.samples.append(
            {"before_crash": before_crash, "shared_memory": shared, "spare_processes": num_spare, "held": held}
        )


def growth(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Last third of the samples over the first, medians, by process and by what it holds.

    Only samples taken just before a crash count: the server that is looked at has then served for equally long.
    """
    series: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        for name, held in sample["held"].items() if sample["before_crash"] else ():
            for what, value in held.items():
                series[name][what].append(value)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, by_what in series.items():
        for what, values in by_what.items():
            third = math.ceil(len(values) / 3)
            found[name][what] = round(statistics.median(values[-third:]) / statistics.median(values[:third]), 3)
    return dict(found)


def requests_ended(report: dict[str, Any]) -> int:
    """Requests of a soak, however they ended."""
    return sum(report["requests"].values())


def slowest_recovery(report: dict[str, Any]) -> float:
    """Longest time from a kill until the server was ready again, seconds."""
    return max(recovery["ready_after_s"] for recovery in report["recoveries"])


def faults_of(found: dict[str, Any], ends: Ends, crashes: int) -> list[str]:
    """Everything that the soak promises and that did not hold."""
    faults = [f"{ends.counts[end]} requests: {end}" for end in ("unclear", "no end") if ends.counts[end]]
    faults += [f"untrue reason: {text}" for text in ends.reasons if not is_true_reason(text)]
    if not ends.counts["answered"]:
        faults.append("no request was answered")
    if count := found["closed_without_a_crash"]:
        faults.append(f"{count} connections closed although no server was dying: {found['closed_so']}")
    for recovery in found["recoveries"]:
        if recovery["ready_after_s"] > MAX_READY_S:
            faults.append(f"{recovery['killed']}: ready after {recovery['ready_after_s']} s, allowed {MAX_READY_S:g}")
    if found["restarts_counted"] != crashes:
        faults.append(f"{found['restarts_counted']:g} restarts for {crashes} crashes")
    if found["leaked_blocks"] != 0:
        faults.append(f"{found['leaked_blocks']:g} KV blocks in use without a request")
    regions = {sample["shared_memory"] // max(1, len(sample["held"]) - 2) for sample in found["samples"]}
    if max(regions) > 2:  # one of each model process, and of each of the spare
        faults.append("shared memory of killed servers was left")
    for name, by_what in growth(found["samples"]).items():
        faults += [f"{name}: {what} grew {x:.2f} times" for what, x in by_what.items() if x > MAX_GROWTH]
    return faults
