"""The supervisor over a stand-in for the server: a process with children named as Triton names its stubs."""

from __future__ import annotations

import fcntl
import http.server
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from triton_server.conftest import free_ports

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.runtime import (
    end_with_parent,
    give_sign_of_life,
    private_dir,
    remove_shared_memory,
    runtime_folder,
    wait_for_turn,
)
from trtllm_memshare.triton.server import Ports, check_ports
from trtllm_memshare.triton.server_process import ServerPlan, ServerProcess

# Answers 200 on every path once its two children run; drains for a while on SIGTERM; notes each start.
SERVER = """
    import fcntl, http.server, os, signal, subprocess, sys, threading, time
    folder, port, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with open(f"{folder}/starts", "a") as f:
        f.write(f"{os.getpid()} {os.environ['MEMSHARE_RESTARTS']}\\n")
    if mode == "broken" or mode == "broken spare" and "MEMSHARE_GATE" in os.environ:
        sys.exit(3)
    if "MEMSHARE_GATE" in os.environ:
        fcntl.flock(open(os.environ["MEMSHARE_GATE"]), fcntl.LOCK_SH)
    for model in ("ensemble", "tensorrt_llm"):
        code = f"{folder}/r/{model}/1/model.py"
        stub = subprocess.Popen(["/x/triton_python_backend_stub", code], executable=sys.executable)
    def drain(*_):
        if mode == "holds a model":
            stub.kill()
            time.sleep(60)
        time.sleep(float(os.environ.get("DRAIN", "0")))
        open(f"{folder}/drained", "w").close()
        os._exit(0)
    signal.signal(signal.SIGTERM, drain)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def log_message(self, *_): pass
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
RUN = """
    import os, sys
    from pathlib import Path
    from trtllm_memshare.triton.server_process import ServerPlan
    from trtllm_memshare.triton.supervisor import RestartPolicy, Supervisor
    folder, port, mode = sys.argv[1:]
    settled, stall = float(os.environ.get("SETTLED", "30")), float(os.environ.get("STALL", "60"))
    policy = RestartPolicy(0.05, 5, settled, 0.2, 3, stall, 0.0 if "SPARE" in os.environ else None, 0.2)
    command = [sys.executable, f"{folder}/server.py", folder, port, mode]
    plan = ServerPlan(lambda number: command, os.environ, f"http://127.0.0.1:{port}/ready", Path(folder), True)
    sys.exit(Supervisor(plan, policy).run())
    """


@pytest.fixture
def supervised(tmp_path):
    """Starts a supervisor; afterwards nothing of it may be left."""
    (tmp_path / "server.py").write_text(textwrap.dedent(SERVER))
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    for model in ("ensemble", "tensorrt_llm"):
        code = tmp_path / "r" / model / "1" / "model.py"
        code.parent.mkdir(parents=True)
        code.write_text("import time\ntime.sleep(1000)\n")
    started = []

    def start(mode: str = "good", **environment) -> subprocess.Popen:
        (port,) = free_ports(1)
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), str(port), mode]
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for child in stubs(tmp_path):  # a real stub ends with its server, see end_with_parent
        child.kill()


def line_with(process: subprocess.Popen, part: str) -> str:
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if part in line:
                return line
    finally:
        watchdog.cancel()
    raise AssertionError(f"ended without a line that has {part!r}")


def wait_until(holds, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starts(folder: Path) -> list[list[int]]:
    return [[int(x) for x in line.split()] for line in (folder / "starts").read_text().splitlines()]


def stubs(folder: Path) -> list[psutil.Process]:
    code = str(folder / "r")
    return [p for p in psutil.process_iter(["cmdline"]) if any(code in a for a in (p.info["cmdline"] or [])[1:2])]


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm"])
def test_one_dead_model_process_gives_one_new_server(supervised, tmp_path, model):
    process = supervised()
    assert "ready after" in line_with(process, "ready after")
    old = starts(tmp_path)[0][0]
    next(p for p in psutil.Process(old).children() if f"/r/{model}/1/model.py" in p.cmdline()[1]).kill()
    assert f"the process of {model} has died" in line_with(process, "has died")
    line_with(process, "ready after")
    assert [restarts for _, restarts in starts(tmp_path)] == [0, 1]
    assert not psutil.pid_exists(old)


def test_a_server_that_is_slow_to_say_that_it_is_ready_is_believed(tmp_path):
    """Busy with the requests of clients that saw it ready first; until then nobody watches its model processes."""

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(1.5)
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Slow) as health:
        threading.Thread(target=health.handle_request).start()
        url = f"http://127.0.0.1:{health.server_port}/ready"
        plan = ServerPlan(lambda number: ["sleep", "60"], os.environ, url, tmp_path, False)
        server = ServerProcess(plan, 0)
        try:
            assert server.became_ready()
        finally:
            server.end()


def test_a_dead_server_is_started_anew_and_leaves_no_child(supervised, tmp_path):
    process = supervised()
    line_with(process, "ready after")
    old = psutil.Process(starts(tmp_path)[0][0])
    children = old.children()
    old.kill()
    line_with(process, "ready after")
    assert len(starts(tmp_path)) == 2
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children)


def test_a_server_that_never_gets_ready_is_given_up_at_once(supervised, tmp_path):
    process = supervised("broken")
    assert process.wait(20) == 1
    assert "tritonserver ended with 3" in (output := process.stdout.read())
    assert "the server did not become ready" in output
    assert len(starts(tmp_path)) == 1


def test_crashes_in_a_row_wait_longer_and_end(supervised, tmp_path):
    process = supervised()
    for _ in range(3):
        line_with(process, "ready after")
        os.kill(starts(tmp_path)[-1][0], signal.SIGKILL)
    assert process.wait(20) == 1
    assert "giving up: 3 failures in a row" in process.stdout.read()


def test_crashes_that_lie_apart_are_not_a_row(supervised, tmp_path):
    process = supervised(SETTLED="0.05")
    for _ in range(5):
        line_with(process, "ready after")
        time.sleep(0.2)
        os.kill(starts(tmp_path)[-1][0], signal.SIGKILL)
    line_with(process, "ready after")
    assert [restarts for _, restarts in starts(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_spare_takes_over_and_the_next_one_is_started(supervised, tmp_path):
    process = supervised(SPARE="1")
    line_with(process, "ready after")
    for life in (1, 2):
        wait_until(lambda: len(starts(tmp_path)) == life + 1)  # noqa: B023 - called at once
        (old, _), (spare, number) = starts(tmp_path)[-2:]
        assert number == life
        assert not psutil.Process(spare).children()  # it waits
        os.kill(old, signal.SIGKILL)
        line_with(process, "ready after")
        assert len(psutil.Process(spare).children()) == 2
    process.terminate()
    assert process.wait(20) == 0
    assert not any(psutil.pid_exists(pid) for pid, _ in starts(tmp_path))


def test_a_spare_that_fails_is_told_once_and_the_next_start_is_a_full_one(supervised, tmp_path):
    process = supervised("broken spare", SPARE="1")
    assert "the next start will be a full one" in line_with(process, "the spare server ended with 3")
    os.kill(starts(tmp_path)[0][0], signal.SIGKILL)
    assert "restart 1" in line_with(process, "starting")
    line_with(process, "ready after")
    assert [restarts for _, restarts in starts(tmp_path)][:3] == [0, 1, 1]


def test_a_model_that_lives_without_a_sign_of_life_ends_the_server(supervised, tmp_path, monkeypatch):
    process = supervised(STALL="1")
    line_with(process, "ready after")
    monkeypatch.setenv("MEMSHARE_RUNTIME_DIR", str(tmp_path))
    give_sign_of_life("tensorrt_llm")
    assert "tensorrt_llm gave no sign of life for 1 s: the server ends (raise --max-stall" in line_with(process, "sign")
    line_with(process, "ready after")
    assert len(starts(tmp_path)) == 2


def test_a_model_waits_for_its_turn_behind_the_gate(tmp_path, monkeypatch):
    did = []
    wait_for_turn(lambda: did.append("prepared"))  # no spare: no wait
    assert not did
    gate = tmp_path / "gate"
    monkeypatch.setenv("MEMSHARE_GATE", str(gate))
    with gate.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        model = threading.Thread(target=lambda: (wait_for_turn(lambda: did.append("prepared")), did.append("loaded")))
        model.start()
        wait_until(lambda: did == ["prepared"])
        model.join(0.2)
        assert model.is_alive()
    model.join(10)
    assert did == ["prepared", "loaded"]


def test_sigterm_waits_for_the_server_to_drain(supervised, tmp_path):
    process = supervised(DRAIN="1")
    line_with(process, "ready after")
    process.terminate()
    assert process.wait(20) == 0
    assert (tmp_path / "drained").exists()


def test_a_server_that_holds_a_model_after_all_requests_have_ended_is_not_waited_for(supervised):
    process = supervised("holds a model")
    line_with(process, "ready after")
    process.terminate()
    assert "all requests have ended, but not the server" in line_with(process, "memshare: all")
    assert process.wait(20) == 0


def test_a_killed_supervisor_takes_its_server_along(supervised, tmp_path):
    process = supervised()
    line_with(process, "ready after")
    server = psutil.Process(starts(tmp_path)[0][0])
    process.kill()
    for _ in range(100):
        if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the server outlived its supervisor")
    for child in stubs(tmp_path):  # a real stub ends with its server, see end_with_parent
        child.kill()


def test_processes_end_with_their_parent():
    child = "import time; from trtllm_memshare.triton.runtime import end_with_parent; end_with_parent(); " \
            "print('up', flush=True); time.sleep(1000)"  # fmt: skip
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); " \
             "print(p.pid, flush=True); p.wait()"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    pid = int((lines - {"up"}).pop())
    process.kill()
    process.wait()
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("the child outlived its parent")


def test_an_orphan_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setenv("MEMSHARE_SERVER_NAME", "another")  # this test's parent is something else
    end_with_parent(codes.append)
    assert codes == [1]
    monkeypatch.setenv("MEMSHARE_SERVER_NAME", Path(f"/proc/{os.getppid()}/comm").read_text().strip())
    end_with_parent(codes.append)
    assert codes == [1]


def test_a_port_in_use_is_named_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        a, b = free_ports(2)
        with pytest.raises(UserError, match=f"--grpc-port {port} on 127.0.0.1 cannot be used: Address already in use"):
            check_ports(Ports(a, port, b), "127.0.0.1")
        check_ports(Ports(*free_ports(3)), "127.0.0.1")


def test_the_runtime_folder_is_private_and_a_killed_one_is_cleared_away(tmp_path):
    with runtime_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        ours, next_one = (Path("/dev/shm") / f"{folder.name}_{number}_x" for number in (1, 11))
        ours.touch()
        next_one.touch()
        remove_shared_memory(folder, 1)  # of a server that was killed; its spare keeps its own
        assert (ours.exists(), next_one.exists()) == (False, True)
        left = Path("/dev/shm") / f"{folder.name}_x"
        left.touch()
        with runtime_folder() as other:  # a second server leaves the first one's memory alone
            assert left.exists()
            assert other != folder
    assert not left.exists()
    assert not folder.exists()
    dead = Path("/dev/shm") / "memshare-dead.lock"
    dead.touch()
    (orphan := Path("/dev/shm") / "memshare-dead_1").touch()
    with runtime_folder():
        assert not orphan.exists()
        assert not dead.exists()


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(UserError, match=r"that nobody else can enter, got owner .* and mode 755"):
        private_dir(tmp_path / "open")
    private_dir(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(UserError, match="that nobody else can enter"):
        private_dir(tmp_path / "link")
