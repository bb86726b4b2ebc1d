"""vLLM itself, on the CPU, with a model that has multi-head latent attention (MLA), as DeepSeek-R1 has."""

from __future__ import annotations

import pytest
from nightly import only_nightly
from vllm_plugin.engine_runs import check, run

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


def run_latents(arm, folder, runner="V1"):
    return run(arm, str(folder), program="latents_process.py", runner=runner)


def test_after_a_preemption_too_attention_is_given_what_is_kept(tmp_path):
    result = run_latents("preempted", tmp_path)
    pressure, schedules = result["pressure"], result["schedules"]
    assert result["attention"] == "CPU_MLA"
    assert pressure["preemptions"] > 0
    assert pressure["retired"] > 10
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_nothing_were_retired"] > 1.0
    assert not pressure["off_retired"]
    assert min(schedules["null_reads"], schedules["reads_of_others"]) > 1000
    assert schedules["idle"]
    # While others have gaps: what is read in pieces has none before it, and is counted on the host.
    assert result["pieces"] > 10
    assert result["left_out_before_pieces"] == 0


@only_nightly
@pytest.mark.parametrize("runner", ["V1", "V2-async-in-place"])
def test_with_room_tokens_are_those_of_vllm(tmp_path, runner):
    result = run_latents("pressure", tmp_path, runner)
    assert result["with_room"] == run_latents("plain", tmp_path, runner)["with_room"]
    assert check(result)["pages_with_surprisal"] >= 5
    assert result["schedules"]["null_reads"] > 1000


@only_nightly
def test_triton_s_kernels_of_vllm_read_what_is_kept(tmp_path):
    result = run_latents("pressure", tmp_path, "V2-async-in-place-triton")
    assert result["attention"] == "TRITON_MLA"
    check(result)
