"""The table of every arm joins results of one set of requests, and refuses results that are of others."""

import pytest

from benchmarks.studies.pressure.arms import every_arm


def result(blocks, **steps):
    rows = [
        {
            "variant": name.replace("_", "-"), "num_steps": count, "loss_nats_per_token": 1 + 1 / count,
            "modelled_gpu": {
                "request_throughput_req_s": 1 / count, "p50_latency_s": count / 2, "p99_latency_s": count,
            },
            "mean_requests_in_flight": 5.25, "paused_requests": 3, "recomputed_tokens": 1200.0,
            "shared_block_fraction": 0.25,
        }
        for name, count in steps.items()
    ]  # fmt: skip
    return {"kv_cache_blocks": blocks, "variants": rows}


def test_arms_of_several_results_stand_in_one_order_by_pool():
    table = every_arm(
        [result(20, aligned=50, full=100), result(10, full=400), result(20, full=100, full_guaranteed=200)]
    )
    assert table.splitlines()[2:] == [
        "| 10 | `full` (MAX_UTILIZATION) | 400 | 5.2 | 1.00 | 1.00 / 2.00 | 3 | 1,200 | 25 % | +0.0000 |",
        "| 20 | `full` (MAX_UTILIZATION) | 100 | 5.2 | 1.00 | 1.00 / 2.00 | 3 | 1,200 | 25 % | +0.0000 |",
        "| 20 | `full` (GUARANTEED_NO_EVICT) | 200 | 5.2 | 0.50 | 2.00 / 4.00 | 3 | 1,200 | 25 % | -0.0050 |",
        "| 20 | `aligned` | 50 | 5.2 | 2.00 | 0.50 / 1.00 | 3 | 1,200 | 25 % | +0.0100 |",
    ]


def test_results_whose_full_caches_differ_are_not_of_one_set_of_requests():
    with pytest.raises(ValueError, match=r"20 blocks: full took 101 steps"):
        every_arm([result(20, full=100), result(20, full=101, aligned=50)])
