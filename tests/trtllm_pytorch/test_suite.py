"""The one command for a machine with TensorRT-LLM, run here with stand-ins for its programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_script import run_script

import trtllm_memshare
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.trtllm_suite import Answers, failed_gates, read_arms
from trtllm_memshare.report.trtllm_suite import suite_table

ROOT = Path(trtllm_memshare.__file__).parents[1]
BENCH = """
import json, os, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
arm = os.path.basename(value("--report_json")).removesuffix(".json")
assert (os.environ.get("TRTLLM_MEMSHARE_ENABLE") == "1") == (not arm.startswith("alone")), arm
assert value("--eos_id") == "2"
assert "max_utilization" in arguments and "TRTLLM" in open(value("--extra_llm_api_options")).read()
if arm in os.environ.get("BROKEN", "").split():
    sys.exit(f"{arm} does not run")
speed = float(os.environ.get("SPEED", "2.0")) if arm == "aligned" else 1.0
json.dump({"performance": {"request_throughput_req_s": speed, "system_output_throughput_tok_s": 100.0},
           "request_info": {"avg_num_concurrent_requests": 8.0}}, open(value("--report_json"), "w"))
json.dump(["tokens"] + (os.environ.get("CHANGED", "").split() if arm == "shadow" else []),
          open(value("--output_json"), "w"))
if "TRTLLM_MEMSHARE_STATS_FILE" in os.environ:
    shared = 0 if arm in ("shadow", "pressure", "skip", os.environ.get("IDLE")) else 5
    json.dump({"blocks_shared": shared, "blocks_forgotten": 7 * (arm in ("pressure", "skip")), "blocks_shadowed": 3,
               "errors": int(os.environ.get("ERRORS", "0"))}, open(os.environ["TRTLLM_MEMSHARE_STATS_FILE"], "w"))
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
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "null_pages.safetensors").touch()
    done = run_suite(NULL_PAGES=str(tmp_path / "engine"))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["arms"]) == ["alone", "alone_again", "shadow", "aligned", "pressure", "skip", "lexical"]
    assert summary["arms"]["aligned"]["ratio"] == 2.0
    assert summary["active"] == ["aligned", "pressure", "skip", "lexical"]
    printed = done.stdout
    places = [printed.index(t) for t in ("1 accuracy", "2 activity", "3 A/B", "4 gates: all passed")]
    assert places == sorted(places)
    settings = json.loads((tmp_path / "out" / "pressure.settings.json").read_text())
    assert settings == {"preset": "pressure", "null_pages": str(tmp_path / "engine")}
    settings = json.loads((tmp_path / "out" / "skip.settings.json").read_text())
    assert settings == {"preset": "pressure", "null_entries": "skip"}


def test_an_arm_that_fails_leaves_the_others_their_summary_and_no_old_report_stands_in_for_it(run_suite, tmp_path):
    (tmp_path / "out").mkdir()
    for arm in ("aligned", "alone_again"):  # as a run that came to its end left them
        (tmp_path / "out" / f"{arm}.json").write_text('{"performance": {"request_throughput_req_s": 9.0}}')
    done = run_suite(BROKEN="aligned alone_again")
    assert done.returncode == 1
    assert "failed: alone_again aligned (see" in done.stdout
    arms = list(json.loads((tmp_path / "out" / "summary.json").read_text())["arms"])
    assert arms == ["alone", "shadow", "skip", "lexical"]
    done = run_suite(BROKEN="alone")
    assert "nothing to report, TensorRT-LLM alone did not run to its end" in done.stdout
    assert not (tmp_path / "out" / "summary.json").exists()


CLOCKED = """#!/bin/sh
case "$*" in
*report_json*) echo $(($(cat CLOCK) + ARM_SECONDS)) >CLOCK ;;
*trtllm_summary*) echo "summary of $*" ;;
esac
"""


