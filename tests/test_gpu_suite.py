"""The control flow of benchmarks/gpu_suite.sh, with stand-ins for its steps: nothing it has measured may be lost."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks" / "gpu_suite.py")
gpu_suite = importlib.util.module_from_spec(_spec)
sys.modules["gpu_suite"] = gpu_suite
_spec.loader.exec_module(gpu_suite)
Step = gpu_suite.Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def suite(tmp_path):
    return gpu_suite.Suite(tmp_path / "work", tmp_path / "out", 60, {"date": "today"}, grace_s=0.5)


def results(suite) -> list[tuple[str, str]]:
    return [(row["step"], row["result"]) for row in suite.rows]


def test_every_step_leaves_a_whole_report_whatever_became_of_it(suite, tmp_path):
    report, out = tmp_path / "figures.json", tmp_path / "out"
    writes = f"import pathlib; pathlib.Path({str(report)!r}).write_text('{{\"rows\": [1]}}')"
    steps = [
        Step("good", 20, python(writes + "; print('3 passed in 1 s')"), must_say=r"[1-9]\d* passed.*", report=report),
        Step("all_skipped", 20, python("print('5 skipped, 0 passed')"), must_say=r"[1-9]\d* passed.*"),
        Step("bad", 20, python("print('why'); raise SystemExit(7)")),
        Step("absent", 20, ["never"], missing="needs nvcc"),
    ]
    for number, step in enumerate(steps, 1):
        suite.run(step)
        document = json.loads((out / "gpu_suite.json").read_text())
        assert [row["step"] for row in document["steps"]] == [s.name for s in steps[:number]]
        assert document["date"] == "today"
        assert sorted(p.name for p in out.iterdir()) == ["gpu_suite.json", "gpu_suite.txt", "logs.tar.gz"]
    good, skipped, bad, absent = document["steps"]
    assert (good["result"], good["note"], good["report"]) == ("ok", "3 passed in 1 s", {"rows": [1]})
    assert skipped["result"] == "failed"
    assert "does not say" in skipped["note"]
    assert (bad["result"], bad["note"], bad["tail"]) == ("failed", "status 7", ["why"])
    assert (absent["result"], absent["note"]) == ("not run", "needs nvcc")
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert archive.getnames() == ["all_skipped.log", "bad.log", "good.log"]
    assert suite.has_failed


def test_a_step_out_of_time_is_ended_with_its_children_and_keeps_what_it_wrote(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_LEAST_S", 0.1)
    report, child = tmp_path / "figures.json", tmp_path / "child"
    code = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
started = subprocess.Popen([sys.executable, "-c", deaf])
pathlib.Path({str(child)!r}).write_text(str(started.pid))
pathlib.Path({str(report)!r}).write_text('{{"rows": [1, 2]}}')
time.sleep(60)
"""
    started = time.monotonic()
    suite.run(Step("slow", 3, python(code), report=report))
    assert time.monotonic() - started < 30
    (row,) = suite.rows
    assert (row["result"], row["note"], row["report"]) == ("timed out", "limit 3 s", {"rows": [1, 2]})
    stat = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "a child of the step is still there"
        time.sleep(0.05)


def test_steps_after_the_deadline_are_listed_and_not_run(tmp_path):
    suite = gpu_suite.Suite(tmp_path / "work", tmp_path / "out", 0, {})
    marker = tmp_path / "ran"
    suite.run(Step("late", 20, ["touch", str(marker)]))
    assert results(suite) == [("late", "no time left")]
    assert not marker.exists()
    assert not suite.has_failed


def test_a_report_of_an_earlier_run_is_not_taken_for_this_one(suite, tmp_path):
    report = tmp_path / "figures.json"
    report.write_text("{}")
    suite.run(Step("bad", 20, python("raise SystemExit(1)"), report=report))
    assert "report" not in suite.rows[0]


def test_what_is_missing_is_named_at_once_with_the_pip_command(tmp_path):
    """Before anything runs, and in one go: without pydantic and tqdm."""
    for name in ("pydantic", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        ["bash", "benchmarks/gpu_suite.sh", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "lacks" in last
    assert {"pydantic,", "tqdm"} <= set(last.replace("(", " ").split())
    assert "pip install " in last
    assert "'pydantic>=2.6,<3'" in last
    assert "torch: " in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_steps_name_files_and_tests_that_exist():
    steps = gpu_suite.make_steps(sys.executable, "sm_90")
    names = [step.name for step in steps]
    assert names[:2] == ["gpu_tests", "block_search"]
    assert all(name.startswith(("memcheck", "racecheck")) for name in names[-4:])
    for step in steps:
        for part in step.command:
            if part.endswith((".py", ".jsonl")):
                assert (ROOT / part).is_file(), part
    sanitized = next(step for step in steps if step.name == "memcheck_nvrtc").command
    test, word = sanitized[sanitized.index("-k") - 1], sanitized[-1]
    assert re.search(rf"def test_\w*{word}", (ROOT / test).read_text())
