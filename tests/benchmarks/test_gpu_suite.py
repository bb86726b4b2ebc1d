"""The control flow of benchmarks/gpu_suite.sh, with stand-ins for its steps: nothing it has measured may be lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.gpu import headlines, needs, software, step_runner
from benchmarks.gpu.needs import WORK
from benchmarks.gpu.step_runner import Step
from benchmarks.gpu.steps import HELD_BACK_S, PARTS, SECONDS_A_PART, make_steps
from trtllm_memshare.evaluation.variants import parse_variant
from trtllm_memshare.search.config import make_config

ROOT = Path(__file__).parents[2]
FILES = ["gpu_card_part1.json", "gpu_card_part1.txt", "gpu_card_part1_logs.tar.gz"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def suite(tmp_path):
    return make_suite(tmp_path, 60)


def make_suite(tmp_path, seconds: float):
    return step_runner.Suite(
        tmp_path / "work", tmp_path / "out", "gpu_card_part1", tmp_path, seconds, {"date": "today"}, grace_s=0.5
    )


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
        document = json.loads((out / FILES[0]).read_text())
        assert [row["step"] for row in document["steps"]] == [s.name for s in steps[:number]]
        assert document["date"] == "today"
        assert sorted(p.name for p in out.iterdir()) == FILES
    good, skipped, bad, absent = document["steps"]
    assert (good["result"], good["note"], good["report"]) == ("ok", "3 passed in 1 s", {"rows": [1]})
    assert skipped["result"] == "failed"
    assert "does not say" in skipped["note"]
    assert (bad["result"], bad["note"], bad["tail"]) == ("failed", "status 7", ["why"])
    assert (absent["result"], absent["note"]) == ("not run", "needs nvcc")
    with tarfile.open(out / FILES[2]) as archive:
        assert archive.getnames() == ["all_skipped.log", "bad.log", "good.log"]
    assert suite.has_failed


def test_a_step_out_of_time_is_ended_with_its_children_and_keeps_what_it_wrote(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(step_runner, "_LEAST_S", 0.1)
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


def test_a_step_that_stretches_takes_what_the_later_ones_do_not_need(tmp_path, capsys):
    suite = make_suite(tmp_path, 1000)
    for step, reserved in ((Step("long", 20, ["true"], stretches=True), 100.0), (Step("plain", 20, ["true"]), 100.0),
                           (Step("tight", 20, ["true"], stretches=True), 990.0)):  # fmt: skip
        suite.run(step, reserved)
    limits = {name: int(limit) for name, limit in re.findall(r"-- (\w+): at most (\d+) s", capsys.readouterr().out)}
    assert 800 < limits["long"] <= 900
    assert limits["plain"] == limits["tight"] == 20


def test_a_step_whose_program_is_not_there_fails_and_the_next_one_runs(suite, tmp_path):
    """As the plugin's harness is not where its build has failed."""
    suite.run(Step("harness", 20, [str(tmp_path / "plugin_harness"), "--gpu", "require"]))
    suite.run(Step("next", 20, python("print('3 passed')"), must_say=r"[1-9]\d* passed"))
    assert results(suite) == [("harness", "failed"), ("next", "ok")]
    assert suite.rows[0]["note"].startswith("cannot start: [Errno 2] No such file or directory")
    assert json.loads(suite.report.read_text())["steps"] == suite.rows


def test_a_report_that_was_cut_off_ends_its_step_alone(suite, tmp_path):
    report = tmp_path / "figures.json"
    suite.run(Step("cut", 20, python(f"import pathlib; pathlib.Path({str(report)!r}).write_text('{{')"), report=report))
    suite.run(Step("next", 20, python("print('3 passed')"), must_say=r"[1-9]\d* passed"))
    assert results(suite) == [("cut", "failed"), ("next", "ok")]
    assert "Expecting property name" in suite.rows[0]["note"]


@pytest.mark.parametrize(("release", "builds"), [("12.8", True), ("12.4", False), ("14.0", False)])
def test_a_plugin_step_lacks_an_nvcc_that_builds_it(tmp_path, monkeypatch, release, builds):
    for tool, says in (("nvcc", f"Cuda compilation tools, release {release}, V{release}.1"), ("cmake", "cmake")):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "include").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    monkeypatch.setattr(needs, "absent_modules", lambda names: [])
    assert needs.plugin_lacks().startswith("lacks TENSORRT_ROOT (a folder with TensorRT's include/)")
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    said = f"lacks an nvcc that builds it: nvcc must be 12.8 to 13.x, got {release} (install such a CUDA toolkit)"
    assert needs.plugin_lacks() == (None if builds else said)


