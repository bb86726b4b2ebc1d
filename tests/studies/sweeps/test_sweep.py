"""The sweeps: which runs are made of one base, and what their reports are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.sweeps.sweep import measure_pools, pools_table, settings_table, sweep_settings
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions

BASE = BenchmarkOptions(Path("engine"), Path("problems.jsonl"), ("full",), num_requests=40, samples=2)
ENTRY = {
    "accuracy": 0.95, "shared_block_fraction": 0.0, "block_steps_per_request": 100.0, "mean_output_tokens": 50.0,
    "rejected": {}, "refused": {}, "paused_requests": 0, "num_steps": 10, "correct_answers_per_s": 1.0,
    "mean_requests_in_flight": 4.0, "mean_resident_blocks_per_request": 20.0, "mean_step_ms": 2.0,
    "search_time_fraction": 0.0, "request_throughput_req_s": 2.0, "peak_used_blocks": 100,
}  # fmt: skip


class Bench:
    """Remembers what was asked for; each variant's entry is that of ``changes`` over ENTRY."""

    def __init__(self, **changes: dict[str, Any]) -> None:
        self.changes, self.asked = changes, list[BenchmarkOptions]()

    def __call__(self, options: BenchmarkOptions) -> dict[str, Any]:
        self.asked.append(options)
        entries = [{"variant": v, **ENTRY, **self.changes.get(v.replace("-", "_"), {})} for v in options.variants]
        return {"dataset": {"num_requests": 40}, "kv_cache_blocks": 8384, "variants": entries}


def test_each_value_is_one_run_of_the_variant_after_the_full_cache():
    bench = Bench(aligned={"accuracy": 0.9, "shared_block_fraction": 0.4})
    report = sweep_settings(BASE, "aligned", ["max_aliases=2", "max_gap_tokens=2,undo_rope=false"], bench)
    assert [(o.variants, o.settings) for o in bench.asked] == [
        (("full",), ()),
        (("aligned",), (("max_aliases", 2),)),
        (("aligned",), (("max_gap_tokens", 2), ("undo_rope", False))),
    ]
    assert {o.num_requests for o in bench.asked} == {40}
    assert [row["values"] for row in report["rows"]] == ["full", "max_aliases=2", "max_gap_tokens=2,undo_rope=false"]
    assert report["rows"][1]["interval"] == pytest.approx((0.7695, 0.9604), abs=1e-3)  # 36 of 40
    assert settings_table(report).splitlines()[2].split() == ["max_aliases=2", "40.0%", "90.0%", "76.9%", "to", "96.0%"]


def test_a_slip_in_a_value_is_told():
    with pytest.raises(UserError, match="max_aliases"):
        sweep_settings(BASE, "aligned", ["max_aliases"], Bench())


def test_pools_are_shares_of_the_demand_and_throughput_is_held_against_the_better_full_cache():
    bench = Bench(
        full_guaranteed={"request_throughput_req_s": 2.5, "correct_answers_per_s": 0.5},
        aligned={"request_throughput_req_s": 3.0, "mean_resident_blocks_per_request": 12.0, "mean_step_ms": 2.2,
                 "mean_requests_in_flight": 6.0},
    )  # fmt: skip
    report = measure_pools(BASE, [0.25, 0.001], 3, bench)
    assert [(o.variants, o.kv_cache_blocks, o.repeat) for o in bench.asked[1:]] == [
        (("full", "full-guaranteed", "aligned"), 25, 3),
        (("full", "full-guaranteed", "aligned"), 1, 3),
    ]
    assert report["resident_blocks_saved"] == pytest.approx(0.4)
    assert report["ceiling"] == pytest.approx(1 / 0.6)
    point = report["points"][0]
    assert point["ratio"] == pytest.approx(3.0 / 2.5)
    assert point["right_ratio"] == 1
    assert (point["in_flight_ratio"], point["step_time_ratio"]) == pytest.approx((1.5, 1.1))
    assert pools_table(report).splitlines()[1].split() == ["0.250", "25", "1.20", "1.50", "1.10"]


def test_problems_without_answers_have_no_ratio_of_right_ones():
    nobody = {"correct_answers_per_s": None}
    report = measure_pools(BASE, [0.25], 1, Bench(full=nobody, full_guaranteed=nobody, aligned=nobody))
    assert report["points"][0]["right_ratio"] is None
    assert report["points"][0]["ratio"] == 1
    assert len(pools_table(report).splitlines()) == 3
