"""The table of every arm in every pool: steps, times, pauses, what was given up and what that cost."""

from __future__ import annotations

from typing import Any

PAPER = "need=nearest-earlier,retired_becomes=alias"
ARMS = {
    "full": "`full` (MAX_UTILIZATION)",
    "full-guaranteed": "`full` (GUARANTEED_NO_EVICT)",
    "aligned": "`aligned`",
    "pressure:min_kept=1": "all kept that stands once",
    "pressure:min_kept=0.75": "three quarters kept",
    "pressure:min_kept=0.5": "a half kept",
    "pressure:min_kept=0.5,need=random": "a half kept, random pages",
    "pressure:min_kept=0.25": "a quarter kept",
    f"pressure:min_kept=0.62,{PAPER}": "the paper's choice, at most 38 % given up",
    f"pressure:min_kept=0.53,{PAPER}": "the paper's choice, at most 47 %",
}
"""In the table's order; other variants of the results are passed over."""


def every_arm(reports: dict[str, Any] | list[dict[str, Any]]) -> str:
    """One row for each pool and arm. Times and rates compare within a pool: its arms ran one after the other.

    Args:
      reports: a result of ``inflight_batching.py``, or one for each pool.

    Raises:
      ValueError: two results of one pool, whose times were taken in two runs.
    """
    reports = [reports] if isinstance(reports, dict) else reports
    pools = {report["kv_cache_blocks"]: {row["variant"]: row for row in report["variants"]} for report in reports}
    if len(pools) < len(reports):
        raise ValueError(f"times of one pool must be of one run, got {len(reports)} results of {len(pools)} pools")
    loses_answers = reports[0]["variants"][0].get("loss_nats_per_token") is None
    lines = [
        "| blocks | arm | steps | in flight | requests/s | modelled GPU | p50, s | p99, s | first token, s | paused | "
        f"recomputed | given up | {'right' if loses_answers else 'Δ loss'} | machinery |",
        "| ---: | --- |" + " ---: |" * 12,
    ]
    for blocks, rows in sorted(pools.items()):
        full = rows["full"]
        for name, shown in ARMS.items():
            if name in rows:
                row = rows[name]
                loss = None if loses_answers else row["loss_nats_per_token"] - full["loss_nats_per_token"]
                lost = f"{row['accuracy'] * 100:.1f} %" if loss is None else f"{loss:+.4f}"
                times = row["request_latency_percentiles_ms"]
                seconds = (ms / 1000 for ms in (times["p50"], times["p99"], row["avg_ttft_ms"]))
                lines.append(
                    f"| {blocks:,} | {shown} | {row['num_steps']:,} | {row['mean_requests_in_flight']:.1f} | "
                    f"{row['request_throughput_req_s'] / full['request_throughput_req_s']:.2f} | "
                    f"{_modelled_rate(row) / _modelled_rate(full):.2f} | {' | '.join(map(_seconds, seconds))} | "
                    f"{row['paused_requests']} | {row['recomputed_tokens']:,.0f} | "
                    f"{row['shared_block_fraction'] * 100:.0f} % | {lost} | {row['search_time_fraction'] * 100:.2f} % |"
                )
    return "\n".join(lines)


def _modelled_rate(row: dict[str, Any]) -> float:
    return row["modelled_gpu"]["request_throughput_req_s"]


def _seconds(value: float) -> str:
    """Three digits, or whole seconds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