def test_a_step_may_show_all_that_it_says(suite):
    suite.run(Step("counters", 20, python("print('dram 91'); print('dram 48')"), must_say=r"dram (\d+)", says_all=True))
    assert suite.rows[0]["note"] == "91, 48"


def test_the_hint_names_what_the_steps_of_a_part_import(monkeypatch):
    monkeypatch.setattr(software, "absent_modules", lambda names: [n for n in names if n in ("peft", "gguf", "pytest")])
    hints = {part: software.list_steps(make_steps(part, "python"), None, 505).splitlines()[-1] for part in PARTS}
    assert [part for part, hint in hints.items() if "peft" in hint] == [4]
    assert [part for part, hint in hints.items() if "gguf" in hint] == [3, 4]
    assert [part for part, hint in hints.items() if "pytest" in hint] == [1, 2]
    assert "(pip install 'gguf>=0.17' 'peft>=0.17', or bring a kit" in hints[4]


@pytest.mark.parametrize(
    "step", [Step("late", 20, ["touch", "ran"]), Step("lacking", 20, ["touch", "ran"], "lacks a tool")]
)
def test_a_step_that_did_not_run_is_a_failure(tmp_path, step):
    suite = make_suite(tmp_path, 0 if step.missing is None else 60)
    suite.run(step)
    assert results(suite) == [(step.name, "no time left" if step.missing is None else "not run")]
    assert not (tmp_path / "ran").exists()
    assert suite.has_failed


def test_every_step_shows_its_headline_and_only_a_failed_one_its_output(suite, tmp_path, capsys):
    report = tmp_path / "figures.json"
    code = f"""
import json, pathlib
print("noise" * 50)
pathlib.Path({str(report)!r}).write_text(json.dumps({{"us": 7}}))
"""
    headline = lambda figures: f"{figures['us']} us\nand more"  # noqa: E731
    suite.run(Step("good", 20, python(code), report=report, headline=headline))
    suite.run(Step("partly", 20, python(code + "raise SystemExit(3)"), report=report, headline=headline))
    suite.run(Step("odd", 20, python(code), report=report, headline=lambda figures: figures["ms"]))
    said = capsys.readouterr().out
    good, partly, odd = (said[said.index(f"-- {n}") :].split("-- ")[1] for n in ("good", "partly", "odd"))
    assert "== good: ok (7 us" in good
    assert "noise" not in good
    assert "== partly: failed (status 3; 7 us" in partly
    assert "noise" in partly
    assert "no headline: KeyError: 'ms'" in odd
    assert suite.table().splitlines()[1].strip() == "and more"


def test_a_suite_that_is_told_to_end_keeps_what_it_has(tmp_path):
    program = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.gpu.step_runner import Step, Suite
