"""The table of every arm in every pool, of several results of one set of requests; what no clock has a part in."""

from __future__ import annotations

from typing import Any

PAPER = "need=nearest-earlier,retired_becomes=alias"
ARMS = {
    "full": "`full` (MAX_UTILIZATION)",
    "full-guaranteed": "`full` (GUARANTEED_NO_EVICT)",
    "aligned": "`aligned`",
    "pressure:min_kept=0.75": "three quarters kept",
    "pressure:min_kept=0.5": "a half kept",
    "pressure": "a half kept",
    "pressure:need=surprisal-led-redundancy-recency": "a half kept, with recency, the default now",
    "pressure:min_kept=0.5,need=random": "a half kept, random pages",
    "pressure:need=random": "a half kept, random pages",
    "pressure:min_kept=0.25": "a quarter kept",
    f"pressure:min_kept=0.62,{PAPER}": "the paper's choice, at most 38 % given up",
    f"pressure:min_kept=0.53,{PAPER}": "the paper's choice, at most 47 %",
}
"""In the table's order; other variants of the results are passed over."""


def every_arm(reports: list[dict[str, Any]]) -> str:
    """One row for each pool and arm: steps, what the modelled clock makes of them, pauses, what was given up and lost.

    Args:
      reports: results of ``inflight_batching.py`` over the same requests, several for a pool. An arm that several have
        is taken from the first.

    Raises:
      ValueError: results of one pool whose full caches did not take the same steps.
    """
    pools: dict[int, dict[str, dict[str, Any]]] = {}
    for report in reports:
        known = pools.setdefault(report["kv_cache_blocks"], {})
        for row in report["variants"]:
            name = row["variant"]
            if name == "full" and known.get(name, row)["num_steps"] != row["num_steps"]:
                raise ValueError(f"{report['kv_cache_blocks']} blocks: full took {row['num_steps']} steps here")
            known.setdefault(name, row)
    loses_answers = reports[0]["variants"][0].get("loss_nats_per_token") is None
    lost_name = "right" if loses_answers else "Δ loss"
    lines = [
        "| blocks | arm | steps | in flight | requests/s, modelled | p50 / p99 of `full`'s p50, modelled | paused | "
        f"recomputed | given up | {lost_name} |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for blocks, rows in sorted(pools.items()):
        full, usual = _rate(rows["full"]), rows["full"]["modelled_gpu"]["p50_latency_s"]
        for name, shown in ARMS.items():
            if name in rows:
                row = rows[name]
                lost = _percent(row["accuracy"], 1) if loses_answers else f"{_loss(row) - _loss(rows['full']):+.4f}"
                p50, p99 = (row["modelled_gpu"][f"{at}_latency_s"] / usual for at in ("p50", "p99"))
                lines.append(
                    f"| {blocks:,} | {shown} | {row['num_steps']:,} | {row['mean_requests_in_flight']:.1f} | "
                    f"{_rate(row) / full:.2f} | {p50:.2f} / {p99:.2f} | "
                    f"{row['paused_requests']} | {row['recomputed_tokens']:,.0f} | "
                    f"{_percent(row['shared_block_fraction'])} | {lost} |"
                )
    return "\n".join(lines)


def _percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def _loss(row: dict[str, Any]) -> float:
    """Of the tokens that were written, the same in every arm; nats a token."""
    return row["loss_nats_per_token"]


def _rate(row: dict[str, Any]) -> float:
    return row["modelled_gpu"]["request_throughput_req_s"]
