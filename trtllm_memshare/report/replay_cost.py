"""The table of benchmarks/trace_replay.py."""

from __future__ import annotations

from typing import Any


def replay_cost_table(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each variant of ``summarize``."""
    lines = [f"{'variant':<14} {'step ms':>8} {'over off':>9} {'from':>7} {'to':>7} {'pairs':>6} {'search':>7} "
             f"{'shared':>7} {'blocks, mean':>13} {'peak':>6} {'last ms':>8}"]  # fmt: skip
    for name, row in rows.items():
        over = [row["over_off"], *row.get("over_off_range", [None, None])]
        costs = " ".join(("-" if o is None else f"{o:+.1%}").rjust(w) for o, w in zip(over, (9, 7, 7), strict=True))
        shares = f"{row['search_time_fraction']:>7.1%} {row['shared_block_fraction']:>7.1%}"
        blocks = f"{row['mean_used_blocks']:>13.0f} {row['peak_used_blocks']:>6} {row['step_ms_last_tenth']:>8.2f}"
        lines.append(f"{name:<14} {row['step_ms_mean']:>8.2f} {costs} {row['pairs_compared']:>6} {shares} {blocks}")
    return "\n".join(lines)
