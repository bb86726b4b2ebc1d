"""vLLM itself, on the CPU, with the bundled model: with room, under pressure, and on random schedules.

Each arm is a process of its own (``engine_process.py``, ``short_pool_process.py``). Needs vLLM in the environment
(``make test-vllm``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trtllm_memshare
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner")


def run(arm: str, null_pages: str, *arguments: str, program: str = "engine_process.py") -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), arm, MODEL, null_pages, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def null_pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Keys that are far from null, so that an entry at the wrong page, or one that did not move, is seen.

    The bundled model has no null page (``engine.null_page`` refuses it: its rotary base is 10,000 and its heads have 32
    numbers), and needs none here: the reference reads the same keys.
    """
    return save_null_pages(tmp_path_factory.mktemp("null_pages"))


def save_null_pages(folder: Path, num_layers: int = 4, weights: str | None = None) -> str:
    keys = 2 * torch.randn(2, num_layers, 2, 32, generator=torch.Generator().manual_seed(0))
    bands = torch.tensor([0, 256, 1024], dtype=torch.int32)
    calibrated_on = {"weights": weights or weights_digest(Path(MODEL))}
    save_file({"keys": keys, "bands": bands}, folder / "null_pages.safetensors", calibrated_on)
    return str(folder)


@pytest.fixture(scope="module")
def memshare(null_pages: str) -> dict[str, Any]:
    return run("memshare", null_pages, "surprisal-led-redundancy-recency", "8")


def test_with_room_tokens_are_those_of_vllm_bit_by_bit(null_pages, memshare):
    assert memshare["with_room"] == run("plain", null_pages)["with_room"]
    assert memshare["retired_with_room"] == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_under_pressure_log_probabilities_are_those_of_the_masked_reference(memshare, null_pages, num_ranks):
    """Two ranks: vLLM's tensor parallelism, two workers with half of the heads each, over gloo."""
    pressure = (memshare if num_ranks == 1 else run("ranks", null_pages, "surprisal-led-redundancy-recency"))[
        "pressure"
    ]
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


@pytest.fixture(scope="module")
def skip(null_pages: str) -> dict[str, Any]:
    return run("skip", null_pages, "surprisal-led-redundancy-recency", "1", "8")


def test_skipping_with_room_leaves_tokens_bit_by_bit(skip, null_pages):
    assert skip["with_room"] == run("plain", null_pages)["with_room"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_with_null_entries_skipped_log_probabilities_are_those_of_a_pass_without_the_pages(skip, num_ranks):
    """The null pages of these tests are far from null, so that one that is read all the same would be seen. Two ranks
    have none."""
    pressure = (skip if num_ranks == 1 else run("skip", "", "surprisal-led-redundancy-recency", "2"))["pressure"]
    assert pressure["retired"] >= 20
    assert pressure["requests_retired_from"] >= 5
    assert pressure["preemptions"] == 0
    # As above.
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_nothing_were_retired"] > 1.0
    assert pressure["surprisal_difference"] < 1e-3


def test_block_tables_that_slots_are_worked_out_from_stay_whole_where_entries_are_skipped(skip):
    schedules = skip["schedules"]
    assert schedules["null_reads"] > 100  # entries that the scheduler's tables have at null pages
    assert schedules["idle"]
    assert skip["still_skipped"] == 0


@pytest.mark.parametrize("need", ["surprisal-led-redundancy-recency", "nearest-earlier"])
def test_without_null_pages_nothing_reads_the_block_that_null_entries_name(null_pages, need):
    """NaN in it, K and V: answers and log-probabilities are those of skipping null pages, to the last bit."""
    program = "short_pool_process.py"
    short = run("short", null_pages, need, program=program)["short"]
    poisoned = run("poisoned", "", need, program=program)
    assert poisoned["short"] == short
    assert short["preempted_with_gaps"] > 0
    assert short["retired_again"] > 0
    assert short["cache_hits"] > 0
    assert short["null_entries"] > 0
    assert poisoned["schedules"]["null_reads"] > 100  # entries of the scheduler's tables
    assert poisoned["schedules"]["idle"]
    assert poisoned["not_finite"] == 0
    assert poisoned["is_untouched"]
    assert poisoned["not_finite_if_read"] > 0


def test_null_pages_of_other_weights_are_refused_at_the_start(tmp_path):
    refused = run("refused", save_null_pages(tmp_path, weights="0" * 32), "{}")["refused"]
    assert refused.startswith(f"{tmp_path}/null_pages.safetensors must be calibrated on the weights of {MODEL}, got ")


def test_null_pages_of_another_shape_are_refused_at_the_start_and_not_with_the_first_request(tmp_path):
    refused = run("refused", save_null_pages(tmp_path, num_layers=3), "{}")["refused"]
    assert "is of a model with 3 layers, 2 KV heads of 32, the served one has 4, 2 of 32 (calibrate" in refused


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


def test_the_fidelity_check_compares_with_a_masked_replay(tmp_path):
    problems = [{"problem": "12 + 7 = ? " * 8}, {"problem": "3 * 9 - 4 = ? " * 8}]
    traces, output = tmp_path / "traces.jsonl", tmp_path / "fidelity.json"
    traces.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    ran = subprocess.run(
        [sys.executable, "benchmarks/vllm_fidelity.py", "--model-dir", MODEL, "--traces", str(traces),
         "--requests", "2", "--null-entries", "skip", "--output-json", str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(output.read_text())
    assert found["pages_retired"] >= 4
    assert found["largest_difference_from_masked_replay"] < 1e-4
    assert found["largest_difference_if_nothing_were_masked"] > 0.01


@pytest.fixture(scope="module")
def aliases(null_pages: str) -> dict[str, Any]:
    return run("aliases", null_pages, "1", "8")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_with_aliases_log_probabilities_are_those_of_donors_that_count_more_than_once(aliases, null_pages, num_ranks):
    pressure = (aliases if num_ranks == 1 else run("aliases", null_pages, "2"))["pressure"]
    assert pressure["aliased"] >= 20
    assert pressure["preemptions"] == 0
    assert not pressure["off_retired"]
    # As above.
    assert pressure["difference"] < 1e-4
    assert pressure["difference_if_donors_counted_once"] > 0.5
    assert pressure["difference_if_nothing_were_retired"] > 1.0


def test_tables_with_aliases_follow_through_random_schedules(aliases):
    schedules = aliases["schedules"]
    assert schedules["alias_reads"] > 100
    assert schedules["idle"]


def test_block_tables_of_the_real_model_runner_follow_through_random_schedules(memshare):
    schedules = memshare["schedules"]
    assert schedules["null_reads"] > 100
    assert schedules["reads_of_others"] > 0
    assert schedules["idle"]
