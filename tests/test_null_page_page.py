"""The page on null pages: its tables are those of the committed results, and what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.studies.null_page.tables import calibration_table, signatures_table, traces_table
from trtllm_memshare.engine.null_page import TARGET_GAP, NullPageRefused
from trtllm_memshare.engine.null_page_build import calibrate_checkpoint
from trtllm_memshare.search.signatures import WIDTH

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "null_page.md").read_text()


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("null_page", calibration_table),
        ("null_page", traces_table),
        ("signatures", signatures_table),
    ],
)
def test_figures_are_those_of_the_committed_results(name, table):
    assert table(result(name)) in PAGE
    assert result(name)["command"] in PAGE


def test_traces_stay_within_what_calibration_promised():
    """Measured on texts of another kind than the one calibrated on; the goal is 20 nats below the real keys."""
    report = result("null_page")
    assert report["calibration"]["worst_gap"] <= TARGET_GAP
    assert max(row["worst_gap"] for row in report["rows"]) <= TARGET_GAP
    assert len({row["model"] for row in report["rows"]}) >= 4


def test_signatures_rank_pages_as_the_exact_measure_does():
    report = result("signatures")
    assert len(report["rows"]) >= 5
    assert min(row[form] for row in report["rows"] for form in (f"v_{WIDTH}", f"k_{WIDTH}")) >= 0.9


def test_the_bundled_model_is_refused_by_name(bundled_model):
    with pytest.raises(NullPageRefused, match=r"no null page is found for layer 3, head \d"):
        calibrate_checkpoint(bundled_model, 4096, "float32")


def test_named_paths_exist():
    named = re.findall(r"`((?:trtllm_memshare|benchmarks|build_scripts|docs)/[\w./]+)`", PAGE)
    assert len(set(named)) > 3
    for path in named:
        assert (ROOT / path).exists(), path
