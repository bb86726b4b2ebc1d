"""vLLM itself, on the CPU, with the bundled model: with room, under pressure, and on random schedules.

Each arm is a process of its own (``engine_process.py``). Needs vLLM in the environment (``make test-vllm``).
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from nightly import only_nightly
from vllm_plugin.engine_runs import MODEL, ROOT, environment, run, save_null_pages
from vllm_plugin.fake_runners import FakeRunnerV2

from trtllm_memshare.errors import UserError

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")


@pytest.fixture(scope="module")
def memshare(null_pages: str) -> dict[str, Any]:
    return run("memshare", null_pages, "surprisal-led-redundancy-recency", "4")


def test_with_room_tokens_are_those_of_vllm_bit_by_bit(null_pages, memshare):
    assert memshare["with_room"] == run("plain", null_pages)["with_room"]
    assert memshare["retired_with_room"] == 0


def test_under_pressure_log_probabilities_are_those_of_the_masked_reference(memshare):
    pressure = memshare["pressure"]
    assert pressure["retired"] >= 20
    assert pressure["requests_retired_from"] >= 5
    assert pressure["band_moves"] > 0
    assert pressure["preemptions"] == 0
    assert pressure["over"] == {"episodes": 1, "is_active": False, "gauge": 0}  # with the last request: no step follows
    assert not pressure["off_retired"]
    # float32 sums in another order; 1.0e-4 is five times what was seen.
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_nothing_were_retired"] > 1.0
    # What the workers tell of a page is the sum of what vLLM tells of its tokens.
    assert pressure["pages_with_surprisal"] >= 20
    assert pressure["surprisal_difference"] < 1e-3


def test_null_pages_of_other_weights_are_refused_at_the_start(tmp_path):
    refused = run("refused", save_null_pages(tmp_path, weights="0" * 32), "{}")["refused"]
    assert refused.startswith(f"{tmp_path}/null_pages.safetensors must be calibrated on the weights of {MODEL}, got ")


@only_nightly
def test_null_pages_of_another_shape_are_refused_at_the_start_and_not_with_the_first_request(tmp_path):
    refused = run("refused", save_null_pages(tmp_path, num_layers=3), "{}")["refused"]
    assert "is of a model with 3 layers, 2 KV heads of 32, the served one has 4, 2 of 32 (calibrate" in refused


@only_nightly
def test_a_cache_in_which_v_is_not_found_is_refused_at_the_start(null_pages):
    refused = run("refused", null_pages, "{}", "signatures")["refused"]
    assert refused.startswith("KV redundancy cannot be read from vLLM's cache: V that was written is not what is read")


def test_aliases_that_attention_would_not_read_are_refused_at_the_start(null_pages):
    settings = json.dumps({"need": "nearest-earlier", "retired_becomes": "alias"})
    refused = run("refused", null_pages, settings, "aliases")["refused"]
    assert refused.startswith("retired_becomes alias works with vLLM's attention backends TRITON_ATTN, got CPU_ATTN (")


def test_steps_of_vllms_own_warm_up_are_no_error(monkeypatch):
    """Model runner V2 runs some on a GPU before anything is served."""
    from trtllm_memshare.vllm.worker import MemShareWorker, PlatformWorker

    monkeypatch.setattr(PlatformWorker, "execute_model", lambda self, step: "warm")
    worker = object.__new__(MemShareWorker)
    assert worker.execute_model(SimpleNamespace()) == "warm"
    worker._is_warm = True
    with pytest.raises(UserError, match="got a step of another scheduler"):
        worker.execute_model(SimpleNamespace())


def test_a_model_that_samples_nothing_is_not_watched():
    """vLLM's model runner V2 has no sampler then; of another model that is refused before anything is compiled."""
    from trtllm_memshare.vllm.worker import MemShareWorker

    worker = object.__new__(MemShareWorker)
    worker.model_runner = FakeRunnerV2()
    worker.model_runner.sampler = None
    memshare = SimpleNamespace(need="surprisal-led-redundancy-recency", retired_becomes="null")
    settings = SimpleNamespace(memshare=memshare, options=SimpleNamespace(null_entries="read"))
    worker.model_config = SimpleNamespace(runner_type="pooling")
    assert worker._check_runner(settings) == frozenset()
    worker.model_config = SimpleNamespace(runner_type="generate")
    with pytest.raises(UserError, match="FakeRunnerV2 has no sampler"):
        worker._check_runner(settings)


def test_the_fidelity_check_compares_with_a_masked_replay(tmp_path):
    problems = [{"problem": "12 + 7 = ? " * 8}, {"problem": "3 * 9 - 4 = ? " * 8}]
    traces, output = tmp_path / "traces.jsonl", tmp_path / "fidelity.json"
    traces.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    ran = subprocess.run(
        [sys.executable, "benchmarks/vllm_fidelity.py", "--model-dir", MODEL, "--traces", str(traces),
         "--requests", "2", "--null-entries", "skip", "--output-json", str(output)],
        env=environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(output.read_text())
    assert found["pages_retired"] >= 4
    assert found["largest_difference_from_masked_replay"] < 1e-4
    assert found["largest_difference_if_nothing_were_masked"] > 0.01


def test_block_tables_of_the_real_model_runner_follow_through_random_schedules(memshare):
    schedules = memshare["schedules"]
    assert schedules["null_reads"] > 100
    assert schedules["reads_of_others"] > 0
    assert schedules["idle"]
