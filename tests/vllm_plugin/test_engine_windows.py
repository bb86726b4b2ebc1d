"""vLLM itself, on the CPU, with a model that has sliding windows in some of its layers: two KV cache groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from nightly import NIGHTLY, only_nightly
from vllm_plugin.engine_runs import check, run, run_small, save_null_pages, save_with_windows

from trtllm_memshare.engine.weights import weights_digest

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_windows(Path(tmp_path_factory.mktemp("model")), 48)


@pytest.mark.parametrize("runner", ["V1", *["V2-async-graphs"] * NIGHTLY])
def test_full_attention_is_given_what_is_kept_and_windows_all_that_they_reach(model, runner):
    result = run_small("windows", "", num_schedules=2, runner=runner, model=model)
    assert result["with_room"] == run_small("plain", "", runner=runner, model=model)["with_room"]
    assert check(result)["pages_with_surprisal"] >= 5
    schedules = result["schedules"]
    assert min(schedules["null_reads"], schedules["window_reads"], schedules["reads_of_others"]) > 10
    assert schedules["idle"]


@only_nightly
@pytest.mark.parametrize(
    ("architecture", "groups"),
    [("GptOssForCausalLM", [3, 3]), ("Gemma3ForCausalLM", [1] * 6), ("Olmo3ForCausalLM", [2] * 3)],
)
def test_architectures_of_vllm_give_pages_up_in_one_group_of_several(tmp_path, architecture, groups):
    """Their tables against the oracle, and vLLM's own code of each; what attention reads is as in the test above."""
    result = run(architecture, str(tmp_path), program="architectures_process.py")
    assert result["groups"] == groups
    assert result["retired"] > 20
    schedules = result["schedules"]
    assert min(schedules["window_reads"], schedules["reads_of_others"]) > 1000
    assert schedules["idle"]


@only_nightly
def test_null_pages_are_refused_beside_windows(model, tmp_path):
    null_pages = save_null_pages(tmp_path, weights=weights_digest(Path(model)))
    told = run("refused", null_pages, "{}", model=model)["refused"]
    assert "null_entries read needs a model whose layers all have full attention" in told
