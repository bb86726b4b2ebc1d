"""What the executor does now, for prometheus-client: under TensorRT-LLM's names, and MemShare's beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trtllm_memshare.serving.statistics import ExecutorStatus, PressureStatus
from trtllm_memshare.triton.runtime import RESTARTS_VARIABLE

GAUGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nv_trt_llm_request_metrics": (
        "TRT LLM request metrics", "request_type", ("active", "max", "scheduled", "context", "waiting")),
    "nv_trt_llm_runtime_memory_metrics": ("TRT LLM runtime memory metrics", "memory_type", ("cpu", "gpu")),
    "nv_trt_llm_kv_cache_block_metrics": (
        "TRT LLM KV cache block metrics", "kv_cache_block_type", ("max", "free", "used", "tokens_per", "fraction")),
    "nv_trt_llm_inflight_batcher_metrics": (
        "TRT LLM inflight_batcher-specific metrics", "inflight_batcher_specific_metric",
        ("total_context_tokens", "generation_requests", "micro_batch_id", "paused_requests")),
    "nv_trt_llm_general_metrics": ("General TRT LLM metrics", "general_type", ("timestamp", "iteration_counter")),
    "memshare_blocks": ("KV blocks freed by sharing, since the start", "block_type", ("shared",)),
    "memshare_saved_bytes": ("Bytes of KV cache freed by sharing, since the start", "unit", ("bytes",)),
    "memshare_search": (
        "The block search, since the start: candidate pairs compared, and seconds", "search_metric",
        ("candidates", "seconds")),
    "memshare_pauses": ("Requests paused for want of blocks, since the start", "unit", ("pauses",)),
    "memshare_pressure": (
        "Pressure: whether it is on, requests at their floor and pages done without now; times that it began, pauses "
        "avoided, requests admitted and reliefs left out for an error since the start", "pressure_metric",
        ("active", "at_floor", "retired_now", "bytes_saved_now", "episodes", "pauses_avoided", "admitted",
         "failed_reliefs")),
    "memshare_retired_pages": (
        "Pages given up under pressure, since the start", "reason", ("repeated", "needed_least", "resumed")),
    "memshare_seconds_since_step": (
        "Seconds that the present step has gone on, 0 between steps and when idle", "unit", ("seconds",)),
    "memshare_server_restarts": ("Starts of the server after a process had died", "unit", ("restarts",)),
}  # fmt: skip
"""By name: description, label, and the label's values (facts: TensorRT-LLM's Triton backend)."""

REFUSED = "memshare_refused"
"""Candidates and decisions turned down since the start, by ``reason``; reasons appear as they occur."""


class ExecutorCollector(Collector):
    """Gauges of one executor.

    Args:
      status: reads the executor.
      max_requests: most requests in flight.
      bytes_per_block: of all layers.
    """

    def __init__(self, status: Callable[[], ExecutorStatus], max_requests: int, bytes_per_block: int) -> None:
        self._status, self._max_requests, self._bytes_per_block = status, max_requests, bytes_per_block

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Every gauge, with the values of this moment."""
        status = self._status()
        for name, by_label in self._values(status).items():
            description, label, _ = GAUGES[name]
            family = GaugeMetricFamily(name, description, labels=[label])
            for label_value, value in by_label.items():
                family.add_metric([label_value], float(value))
            yield family
        refused = GaugeMetricFamily(REFUSED, "Candidates and decisions turned down, since the start", labels=["reason"])
        for reason, count in status.refused.items():
            refused.add_metric([reason], float(count))
        yield refused

    def _values(self, status: ExecutorStatus) -> dict[str, dict[str, float]]:
        """Value of every gauge by name and label value."""
        return {
            "nv_trt_llm_request_metrics": {
                "active": status.num_active + status.num_waiting,
                "max": self._max_requests,
                "scheduled": status.num_active,
                "context": status.num_context,
                "waiting": status.num_waiting,
            },
            "nv_trt_llm_runtime_memory_metrics": {"cpu": _resident_bytes(), "gpu": _gpu_bytes()},
            "nv_trt_llm_kv_cache_block_metrics": {
                "max": status.max_blocks,
                "free": status.max_blocks - status.used_blocks,
                "used": status.used_blocks,
                "tokens_per": status.tokens_per_block,
                "fraction": status.used_blocks / status.max_blocks,
            },
            "nv_trt_llm_inflight_batcher_metrics": {
                "total_context_tokens": status.num_context_tokens,
                "generation_requests": status.num_generating,
                "micro_batch_id": 0,
                "paused_requests": status.num_paused,
            },
            "nv_trt_llm_general_metrics": {
                "timestamp": time.time_ns() // 1000,
                "iteration_counter": status.num_steps,
            },
            "memshare_blocks": {"shared": status.shared_blocks},
            "memshare_saved_bytes": {"bytes": status.shared_blocks * self._bytes_per_block},
            "memshare_search": {"candidates": status.num_candidates, "seconds": status.search_seconds},
            "memshare_pauses": {"pauses": status.num_pauses},
            **_pressure_values(status.pressure),
            "memshare_seconds_since_step": {"seconds": status.step_seconds},
            "memshare_server_restarts": {"restarts": int(os.environ.get(RESTARTS_VARIABLE, "0"))},
        }


def _pressure_values(pressure: PressureStatus | None) -> dict[str, dict[str, float]]:
    """Zeros where the settings ask for no pressure: a dashboard finds its metrics on every server."""
    p = pressure or PressureStatus(False, {}, 0, 0, 0, 0, 0, 0)
    return {
        "memshare_pressure": {
            "active": p.is_active,
            "at_floor": p.num_at_floor,
            "retired_now": p.retired_now,
            "bytes_saved_now": p.bytes_saved_now,
            "episodes": p.num_episodes,
            "pauses_avoided": p.num_pauses_avoided,
            "admitted": p.num_admitted,
            "failed_reliefs": p.num_failed_reliefs,
        },
        "memshare_retired_pages": {
            reason: p.retired_pages.get(reason, 0) for reason in GAUGES["memshare_retired_pages"][2]
        },
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _gpu_bytes() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
