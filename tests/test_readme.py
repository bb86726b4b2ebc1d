"""The README: its tables are those of the committed reports, its paths and targets exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trtllm_memshare.report.tables import variants_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["evaluation", "hard", "pressure_fold"])
def test_tables_are_the_committed_reports(name):
    table = variants_table(json.loads((RESULTS / f"{name}.json").read_text()), markdown=True)
    for line in table.splitlines():
        assert line in README


def test_named_paths_exist():
    named = set(re.findall(r"`((?:trtllm_memshare|benchmarks|build_scripts|tests|search|cache)/[\w./]*)`", README))
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "trtllm_memshare" / path).exists(), path


def test_named_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^ +|`)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
