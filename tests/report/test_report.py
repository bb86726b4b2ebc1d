"""The table, the picture and the machine's description, from a made-up report."""

from __future__ import annotations

import copy
import re
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from trtllm_memshare.evaluation.machine import describe_machine, one_line
from trtllm_memshare.report import plots
from trtllm_memshare.report.plots import plot_report
from trtllm_memshare.report.tables import COLUMNS, variants_table

MACHINE = {
    "cpu": "Example CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "driver": None,
    "gpu": None,
    "platform": "Linux x86_64",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "numpy": "1.26.4",
    "commit": None,
}


def variant(name: str, requests_per_s: float, accuracy: float | None) -> dict[str, Any]:
    return {
        "variant": name,
        "request_throughput_req_s": requests_per_s,
        "system_output_throughput_tok_s": 1234.4,
        "avg_request_latency_ms": 800.0,
        "request_latency_percentiles_ms": {
            "p50": 500.4,
            "p90": 900.0,
            "p95": 950.0,
            "p99": 990.6,
            "minimum": 100.0,
            "maximum": 999.0,
            "average": 500.0,
        },
        "avg_ttft_ms": 77.0,
        "avg_tpot_ms": 9.0,
        "accuracy": accuracy,
        "correct_answers_per_s": None if accuracy is None else accuracy * requests_per_s,
        "mean_output_tokens": 700.2,
        "peak_used_blocks": 90,
        "mean_resident_blocks_per_request": 12.34,
        "block_seconds_per_request": 5.0,
        "shared_block_fraction": 0.431,
        "paused_requests": 17,
        "search_time_fraction": 0.0249,
        "timeline": {"time_s": [0.0, 1.0, 2.0], "used_blocks": [10, 90, 0], "requests_in_flight": [1, 8, 0]},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "command": "python benchmarks/inflight_batching.py",
        "date": "2026-01-02",
        "machine": copy.deepcopy(MACHINE),
        "engine": {"engine_dir": "engines/example", "backend": "torch", "tokens_per_block": 16},
        "dataset": {"path": "benchmarks/data/demo.jsonl", "num_requests": 20},
        "kv_cache_blocks": 100,
        "scheduler_policy": "MAX_UTILIZATION",
        "seed": 0,
        "variants": [variant("full", 2.0, 0.95), variant("aligned", 3.5, 0.9)],
    }


def cells(report: dict[str, Any]) -> dict[str, list[str]]:
    """Cells by column title, taken from the Markdown table."""
    lines = [line for line in variants_table(report, markdown=True).splitlines() if line.startswith("|")]
    titles, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---", "---:"}
    return dict(zip(titles, zip(*rows, strict=True), strict=True))


def test_figures_and_units_of_the_table(report):
    found = cells(report)
    assert list(found) == [title for title, _ in COLUMNS]
    assert found["variant"] == ("full", "aligned")
    assert found["right %"] == ("95.0", "90.0")
    assert found["shared %"] == ("43.1", "43.1")
    assert found["req/s"] == ("2.00", "3.50")
    assert found["right/s"] == ("1.90", "3.15")
    assert found["tok/s"] == ("1234", "1234")
    assert found["p50 ms"] == ("500", "500")
    assert found["p99 ms"] == ("991", "991")
    assert found["TTFT ms"] == ("77", "77")
    assert found["blocks/req"] == ("12.3", "12.3")
    assert found["paused"] == ("17", "17")
    assert found["search %"] == ("2.5", "2.5")


def test_what_is_not_there_is_a_dash(report):
    report["variants"] = [variant("full", 2.0, None)]
    found = cells(report)
    assert found["right %"] == found["right/s"] == ("-",)
    assert found["in flight"] == ("-",)


def test_plain_table_is_aligned_and_says_what_was_measured(report):
    table, legend = variants_table(report).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 4
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [line.split()[0] for line in lines[2:]] == ["full", "aligned"]
    assert lines[2].split()[1:] == [c[0] for title, c in cells(report).items() if title != "variant"]
    for part in ("20 requests of benchmarks/data/demo.jsonl", "100 blocks of 16 tokens", "MAX_UTILIZATION", "seed 0"):
        assert part in legend
    assert one_line(report["machine"]) in legend


@pytest.mark.parametrize("accuracy", [0.9, None])
def test_the_picture_has_three_panels_with_a_line_per_variant(report, tmp_path, monkeypatch, accuracy):
    report["variants"] = [variant(name, 1.0, accuracy) for name in ("full", "aligned", "random")]
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    plot_report(report, tmp_path / "r.png")
    monkeypatch.undo()
    bars, blocks, flight = figures[0].axes
    assert len(bars.patches) == (3 if accuracy is None else 6)
    assert [t.get_text() for t in bars.get_yticklabels()] == ["full", "aligned", "random"]
    assert [list(line.get_ydata()) for line in flight.lines] == [[1, 8, 0]] * 3
    *used, pool = blocks.lines
    assert [list(line.get_ydata()) for line in used] == [[10, 90, 0]] * 3
    assert set(pool.get_ydata()) == {100}
    assert len({line.get_color() for line in flight.lines}) == 3
    title = figures[0].get_suptitle()
    assert all(part in title for part in ("engines/example", "20 requests", "100 blocks of 16 tokens"))
    plots.plt.close(figures[0])
    pixels = matplotlib.image.imread(tmp_path / "r.png")
    assert pixels.shape[1] > 1000
    assert np.ptp(pixels) > 0.5


def test_every_variant_has_its_own_colour():
    from trtllm_memshare.evaluation.variants import VARIANTS

    assert len(set(plots.COLOURS)) == len(plots.COLOURS) >= len(VARIANTS)


def test_the_machine_is_described():
    machine = describe_machine()
    assert set(machine) == set(MACHINE)
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert machine["numpy"] == np.__version__
    assert machine["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}", machine["commit"])
    assert machine["cpu"] in one_line(machine)


def test_a_gpu_is_named():
    assert "no GPU" in one_line(MACHINE)
    assert "Example GPU" in one_line({**MACHINE, "gpu": "Example GPU"})
