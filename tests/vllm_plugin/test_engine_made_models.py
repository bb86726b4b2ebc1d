"""vLLM itself, on the CPU, with models whose caches are of another form than K and V of every layer.

DeepSeek-V3 keeps latents, LFM2 states of convolutions and Qwen3-Next states of gated delta nets beside full attention.
"""

from __future__ import annotations

import pytest
from nightly import at_night, only_nightly
from vllm_plugin.engine_runs import check, run

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


def run_made(arm, folder, architecture, runner="V1"):
    return run(arm, str(folder), architecture, program="made_models_process.py", runner=runner)


@pytest.mark.parametrize(
    ("architecture", "arm", "groups", "least"),
    [
        ("DeepseekV3", "preempted", ["MLAAttentionSpec"], 1.0),
        ("Lfm2", "preempted", ["MambaSpec", "FullAttentionSpec"], 0.2),
        at_night("Lfm2", "uncached", ["MambaSpec", "FullAttentionSpec"], 0.2),
    ],
)
def test_after_a_preemption_too_attention_is_given_what_is_kept(tmp_path, architecture, arm, groups, least):
    result = run_made(arm, tmp_path, architecture)
    assert (result["cache_mode"] == "align") == (architecture == "Lfm2" and arm != "uncached")
    pressure, schedules = result["pressure"], result["schedules"]
    assert result["groups"] == groups
    assert pressure["preemptions"] > 0
    assert pressure["retired"] > 5
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_nothing_were_retired"] > least
    assert not pressure["off_retired"]
    assert schedules["null_reads"] > 100
    assert (schedules["reads_of_others"] > 100) == (arm != "uncached")
    assert schedules["idle"]
    # As FlashMLA orders them some requests with gaps are counted on the host.
    assert (result["gaps_in_prefill_path"] > 0) == (architecture == "DeepseekV3")


@only_nightly
@pytest.mark.parametrize("runner", ["V1", "V2-async-graphs"])
@pytest.mark.parametrize("architecture", ["DeepseekV3", "Lfm2"])
def test_with_room_tokens_are_those_of_vllm(tmp_path, architecture, runner):
    result = run_made("pressure", tmp_path, architecture, runner)
    assert result["with_room"] == run_made("plain", tmp_path, architecture, runner)["with_room"]
    assert result["pressure"]["difference"] < 1e-4
    assert result["pressure"]["difference_if_nothing_were_retired"] > 0.2
    assert result["pressure"]["pages_with_surprisal"] >= 5
    assert result["pressure"]["surprisal_difference"] < 1e-3
    assert result["schedules"]["null_reads"] > 100
    assert result["gaps_in_prefill_path"] == 0


@only_nightly
def test_triton_s_kernels_of_vllm_read_what_is_kept_of_latents(tmp_path):
    result = run_made("pressure", tmp_path, "DeepseekV3", "V2-async-graphs-triton")
    assert result["attention"] == ["TRITON_MLA"]
    check(result)


@only_nightly
def test_beside_gated_delta_nets_pages_are_longer_than_a_kernel_s_blocks(tmp_path):
    """In bfloat16, which is all that vLLM's operators for CPUs take: rounding alone makes half of a nat."""
    pressure = run_made("pressure", tmp_path, "Qwen3Next")["pressure"]
    assert pressure["retired"] >= 3
    assert pressure["requests_retired_from"] == 2
    assert pressure["difference"] < 0.8
    assert pressure["difference_if_nothing_were_retired"] > 1.5
