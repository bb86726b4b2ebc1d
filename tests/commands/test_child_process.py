"""Who stops one of our wrappers stops the program, and its status is the wrapper's."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from run_program import ROOT, run_program

from trtllm_memshare.child_process import shown_line

WRAPPERS = [
    ("trtllm-serve", "serve", "some/model"),
    ("vllm", "vllm", "serve", "m", "--null-entries", "skip"),
]
DRAINS = f"""#!{sys.executable}
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


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda w: w[0])
@pytest.mark.parametrize(
    "send",
    [
        lambda ran: ran.terminate(),
        lambda ran: ran.send_signal(signal.SIGINT),
        lambda ran: os.killpg(ran.pid, signal.SIGINT),
    ],
)
def test_who_stops_the_command_stops_the_program_which_ends_in_its_own_order(tmp_path, wrapper, send):
    """By a signal to the command alone, as a container's manager sends it, or Ctrl-C, which both get."""
    name, *arguments = wrapper
    ran = run_program(tmp_path, name, DRAINS, *arguments)
    while (line := ran.stdout.readline()) != "ready\n":
        assert line, ran.stderr.read()
    send(ran)
    assert ran.communicate(timeout=30)[0] == "in order\n"
    assert ran.returncode == 5


COUNTS = f"""#!{sys.executable}
import signal, time
times = []
signal.signal(signal.SIGINT, lambda *_: times.append(time.monotonic()))
print("ready", flush=True)
while not times or time.monotonic() < times[0] + 0.5:
    time.sleep(0.01)
print(len(times), flush=True)
"""
_LATER = """
import subprocess, time
send = subprocess.Popen.send_signal
subprocess.Popen.send_signal = lambda self, number: (time.sleep(0.05), send(self, number))
"""


def test_ctrl_c_in_a_terminal_reaches_the_program_once(tmp_path):
    """Servers take a second one for impatience, and cut off what they were to finish."""
    (tmp_path / "sitecustomize.py").write_text(_LATER)  # two that come at once would be taken for one
    ran = run_program(tmp_path, "trtllm-serve", COUNTS, "serve", "m", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    while (line := ran.stdout.readline()) != "ready\n":
        assert line, ran.stderr.read()
    os.killpg(ran.pid, signal.SIGINT)
    assert ran.communicate(timeout=30)[0] == "1\n"


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_command_that_is_killed_leaves_no_program_behind(tmp_path, send):
    ran = run_program(tmp_path, "trtllm-serve", "#!/bin/sh\necho $$\nexec sleep 60\n", "serve", "m")
    while not (line := ran.stdout.readline()).strip().isdigit():
        assert line, ran.stderr.read()
    send(ran.pid, signal.SIGKILL)
    assert ran.stdout.read() == ""  # the pipe's other end is closed: nobody is left who holds it


def test_ctrl_z_pauses_the_program_too(tmp_path):
    counts = "import time\nn = 0\nwhile True:\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.01)\n"
    ran = run_program(tmp_path, "trtllm-serve", f"#!{sys.executable}\n{counts}", "serve", "m")
    while not (line := ran.stdout.readline()).strip().isdigit():
        assert line, ran.stderr.read()
    ran.send_signal(signal.SIGTSTP)
    os.waitid(os.P_PID, ran.pid, os.WSTOPPED)
    (program,) = Path(f"/proc/{ran.pid}/task/{ran.pid}/children").read_text().split()
    deadline = time.monotonic() + 30  # it was told first, and may stop last
    while (state := Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    ran.send_signal(signal.SIGCONT)
    ran.terminate()
    ran.communicate(timeout=30)
    assert ran.returncode == 128 + signal.SIGTERM


def test_a_terminal_that_is_closed_closes_the_program(tmp_path):
    before = signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # a run of these tests that survives its own terminal ignores it
    ran = run_program(tmp_path, "trtllm-serve", "#!/bin/sh\necho $$\nexec sleep 60\n", "serve", "m")
    signal.signal(signal.SIGHUP, before)
    while not (line := ran.stdout.readline()).strip().isdigit():
        assert line, ran.stderr.read()
    ran.send_signal(signal.SIGHUP)
    ran.communicate(timeout=30)
    assert ran.returncode == 128 + signal.SIGHUP


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda w: w[0])
def test_a_program_that_a_signal_ended_gives_the_status_of_a_shell(tmp_path, wrapper):
    name, *arguments = wrapper
    ran = run_program(tmp_path, name, "#!/bin/sh\nkill -9 $$\n", *arguments)
    ran.communicate()
    assert ran.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            ["serve", "my model", "--api-key", "sk-1", "sk-2", "--port", "1"],
            "serve 'my model' --api-key *** *** --port 1",
        ),
        (["--api_key=sk-1", "m"], "--api_key=*** m"),
        (["--api-k", "sk-1"], "--api-k ***"),
        (["--hf-token", "--port", "1"], "--hf-token --port 1"),
        (["--hf-token", "hf-1", "-O3"], "--hf-token *** -O3"),
        (["--kv.admin_password=p"], "--kv.admin_password=***"),
        (["--max-num-batched-tokens", "8", "--tokenizer", "t"], "--max-num-batched-tokens 8 --tokenizer t"),
    ],
)
def test_keys_and_tokens_are_hidden_in_what_is_shown(line, shown):
    assert shown_line(line) == shown


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda w: w[0])
def test_no_key_is_printed_and_the_program_gets_it(tmp_path, wrapper):
    program, *arguments = wrapper
    if program == "trtllm-serve":
        (tmp_path / "options.yaml").write_text("hf_token: sk-3\ninner: {api_key: sk-3}\n")
        arguments += ["--config", str(tmp_path / "options.yaml")]
    script = '#!/bin/sh\ncase "$*" in *"--api-key sk-1 --hf_token=sk-2"*) exit 7;; esac\n'
    ran = run_program(tmp_path, program, script, *arguments, "--api-key", "sk-1", "--hf_token=sk-2")
    printed = "".join(ran.communicate())
    assert ran.returncode == 7, printed
    assert "--api-key *** --hf_token=***" in printed
    assert "sk-" not in printed
