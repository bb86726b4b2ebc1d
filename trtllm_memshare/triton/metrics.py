"""Metrics on Triton's own endpoint: TensorRT-LLM's names, and MemShare's beside them."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.serving.statistics import ExecutorStatus

GAUGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nv_trt_llm_request_metrics": (
        "TRT LLM request metrics", "request_type", ("active", "max", "scheduled", "context", "waiting")),
    "nv_trt_llm_kv_cache_block_metrics": (
        "TRT LLM KV cache block metrics", "kv_cache_block_type", ("max", "free", "used", "tokens_per", "fraction")),
    "nv_trt_llm_inflight_batcher_metrics": (
        "TRT LLM inflight_batcher-specific metrics", "inflight_batcher_specific_metric",
        ("total_context_tokens", "generation_requests", "micro_batch_id", "paused_requests")),
    "nv_trt_llm_general_metrics": ("General TRT LLM metrics", "general_type", ("iteration_counter",)),
    "memshare_blocks": (
        "KV blocks freed by sharing, since the start", "block_type", ("shared",)),
    "memshare_saved_bytes": ("Bytes of KV cache freed by sharing, since the start", "unit", ("bytes",)),
    "memshare_search": (
        "The block search, since the start: candidate pairs compared, and seconds", "search_metric",
        ("candidates", "seconds")),
}  # fmt: skip
"""By name: description, label, and the label's values (facts: TensorRT-LLM's Triton backend)."""

REFUSED = "memshare_refused"
"""Candidates and decisions turned down since the start, by ``reason``; reasons appear as they occur."""


def gauge_values(status: ExecutorStatus, max_requests: int, bytes_per_block: int) -> dict[str, dict[str, float]]:
    """Value of every gauge by name and label value.

    Args:
      status: of the executor.
      max_requests: most requests in flight.
      bytes_per_block: of all layers.
    """
    free = status.max_blocks - status.used_blocks
    return {
        "nv_trt_llm_request_metrics": {
            "active": status.num_active + status.num_waiting,
            "max": max_requests,
            "scheduled": status.num_active,
            "context": status.num_context,
            "waiting": status.num_waiting,
        },
        "nv_trt_llm_kv_cache_block_metrics": {
            "max": status.max_blocks,
            "free": free,
            "used": status.used_blocks,
            "tokens_per": status.tokens_per_block,
            "fraction": status.used_blocks / status.max_blocks,
        },
        "nv_trt_llm_inflight_batcher_metrics": {
            "total_context_tokens": status.num_context_tokens,
            "generation_requests": status.num_generating,
            "micro_batch_id": 0,
            "paused_requests": status.num_pauses,
        },
        "nv_trt_llm_general_metrics": {"iteration_counter": status.num_steps},
        "memshare_blocks": {"shared": status.shared_blocks},
        "memshare_saved_bytes": {"bytes": status.shared_blocks * bytes_per_block},
        "memshare_search": {"candidates": status.num_candidates, "seconds": status.search_seconds},
    }


class TritonMetrics:
    """Keeps Triton's gauges in step with the executor.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      labels: of the model: ``model`` and ``version``.
    """

    def __init__(self, pb_utils: Any, labels: dict[str, str]) -> None:
        self._labels, self._families, self._metrics = labels, dict[str, Any](), dict[tuple[str, str], Any]()
        kind = pb_utils.MetricFamily.GAUGE
        for name, (description, label, values) in GAUGES.items():
            self._families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)
            for value in values:
                self._add(name, label, value)
        self._families[REFUSED] = pb_utils.MetricFamily(
            name=REFUSED, description="Candidates and decisions turned down, since the start", kind=kind
        )

    def update(self, values: dict[str, dict[str, float]], refused: dict[str, int]) -> None:
        """Sets every gauge."""
        for name, by_label in values.items():
            for label_value, value in by_label.items():
                self._metrics[name, label_value].set(float(value))
        for reason, count in refused.items():
            if (REFUSED, reason) not in self._metrics:
                self._add(REFUSED, "reason", reason)
            self._metrics[REFUSED, reason].set(float(count))

    def close(self) -> None:
        """Metrics go before their families, as Triton wants it."""
        self._metrics.clear()
        self._families.clear()

    def _add(self, family: str, label: str, value: str) -> None:
        self._metrics[family, value] = self._families[family].Metric(labels={**self._labels, label: value})
