"""What the study's two commands measure, each over any number of benchmark runs, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions, parse_setting
from trtllm_memshare.evaluation.statistics import wilson_interval

Report = dict[str, Any]
Run = Callable[[BenchmarkOptions], Report]
"""Runs a benchmark; gives its report."""

_OF_SETTINGS = (
    "accuracy", "shared_block_fraction", "block_steps_per_request", "mean_output_tokens", "rejected", "refused",
    "paused_requests", "num_steps",
)  # fmt: skip
_OF_POOLS = (
    "variant", "request_throughput_req_s", "correct_answers_per_s", "accuracy", "shared_block_fraction",
    "mean_requests_in_flight", "mean_resident_blocks_per_request", "paused_requests", "mean_step_ms",
    "mean_output_tokens", "search_time_fraction",
)  # fmt: skip
FULL_CACHES = ("full", "full-guaranteed")


def sweep_settings(options: BenchmarkOptions, variant: str, values: Sequence[str], run: Run) -> Report:
    """One variant with each of the values, after the full cache, on the same problems.

    Args:
      values: each ``key=value``, or several joined by commas.
    """
    full = run(replace(options, variants=("full",)))
    found = [("full", full)]
    for text in values:
        settings = tuple(parse_setting(part) for part in text.split(","))
        found.append((text, run(replace(options, variants=(variant,), settings=settings))))
    count, rows = full["dataset"]["num_requests"], []
    for text, report in found:
        row = {"values": text, **{name: report["variants"][0][name] for name in _OF_SETTINGS}}
        rows.append({**row, "interval": wilson_interval(round(row["accuracy"] * count), count)})
    return {
        "dataset": full["dataset"],
        "variant": variant,
        "kv_cache_blocks": full["kv_cache_blocks"],
        "samples": options.samples,
        "temperature": options.temperature,
        "rows": rows,
    }


def settings_table(report: Report) -> str:
    """Share and accuracy of each value, with Wilson's 95 % interval."""
    lines = [f"{report['variant']:<32} {'shared':>7} {'right':>7}  95 % interval"]
    for row in report["rows"]:
        low, high = row["interval"]
        shown = f"{row['values']:<32} {row['shared_block_fraction']:>7.1%} {row['accuracy']:>7.1%}"
        lines.append(f"{shown}  {low:.1%} to {high:.1%}")
    return "\n".join(lines)


def measure_pools(options: BenchmarkOptions, shares: Sequence[float], repeat: int, run: Run) -> Report:
    """``aligned`` beside the full cache in pools that are a share of the full cache's peak demand."""
    free = {row["variant"]: row for row in run(replace(options, variants=("full", "aligned")))["variants"]}
    demand = free["full"]["peak_used_blocks"]
    saved = 1 - free["aligned"]["mean_resident_blocks_per_request"] / free["full"]["mean_resident_blocks_per_request"]
    points = []
    for share in shares:
        blocks = max(1, round(demand * share))
        three = replace(options, variants=(*FULL_CACHES, "aligned"), kv_cache_blocks=blocks, repeat=repeat)
        variants = [{name: row[name] for name in _OF_POOLS} for row in run(three)["variants"]]
        points.append({"share": share, "kv_cache_blocks": blocks, **_ratios(variants), "variants": variants})
    return {
        "dataset": {"path": str(options.dataset), "num_requests": options.num_requests},
        "peak_demand_blocks": demand,
        "resident_blocks_saved": saved,
        "ceiling": 1 / (1 - saved),
        "points": points,
    }


def _ratios(variants: list[Report]) -> dict[str, float | None]:
    """``aligned`` over the full cache: in throughput over the better of its two policies, else over ``full``.

    None of right answers, where the problems do not all have one.
    """
    by_name = {row["variant"]: row for row in variants}
    full, aligned = by_name["full"], by_name["aligned"]

    def over_the_better(key: str) -> float | None:
        of_full = [by_name[name][key] for name in FULL_CACHES]
        return None if None in (aligned[key], *of_full) else float(aligned[key] / max(of_full))

    return {
        "ratio": over_the_better("request_throughput_req_s"),
        "right_ratio": over_the_better("correct_answers_per_s"),
        "in_flight_ratio": aligned["mean_requests_in_flight"] / full["mean_requests_in_flight"],
        "step_time_ratio": aligned["mean_step_ms"] / full["mean_step_ms"],
    }


def pools_table(report: Report) -> str:
    """The ratios by size of the pool."""
    lines = [f"{'pool / demand':>13} {'blocks':>7} {'req/s ratio':>12} {'in flight':>10} {'step time':>10}"]
    lines += [
        f"{p['share']:>13.3f} {p['kv_cache_blocks']:>7} {p['ratio']:>12.2f} {p['in_flight_ratio']:>10.2f} "
        f"{p['step_time_ratio']:>10.2f}"
        for p in report["points"]
    ]
    saved, ceiling = report["resident_blocks_saved"], report["ceiling"]
    return "\n".join([*lines, f"ratios: aligned over the better full; ceiling 1 / (1 - {saved:.2f}) = {ceiling:.2f}"])
