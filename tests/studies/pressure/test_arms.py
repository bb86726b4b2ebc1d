"""The table of every arm has each pool's arms in one order, against its own full cache."""

import pytest

from benchmarks.studies.pressure.arms import every_arm


def result(blocks, losses=True, **steps):
    rows = [
        {
            "variant": name.replace("_", "-"), "num_steps": count, "accuracy": 0.987,
            "loss_nats_per_token": 1 + 1 / count if losses else None,
            "modelled_gpu": {"request_throughput_req_s": 1 / count},
            "request_throughput_req_s": 2 / count, "avg_ttft_ms": 98.7 * count,
            "request_latency_percentiles_ms": {"p50": 1234.5, "p99": 1000.0 * count},
            "mean_requests_in_flight": 5.25, "paused_requests": 3, "recomputed_tokens": 1200.0,
            "shared_block_fraction": 0.25, "search_time_fraction": 0.0123,
        }
        for name, count in steps.items()
    ]  # fmt: skip
    return {"kv_cache_blocks": blocks, "variants": rows}


def test_arms_stand_in_one_order_by_pool():
    table = every_arm([result(20, aligned=50, full_guaranteed=200, full=100), result(10, full=400)])
    of_full, rest = "`full` (MAX_UTILIZATION)", "3 | 1,200 | 25 %"
    assert table.splitlines()[2:] == [
        f"| 10 | {of_full} | 400 | 5.2 | 1.00 | 1.00 | 1.23 | 400 | 39.5 | {rest} | +0.0000 | 1.23 % |",
        f"| 20 | {of_full} | 100 | 5.2 | 1.00 | 1.00 | 1.23 | 100 | 9.87 | {rest} | +0.0000 | 1.23 % |",
        "| 20 | `full` (GUARANTEED_NO_EVICT) | 200 | 5.2 | 0.50 | 0.50 | 1.23 | 200 | 19.7 | "
        f"{rest} | -0.0050 | 1.23 % |",
        f"| 20 | `aligned` | 50 | 5.2 | 2.00 | 2.00 | 1.23 | 50 | 4.93 | {rest} | +0.0100 | 1.23 % |",
    ]


def test_a_run_without_losses_shows_its_right_answers():
    header, rule, row = every_arm([result(10, losses=False, full=400)]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")
    assert " right |" in header
    assert "| 98.7 % |" in row


def test_two_runs_of_one_pool_have_no_common_clock():
    with pytest.raises(ValueError, match="times of one pool must be of one run, got 2 results of 1 pools"):
        every_arm([result(20, full=100), result(20, full=100, aligned=50)])
