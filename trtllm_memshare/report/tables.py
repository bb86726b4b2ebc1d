"""Plain-text and Markdown tables of a benchmark report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trtllm_memshare.evaluation.machine import one_line

_Column = tuple[str, Callable[[dict[str, Any]], str]]


def _percent(key: str, digits: int = 1) -> Callable[[dict[str, Any]], str]:
    return lambda v: "-" if v.get(key) is None else f"{100 * v[key]:.{digits}f}"


def _number(key: str, digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda v: "-" if v.get(key) is None else f"{v[key]:.{digits}f}"


def _latency(percentile: str) -> Callable[[dict[str, Any]], str]:
    return lambda v: _number(percentile, 0)(v["request_latency_percentiles_ms"] or {})


COLUMNS: list[_Column] = [
    ("variant", lambda v: str(v["variant"])),
    ("right %", _percent("accuracy")),
    ("shared %", _percent("shared_block_fraction")),
    ("req/s", _number("request_throughput_req_s", 2)),
    ("right/s", _number("correct_answers_per_s", 2)),
    ("tok/s", _number("system_output_throughput_tok_s", 0)),
    ("p50 ms", _latency("p50")),
    ("p99 ms", _latency("p99")),
    ("TTFT ms", _number("avg_ttft_ms", 0)),
    ("tokens", _number("mean_output_tokens", 0)),
    ("blocks/req", _number("mean_resident_blocks_per_request", 1)),
    ("peak", lambda v: str(v["peak_used_blocks"])),
    ("in flight", _number("mean_requests_in_flight", 1)),
    ("paused", lambda v: str(v["paused_requests"])),
    ("steps", lambda v: str(v.get("num_steps", "-"))),
    ("search %", _percent("search_time_fraction")),
]

_LEGEND = (
    "shared: blocks freed by sharing / blocks filled by generation; TTFT: mean time to first token; tokens: mean "
    "output\nblocks/req: mean blocks held by a request in flight; peak: most blocks in use; in flight: mean requests "
    "running\npaused: times a request gave its blocks back; steps: of the whole run; search: share of step time"
)


def variants_table(report: dict[str, Any], markdown: bool = False) -> str:
    """One row per variant, one column per figure, and below it what it was measured on.

    Args:
      report: as `benchmarks/inflight_batching.py` writes it.
      markdown: pipes and a rule instead of aligned columns.
    """
    rows = [[title for title, _ in COLUMNS]]
    rows += [[cell(variant) for _, cell in COLUMNS] for variant in report["variants"]]
    note = (
        f"{report['dataset']['num_requests']} requests of {report['dataset']['path']}, KV pool "
        f"{report['kv_cache_blocks']} blocks of {report['engine']['tokens_per_block']} tokens, "
        f"{report['scheduler_policy']}, seed {report['seed']}, {report['date']}\n{one_line(report['machine'])}"
    )
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "| --- |" + " ---: |" * (len(COLUMNS) - 1))
        return "\n".join([*lines, "", f"{_LEGEND}.", "", note])
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", _LEGEND, note])
