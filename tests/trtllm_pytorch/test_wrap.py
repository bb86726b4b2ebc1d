"""``memshare serve`` and ``bench`` around TensorRT-LLM's programs; these are stand-ins here."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import trtllm_memshare

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
