"""Arms from their names: presets, policies and settings."""

from __future__ import annotations

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.step_model import GpuModel, ModelledClock
from trtllm_memshare.evaluation.variants import default_variants, parse_variant, parse_variants
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.request import RequestHandle, RequestResult, RequestStats


def test_an_arm_names_its_policy_and_its_settings():
    variant = parse_variant("pressure-guaranteed:min_kept=0.25,need=random", make_config("aligned"))
    assert variant.name == "pressure-guaranteed:min_kept=0.25,need=random"
    assert variant.policy == "GUARANTEED_NO_EVICT"
    assert (variant.config.preset, variant.config.min_kept, variant.config.need) == ("pressure", 0.25, "random")
    assert parse_variant("pressure", make_config("pressure", min_kept=0.75)).config.min_kept == 0.75
    assert parse_variant("aligned", make_config("pressure")).config == make_config("aligned")
    assert parse_variant("full", make_config("pressure")).config == make_config("off")


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("pressure", ("full", "aligned", "pressure")),
        ("paper", ("full", "aligned", "paper")),
        ("aligned", ("full", "aligned")),
        ("off", ("full", "aligned")),
    ],
)
def test_a_comparison_shows_what_the_engine_is_set_to(preset, names):
    assert default_variants(make_config(preset)) == names
    for name in names:
        parse_variant(name, make_config(preset))


@pytest.mark.parametrize("text", ["presure", "pressure:min_kept=2", "pressure:min_keep=0.5", "pressure:min_kept"])
def test_unusable_arms_are_refused(text):
    with pytest.raises(UserError):
        parse_variant(text, make_config("aligned"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pressure:preset=aligned", r"a preset is no setting of another, got preset=aligned \(name it itself"),
        ("pressure:need=random,control_seed=-1", "control_seed input should be greater than or equal to 0, got -1"),
        ("pressure:control=random", "control random has no effect"),
    ],
)
def test_settings_that_would_be_lost_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_variant(text, make_config("aligned"))


@pytest.mark.parametrize("texts", [["full"], ["full", "full-guaranteed"], ["full:max_distance=0.3", "aligned"]])
def test_settings_that_no_arm_takes_are_refused(texts):
    overrides = {} if ":" in texts[0] else {"max_distance": 0.3}
    with pytest.raises(UserError, match=r"max_distance.*\((add a variant that reads it|write full alone)"):
        parse_variants(texts, make_config("aligned"), **overrides)
    full, aligned, lexical = parse_variants(["full", "aligned", "lexical"], make_config("aligned"), max_distance=0.3)
    assert (full.config, aligned.config.max_distance) == (make_config("off"), 0.3)
    assert lexical.config == make_config("lexical")  # it compares nothing
    with pytest.raises(UserError, match=r"max_distance 0\.3 has no effect"):
        parse_variants(["aligned", "lexical:max_distance=0.3"], make_config("aligned"))
    with pytest.raises(UserError, match="unknown key max_distanc"):
        parse_variants(["aligned"], make_config("aligned"), max_distanc=0.3)
    with pytest.raises(UserError, match="protected_steps"):
        parse_variants(["pressure"], make_config("aligned"), protected_steps="many")


@pytest.mark.parametrize(
    ("text", "overrides", "takes_window"),
    [
        ("streaming", {}, True),
        ("streaming:streaming_sink_tokens=0", {}, True),
        ("streaming:streaming_window_tokens=64", {}, False),
        ("streaming", {"streaming_window_tokens": 64}, False),
        ("snapkv", {}, False),
    ],
)
def test_streaming_takes_a_window_unless_one_is_given(text, overrides, takes_window):
    assert parse_variant(text, make_config("aligned"), **overrides).takes_window == takes_window


def test_modelled_time_is_that_of_reading_weights_and_pool_or_of_computing():
    machine = GpuModel(weights_bytes=1e9, parameters=1e9, pool_bytes=4e9, bandwidth=1e9, flops=1e12, overhead_s=0.5)
    assert machine.step_seconds(1, 0.5) == pytest.approx(1 + 2 + 0.5)
    assert machine.step_seconds(4000, 0.5) == pytest.approx(8 + 0.5)
    clock = ModelledClock(machine)
    first, second = RequestHandle(0), RequestHandle(1)
    first.push(1)
    clock.tick(1, 0.0, 0.0, [first])
    stats = RequestStats(0, 0, 1, 1, 0, None, 0)
    first.finish(RequestResult(0, [1], "stop", stats))
    clock.tick(1, 0.0, 0.0, [first, second])
    second.push(1)
    second.finish(RequestResult(1, [1], "stop", stats))
    clock.tick(1, 0.0, 0.25, [first, second])
    skips, reads = clock.summaries()
    assert skips["request_throughput_req_s"] == pytest.approx(2 / 4.5)
    assert skips["mean_first_token_s"] == pytest.approx((1.5 + 3.0) / 2)
    assert skips["p50_latency_s"] == pytest.approx(3.0)  # the first after two steps, the second after two of its own
    # The null entries of the third step are a quarter of the pool: a second more for a kernel that reads them.
    assert reads["request_throughput_req_s"] == pytest.approx(2 / 5.5)
    assert reads["mean_first_token_s"] == pytest.approx((1.5 + 4.0) / 2)
