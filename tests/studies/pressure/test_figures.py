"""Gains by the clock and by the model, and the model's own step, against arithmetic that is written out here."""

from __future__ import annotations

import pytest

from benchmarks.studies.pressure.tables import loss_difference, measured_gain, modelled_gain, modelled_step_ms

ARM = "pressure:min_kept=0.5"


def row(variant, num_steps, measured, modelled):
    gpu = {"request_throughput_req_s": modelled}
    return {"variant": variant, "num_steps": num_steps, "request_throughput_req_s": measured, "modelled_gpu": gpu}


VARIANTS = [row("full", 2000, 4.0, 0.5), row(ARM, 1000, 5.0, 0.8)]


def test_gains_are_those_over_the_full_cache():
    report = {"dataset": {"num_requests": 8}, "variants": VARIANTS}
    assert measured_gain(report) == pytest.approx(1.25)
    assert modelled_gain(report) == pytest.approx(1.6)
    assert modelled_gain({"num_requests": 8, "rows": VARIANTS}) == pytest.approx(1.6)


def test_steps_that_are_longer_than_modelled_bring_the_gain_towards_that_in_steps():
    report = {"dataset": {"num_requests": 8}, "variants": VARIANTS}
    # 16 s and 10 s modelled, 2 s and 1 s more at a millisecond a step.
    assert modelled_gain(report, extra_ms=1.0) == pytest.approx(18 / 11)
    assert modelled_gain(report, extra_ms=1e6) == pytest.approx(2.0, abs=1e-4)


def test_a_modelled_step_reads_the_weights_and_what_the_requests_hold():
    run = {
        "model_shape": "DeepSeek-R1-Distill-Qwen-7B",
        "batch_size": 128,
        "tokens_per_block": 32,
        "variants": {"off": {"mean_used_blocks": 1000}},
    }
    held = 1000 * 32 * 28 * 2 * 4 * 128 * 2  # blocks, tokens, layers, K and V, KV heads, head size, bytes
    expected = (15.2e9 + held) / (4.8e12 * 0.8) * 1e3 + 2
    assert modelled_step_ms({"steps": [{"step": "other"}, {"step": "replay_7b", "report": run}]}) == pytest.approx(
        expected
    )


def test_losses_are_compared_over_problems_where_they_are_known():
    """Two texts of the first problem count once."""
    losses = {"a": [1.0, 3.0, 1.5], "b": [0.0, 0.0, 1.0]}
    report = {"variants": [{"variant": name, "loss_by_request": nats} for name, nats in losses.items()]}
    assert loss_difference(report, "mean", "a", "b") == pytest.approx(1.5)
    report["problem_by_request"] = [0, 0, 1]
    assert loss_difference(report, "mean", "a", "b") == pytest.approx(1.25)
    assert loss_difference(report, "error", "a", "b") == pytest.approx(0.75)
