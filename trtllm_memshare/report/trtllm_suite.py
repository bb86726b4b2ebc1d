"""The summary of benchmarks/trtllm_suite.sh as text, in NVIDIA's order: accuracy, activity, speed."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.evaluation.trtllm_suite import ALONE, is_active


def suite_table(rows: dict[str, dict[str, Any]]) -> str:
    """Lines for the arms of ``read_arms``."""
    has_answers = rows["alone"]["right"] is not None
    lines = [
        "1 accuracy against TensorRT-LLM alone" + ("" if has_answers else " (no answers in the data set: tokens only)")
    ]
    for arm, row in rows.items():
        right = "" if row["right"] is None else f"{row['right']:>7.1%} right"
        lines.append(f"  {arm:<12} {right} {row['different_answers']:>6} answers differ")
    lines.append("2 activity")
    for arm, row in rows.items():
        if arm not in ALONE:
            pages = f"{row['pages_shared']:>8} shared {row['pages_forgotten']:>8} given up"
            lines.append(f"  {arm:<12} {pages} {row['memshare'].get('blocks_shadowed', 0):>8} in shadow")
    lines.append("3 A/B: requests a second, tokens a second, requests in flight")
    for arm, row in rows.items():
        if arm in ALONE or is_active(arm, row):
            speed = (
                f"{row['request_throughput_req_s']:>8.2f} ({row['ratio']:.2f}) {row['output_throughput_tok_s']:>9.0f}"
            )
            lines.append(f"  {arm:<12} {speed} {row['mean_requests_in_flight']:>7.1f}")
    return "\n".join(lines)
