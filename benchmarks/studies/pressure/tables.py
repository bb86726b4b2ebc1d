"""The table of schedules at size, as `docs/pressure.md` shows it."""

from __future__ import annotations

from typing import Any


def schedule_table(report: dict[str, Any]) -> str:
    """One row for each pool and arm; requests/s against the better full cache of the same pool."""
    lines = [
        "| pool | arm | steps | in flight | requests/s | p50 / p99, s | paused | recomputed tokens | given up |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(report["rows"], key=lambda row: row["pool_share"]):
        gpu = row["modelled_gpu"]
        full = max(
            other["modelled_gpu"]["request_throughput_req_s"]
            for other in report["rows"]
            if other["pool_share"] == row["pool_share"] and other["variant"] in ("full", "full-guaranteed")
        )
        lines.append(
            f"| {row['pool_share']:g} | `{row['variant']}` | {row['num_steps']:,} | {row['mean_in_flight']:.1f} | "
            f"{gpu['request_throughput_req_s'] / full:.2f} | {gpu['p50_latency_s']:.0f} / {gpu['p99_latency_s']:.0f} | "
            f"{row['paused_requests']} | {row['recomputed_tokens']:,.0f} | {row['shared_block_fraction']:.0%} |"
        )
    return "\n".join(lines).replace("% |", " % |")
