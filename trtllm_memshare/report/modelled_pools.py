"""Modelled requests per second by pool, as `docs/pytorch_backend.md` shows them."""

from __future__ import annotations

from typing import Any


def ratios_by_pool(report: dict[str, Any]) -> str:
    """One row for each pool: what TensorRT-LLM does alone, and how many times its requests/s each floor gives
    with null entries skipped / read like any other."""
    arms = [arm for arm in dict.fromkeys(row["preset"] for row in report["rows"]) if arm != "full"]
    lines = [
        f"| pool | alone: in flight | pauses | {' | '.join(f'`{arm}`' for arm in arms)} |",
        "| ---: | ---: | ---: |" + " ---: |" * len(arms),
    ]
    for share in dict.fromkeys(row["share"] for row in report["rows"]):
        rows = {row["preset"]: row for row in report["rows"] if row["share"] == share}
        alone = rows["full"]
        gains = " | ".join(_cell(rows[arm]) for arm in arms)
        lines.append(f"| {share:g} | {alone['mean_requests_in_flight']:.1f} | {alone['paused']:,} | {gains} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} / {row['ratio_null_read']:.2f} times, {row['paused']:,} pauses"
