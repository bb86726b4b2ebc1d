"""A Triton server as the benchmarks see it, over stand-ins: its processes, metrics, readiness and shared memory."""

from __future__ import annotations

import http.server
import math
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from benchmarks.triton_load import server as benchmark_server
from benchmarks.triton_load.server import TritonServer, cpu_seconds
from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.server import Ports

METRICS = b"""# HELP kv_blocks used blocks
kv_blocks{kind="used",model="tensorrt_llm"} 7
memshare_server_restarts 3
"""
MODELS = ("ensemble", "tensorrt_llm")
WAITS = "import signal, sys, time\nprint('up', flush=True)\ntime.sleep(60)\n"
SERVER = """
import subprocess, sys, time
for model in {models}:
    stub = subprocess.Popen([{python!r}, f"{folder}/{{model}}/1/model.py"], stdout=subprocess.PIPE)
    stub.stdout.readline()
print("up", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import signal, subprocess, sys, time
servers = []
def end(*_):
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
for _ in range({count}):
    servers.append(subprocess.Popen(["{folder}/tritonserver", "{folder}/server.py"], stdout=subprocess.PIPE))
    servers[-1].stdout.readline()
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def web():
    """Port of a server that answers everything with the metrics."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def launched(tmp_path):
    """``start(num_servers, port)``: a server seen by the benchmarks, over a launcher with so many servers."""
    started = []

    def start(count: int, port: int = 1) -> TritonServer:
        for model in MODELS:
            (tmp_path / model / "1").mkdir(parents=True)
            (tmp_path / model / "1" / "model.py").write_text(WAITS)
        (tmp_path / "tritonserver").symlink_to(Path(sys.executable).resolve())
        fields = {"models": MODELS, "python": sys.executable, "folder": tmp_path, "count": count}
        (tmp_path / "server.py").write_text(SERVER.format(**fields))
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER.format(**fields)], stdout=subprocess.PIPE)
        found = object.__new__(TritonServer)
        found.launcher, found.log = launcher, tmp_path / "triton.log"
        found.url, found._ports = f"http://127.0.0.1:{port}", Ports(port, port, port)
        found.log.write_text("the end of the log")
        launcher.stdout.readline()
        started.append(launcher)
        return found

    yield start
    for launcher in started:
        rest = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
        for process in [*rest, launcher]:
            process.kill()
        launcher.wait()


def test_the_serving_processes_are_told_from_the_spare_s(launched):
    server = launched(2)
    serving = server.processes()
    assert list(serving) == ["launcher", "tritonserver", *MODELS]
    spare = server.spare()
    assert len(spare) == 3  # a server and its models
    assert not {p.pid for p in spare} & {p.pid for p in serving.values()}
    assert min(p.create_time() for p in spare) >= serving["tritonserver"].create_time()
    assert server.cpu_s() == pytest.approx(sum(cpu_seconds(p) for n, p in serving.items() if n != "launcher"), abs=0.05)
    for process in [*spare, *serving.values()]:
        process.kill()
    server.launcher.wait()  # the only one whose parent asks after it
    assert cpu_seconds(serving["launcher"]) == 0.0


def test_a_launcher_without_a_server_is_all_there_is_and_stops(launched):
    server = launched(0)
    assert list(server.processes()) == ["launcher"]
    assert server.spare() == []
    assert server.stop() == 0


def test_metrics_are_read_by_a_part_of_their_line(launched, web):
    server = launched(0, web)
    assert (server.metric('kind="used"'), server.metric("memshare_server_restarts")) == (7.0, 3.0)
    assert math.isnan(server.metric("nothing of that name"))
    assert server.is_ready()
    server.wait_until_ready()


def test_a_server_that_gives_up_or_takes_too_long_is_named_with_its_log(launched, monkeypatch):
    server = launched(0)
    assert not server.is_ready()
    assert math.isnan(server.metric("memshare_server_restarts"))
    monkeypatch.setattr(benchmark_server, "START_TIMEOUT_S", 0)
    with pytest.raises(UserError, match="did not start within 0 s; the end of its log:\nthe end of the log"):
        server.wait_until_ready()
    server.launcher.kill()
    server.launcher.wait()
    monkeypatch.setattr(benchmark_server, "START_TIMEOUT_S", 600)
    with pytest.raises(UserError, match="Triton did not start"):
        server.wait_until_ready()


def test_shared_memory_is_that_of_one_launcher(launched, tmp_path, monkeypatch):
    server = launched(0)
    server._runtime = "memshare-a"
    for name in ("memshare-a_0_x", "memshare-a_1_y", "memshare-ab_0_x", "other"):
        (tmp_path / name).touch()
    monkeypatch.setattr(benchmark_server, "_SHARED_MEMORY", tmp_path)
    assert server.shared_memory() == ["memshare-a_0_x", "memshare-a_1_y"]
