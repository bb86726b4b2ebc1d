"""The tables of docs/null_page.md, from the committed results."""

from __future__ import annotations

import re
from typing import Any


def calibration_tokens(report: dict[str, Any]) -> int:
    """Tokens of all calibration texts."""
    return sum(report["calibration_tokens"])


def calibration_table(report: dict[str, Any]) -> str:
    """What calibration found."""
    found, worst = report["calibration"], report["worst_heads"][0]
    rows = [
        ("tokens read", f"{sum(report['calibration_tokens']):,}"),
        ("positions of a band", f"{found['bands'][1]:,}"),
        ("worst gap on the text that nothing was fitted on", f"{found['worst_gap']:.1f} nats"),
        ("of", f"layer {worst['layer']}, head {worst['head']}"),
        ("length of K, median / largest", f"{found['median_length']:.0f} / {found['longest']:.0f}"),
        (
            "tokens of the vocabulary that come nearer than 20 nats in the first layer",
            f"{found['near_tokens']:,} of {found['num_tokens']:,}",
        ),
    ]
    return "\n".join(["| calibration | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def traces_table(report: dict[str, Any]) -> str:
    """Gaps on real traces."""
    lines = ["| trace of | queries of all heads | worst gap, nats | nearer than 20 |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['model']} | {row['queries']:,} | {row['worst_gap']:.1f} | {row['nearer_than_target']} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def parts_table(report: dict[str, Any]) -> str:
    """Worst gaps on long real traces, by part."""
    ends = [part["end"] for part in report["rows"][0]["parts"]]
    names = " | ".join(f"to {end:,}" for end in ends)
    lines = [f"| trace of | queries of all heads | {names} | nearer than 20 |", "| --- |" + " ---: |" * (len(ends) + 2)]
    for row in report["rows"]:
        gaps = " | ".join(f"{part['worst_gap']:.1f}" for part in row["parts"])
        lines.append(f"| {row['model']} | {row['queries']:,} | {gaps} | {row['nearer_than_target']} |")
    return "\n".join(lines)


def nearest(report: dict[str, Any]) -> float:
    """Nats between the nearest query and the real keys."""
    return -max(row["worst_gap"] for row in report["rows"])


def signatures_table(report: dict[str, Any]) -> str:
    """Correlations, by text and form."""
    forms = ("v_16", "v_32", "v_64", "k_16", "k_32", "k_64")
    names = " | ".join(f"{form[0].upper()}, {form[2:]}" for form in forms)
    lines = [f"| text of | {names} |", "| --- |" + " ---: |" * len(forms)]
    for row in report["rows"]:
        lines.append(f"| {row['model']} | " + " | ".join(f"{row[form]:.3f}" for form in forms) + " |")
    lines.append("| mean | " + " | ".join(f"{report['mean'][form]:.3f}" for form in forms) + " |")
    return "\n".join(lines)


def pools_table(report: dict[str, Any]) -> str:
    """Gaps by the pool's element type."""
    lines = [
        "| pool | length of K | worst gap on held-out text, nats | on real traces | of them nearer than 20 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        if "refused" in row:
            found = re.search(r"(layer \d+, head \d+) .* lies ([\d.]+) nats below", row["refused"])
            assert found is not None
            lines.append(f"| {row['pool']} | refused | -{found[2]} ({found[1]}) | | |")
            continue
        lines.append(
            f"| {row['pool']} | {row['shortest_key']:.0f} to {row['longest_key']:.0f} | {row['worst_gap']:.1f} | "
            f"{row['worst_gap_traces']:.1f} | {row['nearer_than_target']} of {row['queries']:,} |"
        )
    return "\n".join(lines)