@pytest.mark.parametrize(
    ("arm_seconds", "summed_up"),
    [
        (490, "shadow aligned pressure skip lexical"),
        (580, "shadow aligned pressure skip"),
        (600, "shadow aligned pressure"),
        (700, "shadow aligned"),
        (1300, None),
    ],
)
def test_an_hour_is_not_passed_and_what_is_left_out_is_said(tmp_path, run_suite, arm_seconds, summed_up):
    """With programs that do nothing but move a clock."""
    clock = tmp_path / "clock"
    clock.write_text("1000")
    for name, text in (
        ("date", f"#!/bin/sh\ncat {clock}\n"),
        ("trtllm-bench", CLOCKED),
        ("python", CLOCKED),
    ):
        program = tmp_path / name
        program.write_text(text.replace("CLOCK", str(clock)).replace("ARM_SECONDS", str(arm_seconds)))
        program.chmod(0o755)
    (tmp_path / "engine").mkdir()
    done = run_suite(PYTHON="python", NULL_PAGES=str(tmp_path / "engine"))
    assert int(clock.read_text()) - 1000 <= 3600 - 120
    if summed_up is None:
        assert done.returncode == 1
        assert "nothing to report, no arm of ours ran to its end (raise TIME_LIMIT, or see" in done.stdout
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--arms alone_again {summed_up} --dataset" in done.stdout
    left_out = [arm for arm in ("pressure", "skip", "lexical") if arm not in summed_up]
    assert [arm for arm in ("pressure", "skip", "lexical") if f"== {arm}: left out, " in done.stdout] == left_out
    assert (f"left out for want of time: {' '.join(left_out)}" in done.stdout) == bool(left_out)


def write_arms(folder: Path, **changes) -> None:
    """What the arms of a suite leave behind. ``changes``: by arm, what differs from an arm in which all is well."""
    for arm in ("alone", "alone_again", "shadow", "aligned", "lexical"):
        change = changes.get(arm, {})
        ours = {"blocks_shared": 5 * arm.startswith(("aligned", "lexical")), "blocks_shadowed": 3, "errors": 0}
        report = {
            "performance": {
                "request_throughput_req_s": change.get("speed", 1.0), "system_output_throughput_tok_s": 100.0
            },
            "request_info": {"avg_num_concurrent_requests": 8.0},
            "memshare": {**ours, **change.get("memshare", {})},
        }  # fmt: skip
        (folder / f"{arm}.json").write_text(json.dumps(report))
        (folder / f"{arm}.tokens.json").write_text(json.dumps(change.get("tokens", ["tokens"])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shadow": {"tokens": ["other"]}}, "shadow must not change a token, but 1 answers differ"),
        ({"lexical": {"memshare": {"blocks_shared": 0}}}, "lexical shared and gave up nothing, so its figures say"),
        ({"aligned": {"memshare": {"errors": 1}}}, "aligned: 1 errors, 0 requests failed"),
        ({"aligned": {"speed": 0.5}}, "aligned serves 0.50 times what TensorRT-LLM alone does"),
    ],
)
def test_gates(changes, message, tmp_path):
    write_arms(tmp_path, **changes)
    done = run_script(ROOT / "benchmarks" / "trtllm_summary.py", str(tmp_path), "--dataset", "none", "--model", "none")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: 1 gates failed: {message}")
    idle = "lexical" in changes
    assert json.loads((tmp_path / "summary.json").read_text())["active"] == ["aligned"] + ["lexical"] * (not idle)
    assert f"4 gates: {message}" in done.stdout


def test_accuracy_may_fall_by_two_points(tmp_path):
    """Outputs are token ids by request; the answer has to stand at their end."""
    right = {"1": {"output_tokens": [7]}, "2": {"output_tokens": [8]}}
    write_arms(tmp_path, aligned={"tokens": {**right, "2": {"output_tokens": [7]}}}, **{
        arm: {"tokens": right} for arm in ("alone", "alone_again", "shadow", "lexical")
    })  # fmt: skip
    answers = Answers(["7", "8"], lambda ids: f"so it is {ids[0]}.")
    rows = read_arms(tmp_path, ["alone_again", "shadow", "aligned", "lexical"], answers)
    assert [row["right"] for row in rows.values()] == [1.0, 1.0, 1.0, 0.5, 1.0]
    assert failed_gates(rows) == ["aligned has 50.0% right, TensorRT-LLM alone 100.0%"]
    assert "  aligned        50.0% right      1 answers differ" in suite_table(rows)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        *((text, True) for text in ("it is 5.", "so $5$", "5, as said")),
        *((text, False) for text in ("is 15", "is 51", "is 5.2", "is 0.5", "is -5", "is 5,000")),
    ],
)
def test_a_right_answer_is_a_word_of_its_own(text, is_right):
    assert Answers(["5"], lambda _: text).share_right([[1]]) == is_right


def test_where_shadow_did_not_run_its_gate_is_not_passed(tmp_path):
    write_arms(tmp_path)
    assert failed_gates(read_arms(tmp_path, ["aligned"], None)) == [
        "shadow did not run to its end, so nothing says that our search alone changes no token"
    ]


def test_an_arm_that_did_not_finish_is_named(tmp_path):
    write_arms(tmp_path)
    (tmp_path / "aligned.json").unlink()
    with pytest.raises(UserError, match=r"that arm did not finish, its log is aligned\.log"):
        read_arms(tmp_path, ["shadow", "aligned"], None)