suite = Suite(Path("work"), Path("out"), "gpu_card_part1", Path("."), 60, {{}}, grace_s=0.5)
def end(number, _):
    suite.interrupt()
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, end)
suite.run(Step("first", 20, [sys.executable, "-c", "print(1)"]))
suite.run(Step("second", 50, [sys.executable, "-c", "import time; time.sleep(50)"]))
"""
    process = subprocess.Popen([sys.executable, "-u", "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "second" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    steps = json.loads((tmp_path / "out" / FILES[0]).read_text())["steps"]
    assert [(s["step"], s["result"]) for s in steps] == [("first", "ok"), ("suite", "interrupted")]


def test_a_report_of_an_earlier_run_is_not_taken_for_this_one(suite, tmp_path):
    report = tmp_path / "figures.json"
    report.write_text("{}")
    suite.run(Step("bad", 20, python("raise SystemExit(1)"), report=report))
    assert "report" not in suite.rows[0]


def suite_script(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path}, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(needs.shutil.which("nvidia-smi") is not None, reason="says what a machine without a GPU says")
def test_a_dry_run_works_anywhere_and_names_what_each_step_lacks():
    done = suite_script("--part", "1", "--dry-run")
    assert done.returncode == 1, done.stderr
    for step in make_steps(1, sys.executable):
        assert f"{step.name:<24} {step.limit_s:>5.0f} s" in done.stdout
    assert "GPU: none that the torch of" in done.stdout
    run = suite_script("--part", "2")
    assert run.returncode == 2
    assert "error: nothing can run here" in run.stderr


def test_help_and_dry_run_need_nothing_but_python():
    """-S -E: no site-packages, so neither torch nor pydantic, and no path from outside; from another folder."""
    command = [sys.executable, "-S", "-E", ROOT / "benchmarks" / "gpu_suite.py"]
    assert subprocess.run([*command, "--help"], capture_output=True, check=True, cwd="/").stdout.startswith(b"usage:")
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 1, done.stderr
    assert "lacks torch, numpy, pydantic, tqdm, cuda.core" in done.stdout
    assert "(pip install 'torch>=2.6' 'numpy' 'pydantic>=2.6,<3'" in done.stdout


def test_an_unknown_step_is_named():
    done = suite_script("--part", "2", "--steps", "ncu", "serch")
    assert done.returncode == 2
    assert "part 2 has no step serch (it has step_profile," in done.stderr


def program_of(step: Step) -> tuple[Path, list[str]] | None:
    """The file of this repository that a step runs, and what it passes; None for other programs."""
    for place, argument in enumerate(step.command):
        if argument.startswith(("benchmarks.", "benchmarks/", "build_scripts/")):
            path = ROOT / (argument if "/" in argument else argument.replace(".", "/") + ".py")
            path = path if path.exists() else path.with_suffix("") / "__main__.py"
            return path, step.command[place + 1 :]
    return None


@pytest.mark.parametrize("part", PARTS)
def test_the_limits_of_a_part_fit_its_time_and_its_steps_name_files_that_exist(part):
    steps = make_steps(part, sys.executable)
    assert sum(step.limit_s for step in steps) <= SECONDS_A_PART - HELD_BACK_S
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        program = program_of(step)
        assert program is None or program[0].is_file(), step.command
        for argument in step.command:
            if argument.startswith(("tests/", "benchmarks/data")):
                assert (ROOT / argument).exists(), argument
        if step.report is not None:
            assert step.headline is not None


@pytest.mark.parametrize("part", PARTS)
def test_the_steps_use_options_that_their_commands_have(part):
    commands = ROOT / "trtllm_memshare" / "commands"
    shared = "".join(path.read_text() for path in commands.glob("*.py"))
    for step in make_steps(part, sys.executable):
        program = program_of(step)
        if program is not None:
            text = program[0].read_text() + shared
            if program[0].suffix == ".sh":  # hands on what it does not know
                module = program[1][program[1].index(str(WORK / f"real_model_{step.name}.jsonl")) + 1]
                text = (program[0].parent / f"{module}.py").read_text()
            for option in (o for o in program[1] if o.startswith("--")):
                assert f'"{option}"' in text, f"{step.name}: {option}"


def test_the_most_wanted_figures_come_first():
    first, second, third, fourth = (make_steps(part, sys.executable) for part in PARTS)
    search = first[0].command
    assert search[search.index("--dtypes") + 1 : search.index("--pairs") + 2] == ["bfloat16", "--pairs", "64"]
    assert second[0].name == "step_profile"
    assert [step.name for step in third[:3]] == ["real_engine", "real_requests", "pressure_batch_96"]
    assert [step.name for step in fourth[:2]] == ["float32_engine", "adapter"]
    sanitized = next(step for step in first if step.name == "memcheck").command
    test, word = sanitized[sanitized.index("-k") - 1], sanitized[sanitized.index("-k") + 1]
    picked = [
        path.name for path in (ROOT / test).glob("test_*.py") if re.search(rf"def test_\w*{word}", path.read_text())
    ]
    assert sorted(picked) == ["test_cuda_block_distance.py", "test_cuda_signatures.py"]


def test_a_real_model_is_measured_in_every_way_that_is_asked_for():
    """Under pressure where memory binds, at 8,192 tokens, and with answers that can be wrong."""
    third = {step.name: step for step in make_steps(3, sys.executable)}
    for requests in ("256", "96"):
        command = third[f"pressure_batch_{requests}"].command
        assert command[command.index("--concurrency") + 1] == requests
        arms = command[command.index("--variants") + 1 : command.index("--output-json")]
        assert arms[0] == "full", "a cut leaves the first"
        published = [place for place, arm in enumerate(arms) if "nearest-earlier" in arm]
        assert published == {"256": [3, 4], "96": [1, 2]}[requests], "the rows that no table of a GPU has yet"
        assert len({parse_variant(arm, make_config("off")).name for arm in arms}) == len(arms)
    fourth = {step.name: step for step in make_steps(4, sys.executable)}
    for tokens in ("8192", "4096"):
        table = fourth[f"table_{tokens}"]
        assert table.command[table.command.index("--tokens") + 1] == tokens
        assert [path.name for path in table.keeps] == [f"real_model_table_{tokens}.jsonl"]
        assert float(table.command[table.command.index("--seconds") + 1]) < table.limit_s
    assert fourth["adapter"].keeps[0].name == "adapter_model.safetensors"
    assert fourth["adapted_answers"].command[2:4] == ["--engine-dir", fourth["adapted_engine"].command[-1]]


def test_what_a_step_keeps_lies_beside_the_report_also_when_it_failed(suite, tmp_path):
    kept, never = tmp_path / "rows.jsonl", tmp_path / "never"
    code = f"import pathlib; pathlib.Path({str(kept)!r}).write_text('1'); raise SystemExit(4)"
    suite.run(Step("table", 20, python(code), keeps=(kept, never)))
    assert (tmp_path / "out" / "gpu_card_part1_rows.jsonl").read_text() == "1"
    assert not list((tmp_path / "out").glob("*never"))


def test_headlines_of_the_reports_that_the_benchmarks_write():
    rows = [{"dtype": "bfloat16", "pairs": 64, "kernel_us": 88.04, "share_of_copy_bandwidth": 0.887,
             "kernel_relative_error": 2e-7, "compiled_us": 512.3}, {"dtype": "int8", "pairs": 1}]  # fmt: skip
    line = headlines.search_headline({"rows": rows, "tokens_per_block": 32, "copy_gb_s": 2954.0})
    assert line == ("bfloat16 64 pairs of 32: 88.0 us, 89% of a copy, compiled 512 us; copy 2.95 TB/s, error 2e-07")
    variants = {
        "off": {"step_ms_mean": 12.3, "over_off": None, "step_ms_last_tenth": 13.0},
        "shadow": {"step_ms_mean": 12.4, "over_off": 0.008, "step_ms_last_tenth": 13.1},
    }
    line = headlines.replay_headline(
        {"variants": variants, "batch_size": 128, "output_tokens": 256, "decode_attention": "Triton"}
    )
    assert line == "128 x 256: off 12.30 ms, 13.00 at the end; shadow 12.40 ms (+0.8%), 13.10 at the end; Triton"
    variants["off"] |= {"graph_ms_mean": 4.2, "rest_ms_mean": 8.1}
    report = {"model_shape": "small", "batch_size": 4, "plain": variants["off"], "variants": variants}
    line = headlines.replay_headline({**report, "output_tokens": 8, "decode_attention": "Triton"})
    assert line.startswith(
        "4 x 8: off 12.30 ms (graph 4.20, rest 8.10), 13.00 at the end; shadow 12.40 ms (+0.8%), 13.1"
    )
    functions = [{"function": f"f{i}", "ms_a_step": 2.0, "calls_a_step": 3.0} for i in range(9)]
    report["host"] = {"ms_a_step": 12.0, "functions": functions}
    lines = headlines.profile_headline(report).splitlines()
    first = "small, 4 requests: step 12.30 ms (graph 4.20, rest 8.10)"
    assert lines[:2] == [first, "host 2.000 ms, 3 calls: f0"]
    assert len(lines) == 6
    report["gpu"] = {"ms_a_step": 4.0, "kernels": [{"kernel": "gemm", "ms_a_step": 1.0, "calls_a_step": 28.0}]}
    lines = headlines.profile_headline(report).splitlines()
    assert (lines[0], lines[-1]) == (f"{first}; GPU at work 4.00 ms, watched", "gpu 1.000 ms, 28 calls: gemm")
    report = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert headlines.throughput_headline(report).startswith("requests/s: full ")
    for row in report["variants"]:
        row["accuracy"] = 0.5
    assert headlines.accuracy_headline(report).startswith("20 problems: full 50.0% right, ")
    log = [{"step": 0, "validation_loss": 1.5}, {"step": 700, "validation_loss": 0.25}]
    line = headlines.adapter_headline({"log": log, "adapter_bytes": 10 << 20})
    assert line == "700 steps: validation loss 1.500 to 0.250; 10.0 MiB"
