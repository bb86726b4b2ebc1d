"""``memshare serve`` and ``bench`` around TensorRT-LLM's programs; these are stand-ins here."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import trtllm_memshare
from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.wrap import main

ROOT = Path(trtllm_memshare.__file__).parents[1]


def run_program(tmp_path, name, text, *arguments, **variables):
    """Our command in a process group of its own, where TensorRT-LLM's program is a script."""
    program = tmp_path / name
    program.write_text(text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    settings = {"PATH": f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", "from trtllm_memshare.__main__ import main; main()", *arguments],
        env={**os.environ, **settings, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "send",
    [
        lambda ran: ran.terminate(),
        lambda ran: ran.send_signal(signal.SIGINT),
        lambda ran: os.killpg(ran.pid, signal.SIGINT),
    ],
)
def test_who_stops_the_command_stops_the_server_which_ends_in_its_own_order(tmp_path, send):
    """By a signal to the command alone, as a container's manager sends it, or Ctrl-C, which both get."""
    text = """
import signal, sys, time
def end(number, _):
    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, signal.SIG_IGN)
    print("in order", flush=True)
    sys.exit(5)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
print("ready", flush=True)
time.sleep(60)
"""
    ran = run_program(tmp_path, "trtllm-serve", f"#!{sys.executable}{text}", "serve", "some/model")
    while (line := ran.stdout.readline()) != "ready\n":
        assert line, ran.stderr.read()
    send(ran)
    assert ran.communicate(timeout=30)[0] == "in order\n"
    assert ran.returncode == 5


def test_a_server_that_a_signal_ended_gives_the_status_of_a_shell(tmp_path):
    ran = run_program(tmp_path, "trtllm-serve", "#!/bin/sh\nkill -9 $$\n", "serve", "some/model")
    ran.communicate()
    assert ran.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("reports", [True, False])
def test_totals_of_a_benchmark_are_kept_where_the_user_wants_them(tmp_path, is_set, reports):
    """And what an earlier run left there is not taken for this one's."""
    mine, report = tmp_path / "mine.json", tmp_path / "report.json"
    mine.write_text('{"iterations": 1}')
    report.write_text('{"performance": 2}')
    text = "#!/bin/sh\n" + 'echo \'{"iterations": 7}\' > "$TRTLLM_MEMSHARE_STATS_FILE"\n' * reports
    options = ["-m", "M", "throughput", "--eos_id", "2", "--report_json", str(report)]
    variables = {"TRTLLM_MEMSHARE_STATS_FILE": str(mine)} if is_set else {}
    ran = run_program(tmp_path, "trtllm-bench", text, "bench", *options, **variables)
    _, problem = ran.communicate()
    assert (ran.returncode == 0) == reports, problem
    assert ("no worker reported sharing" in problem) == (not reports)
    assert json.loads(report.read_text()).get("memshare") == ({"iterations": 7} if reports else None)
    if not is_set:
        assert json.loads(mine.read_text()) == {"iterations": 1}
    elif reports:
        assert json.loads(mine.read_text()) == {"iterations": 7}
    else:
        assert not mine.exists()


def test_a_folder_in_place_of_the_totals_is_named(tmp_path, monkeypatch):
    program = tmp_path / "trtllm-bench"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRTLLM_MEMSHARE_STATS_FILE", str(tmp_path))
    with pytest.raises(UserError, match="STATS_FILE must be a file that can be replaced, got /"):
        main("bench", ["-m", "M", "throughput", "--eos_id", "2"])


@pytest.mark.parametrize("command", ["serve", "bench"])
@pytest.mark.parametrize("option", [["--backend", "tensorrt"], ["--backend=_autodeploy"]])
def test_another_backend_is_refused_by_name(monkeypatch, command, option):
    monkeypatch.setenv("PATH", "")
    name = option[-1].partition("=")[2] or option[-1]
    with pytest.raises(UserError, match=f"--backend must be pytorch to share, got {name}"):
        main(command, ["M", *option])
    with pytest.raises(UserError, match="not on PATH"):
        main(command, ["M", "--backend", "pytorch"])
