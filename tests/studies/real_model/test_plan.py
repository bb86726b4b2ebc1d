"""Every committed row is one that ``all.sh`` makes, and the other way round."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks.studies.real_model.plan import PLAN
from benchmarks.studies.real_model.timing import RESULTS, arms_of, parts
from trtllm_memshare.evaluation.free_generation import DECODINGS
from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, PRESETS
from trtllm_memshare.evaluation.real_rows import read_rows

ROOT = Path(__file__).parents[3]
SCRIPT = (ROOT / "benchmarks/studies/real_model/all.sh").read_text(encoding="utf-8")
PAGES = ("real_model.md", "real_model_figures.md")
TEXTS = {"recall": 52}
"""Of modules that ``all.sh`` does not tell how many."""


def test_the_plan_has_every_committed_row_and_no_more():
    rows = read_rows(ROOT / "benchmarks/results/real_model.jsonl")
    there = Counter((r["arm"], r["min_kept"], r["tokens_per_block"]) for r in rows if r["arm"] != "full")
    planned = {
        (task.arm, 1.0 if task.arm in PRESETS else task.budget.min_kept, task.pages_merged * PAGE_TOKENS): len(texts)
        for task, texts in PLAN.items()
    }
    assert there == planned


def test_all_sh_makes_the_committed_rows_of_every_other_file_and_no_more():
    planned: dict[Path, Counter] = {}
    for path, words in parts(SCRIPT):
        if arms_of(words):
            count = int(words[words.index("--texts") + 1]) if "--texts" in words else TEXTS[words[0]]
            times = len(DECODINGS) if words[0] == "generation" else 1
            kept = float(words[words.index("--min-kept") + 1]) if "--min-kept" in words else 0.5
            kinds = {("full", None), *((arm, kept) for arm in arms_of(words) if arm != "full")}
            planned[path] = planned.get(path, Counter()) | Counter(dict.fromkeys(kinds, count * times))
    there = {path: Counter(kind_of(row) for row in read_rows(ROOT / path)) for path in planned}
    assert there == planned
    assert len(there) == 13


def kind_of(row):
    """An arm and the share that it keeps; the full cache keeps all."""
    return row["arm"], None if row["arm"] == "full" else row.get("min_kept", 0.5)


def test_what_no_command_makes_is_named_on_a_page():
    """Rows of what was tried and is gone, each with the commit that has its code."""
    made = {path.name for path, _ in parts(SCRIPT)}
    others = {path.name for path in (ROOT / RESULTS).iterdir() if path.is_file()} - made - {"row_times.json"}
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES)
    learned = {"learned_attention.jsonl", "learned_recall.jsonl", "learned_correlation.json"}
    assert others == {"groups.jsonl", "recall_peak.jsonl"} | learned
    assert all(f"`{name}`" in pages for name in others)


def test_the_time_of_every_command_is_measured():
    timed = {part["file"]: part for part in json.loads((ROOT / RESULTS / "row_times.json").read_text())["parts"]}
    for path, words in parts(SCRIPT):
        part = timed[path.name]
        assert part["core_hours"] > 0
        if words[0] != "loops":
            assert part["rows"] == len(read_rows(ROOT / path))
            assert set(arms_of(words)) <= {kind.split("/")[0] for kind in part["seconds_a_row"]}
