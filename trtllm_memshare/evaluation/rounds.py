"""Several rounds of one variant as one entry of the benchmark's report."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from trtllm_memshare.evaluation.benchmark import Measurement

_TIMES = (
    "total_latency_ms",
    "request_throughput_req_s",
    "system_output_throughput_tok_s",
    "avg_request_latency_ms",
    "request_latency_percentiles_ms",
    "ttft_percentiles_ms",
    "avg_ttft_ms",
    "avg_tpot_ms",
    "correct_answers_per_s",
    "block_seconds_per_request",
    "mean_resident_blocks_per_request",
    "mean_requests_in_flight",
    "search_time_fraction",
    "mean_step_ms",
    "requests_per_cpu_s",
)
"""Figures that depend on the clock: over several rounds the median is reported."""


def merge_rounds(rounds: list[Measurement], full: Measurement | None) -> dict[str, Any]:
    """One entry from several rounds: medians of times, the rest from the first; with agreement against `full`."""
    entry = dict(rounds[0].entry)
    entry.update({name: _median([m.entry[name] for m in rounds]) for name in _TIMES})
    entry["request_throughput_rounds_req_s"] = [m.entry["request_throughput_req_s"] for m in rounds]
    if full is not None:
        same = [a.token_ids == b.token_ids for a, b in zip(rounds[0].results, full.results, strict=True)]
        entry["same_tokens_as_full"] = sum(same) / len(same)
        pairs = list(zip(full.right, rounds[0].right, strict=True))
        entry["answers_lost"] = sum(before and not after for before, after in pairs)
        if full.loss:
            entry["loss_change"] = float(np.mean(np.array(rounds[0].loss) - full.loss))
        entry["answers_gained"] = sum(after and not before for before, after in pairs)
    return entry


def _median(values: list[Any]) -> Any:
    """Of numbers, of dicts entry by entry; None where there is none."""
    if isinstance(values[0], dict):
        return {key: _median([value[key] for value in values]) for key in values[0]}
    return None if None in values else statistics.median(values)
