"""The figures made on the stand-ins: what is modelled, and the host time of the hook."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from trtllm_pytorch.hook_cost import measure
from trtllm_pytorch.modelled_executor import GUARANTEED_NO_EVICT, MAX_UTILIZATION, Machine, run

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.steps import BoundaryTokens

TRACES = Path(__file__).parents[2] / "benchmarks/data/traces/r1_aime24.jsonl"


def test_the_model_of_a_machine_and_of_the_policies():
    """Six answers of 1,600 tokens where three fit; nobody is paused who was reserved for."""
    texts = [([100 + i] * 32, [(7 * i + j) % 61 for j in range(1600)]) for i in range(6)]
    boundaries = BoundaryTokens.from_texts([chr(97 + i % 26) for i in range(200)])
    rows = {
        (policy, preset): run(texts, boundaries, policy, preset, 156, 32, Machine())
        for policy in (MAX_UTILIZATION, GUARANTEED_NO_EVICT)
        for preset in (None, "pressure")
    }
    full, pressure = (rows[MAX_UTILIZATION, preset] for preset in (None, "pressure"))
    assert full["paused"] > 0
    assert rows[GUARANTEED_NO_EVICT, None]["paused"] == 0
    assert pressure["pages_forgotten"] > 0
    assert pressure["paused"] < full["paused"]
    read, skipped = (pressure[f"request_throughput_req_s{how}"] for how in ("_null_read", ""))
    assert full["request_throughput_req_s"] == full["request_throughput_req_s_null_read"] < read < skipped
    assert full["mean_step_ms"] > (Machine().weights_bytes / Machine().bandwidth + Machine().overhead_s) * 1e3


def test_v2_suspends_and_computes_anew_where_its_host_tier_is_full():
    texts = [([100 + i] * 32, [(7 * i + j) % 61 for j in range(1600)]) for i in range(9)]
    boundaries = BoundaryTokens.from_texts([chr(97 + i % 26) for i in range(200)])
    full, pressure = (
        run(texts, boundaries, MAX_UTILIZATION, preset, 156, 32, Machine(), manager="V2")
        for preset in (None, "pressure")
    )
    assert full["pages_copied_to_host_and_back"] > 0
    assert full["recomputed_tokens"] > 0
    assert pressure["pages_forgotten"] > 0
    assert pressure["paused"] < full["paused"]
    assert full["request_throughput_req_s"] < pressure["request_throughput_req_s_null_read"]


def test_the_hook_needs_all_requests_before_it_counts():
    options = argparse.Namespace(
        traces=TRACES, requests=3, min_length=200, max_length=300, tokens_per_block=32, steps=10, warm_up=4,
        admitted_per_step=2,
    )  # fmt: skip
    row = measure(options, "aligned")
    assert row["hook_ms_max"] >= row["hook_ms_p50"] > 0
    options.requests, options.min_length, options.max_length, options.warm_up = 8, 600, 1200, 20
    row = measure(options, "pressure")
    assert row["hook_ms_max"] >= row["hook_ms_p50"] > 0
    assert row["blocks_shared"] > 20  # given up: it is pressure that was measured
    options.requests, options.warm_up = 3, 1
    with pytest.raises(UserError, match="2 of 3 requests were admitted"):
        measure(options, None)
