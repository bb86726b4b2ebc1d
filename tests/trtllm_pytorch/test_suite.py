"""The one command for a machine with TensorRT-LLM, run here with stand-ins for its programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trtllm_memshare

ROOT = Path(trtllm_memshare.__file__).parents[1]
BENCH = """
import json, os, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
arm = os.path.basename(value("--report_json")).removesuffix(".json")
assert (os.environ.get("TRTLLM_MEMSHARE_ENABLE") == "1") == (not arm.startswith("alone")), arm
assert value("--eos_id") == "2"
assert "max_utilization" in arguments and "TRTLLM" in open(value("--extra_llm_api_options")).read()
json.dump({"performance": {"request_throughput_req_s": 2.0 if arm == "aligned" else 1.0,
                           "system_output_throughput_tok_s": 100.0},
           "request_info": {"avg_num_concurrent_requests": 8.0}}, open(value("--report_json"), "w"))
json.dump(["tokens"] + (os.environ.get("CHANGED", "").split() if arm == "shadow" else []),
          open(value("--output_json"), "w"))
if "TRTLLM_MEMSHARE_STATS_FILE" in os.environ:
    json.dump({"blocks_shared": 5, "blocks_generated": 20, "blocks_retired_of_finished": 4},
              open(os.environ["TRTLLM_MEMSHARE_STATS_FILE"], "w"))
"""


@pytest.fixture
def run_suite(tmp_path):
    program = tmp_path / "trtllm-bench"
    program.write_text(f"#!{sys.executable}\n{BENCH}")
    program.chmod(0o755)

    def run(**variables: str) -> subprocess.CompletedProcess:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        settings = {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "EOS_ID": "2"}
        return subprocess.run(
            ["bash", str(ROOT / "benchmarks" / "trtllm_suite.sh"), "MODEL", "questions.jsonl", str(tmp_path / "out")],
            env={**os.environ, **settings, **variables},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip

    return run


def test_all_arms_run_and_are_summed_up(run_suite, tmp_path):
    done = run_suite()
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["arms"]) == ["alone", "alone_again", "shadow", "aligned", "lexical"]
    assert summary["arms"]["aligned"]["request_throughput_req_s"] == 2.0
    assert summary["arms"]["aligned"]["shared_block_fraction"] == 0.2
    assert summary["different_answers"] == {"alone_again": 0, "shadow": 0}


def test_a_shadow_that_changes_tokens_fails_the_suite(run_suite):
    done = run_suite(CHANGED="other")
    assert done.returncode == 1
    assert "failed: summary" in done.stdout
    assert "shadow must not change a token" in done.stdout
