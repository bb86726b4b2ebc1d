"""A real Triton server, the CPU build inside the nvidia-pytriton wheel, and the OpenAI-compatible one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120
CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinks %}<think>{% endif %}"


@dataclass
class Triton:
    """A running server. ``log``: what it wrote."""

    process: subprocess.Popen
    http: int
    grpc: int
    metrics_port: int
    log: Path

    def generate(self, timeout: float = 60, model: str = "ensemble", **inputs) -> dict:
        """One call of a generate endpoint; raises ``urllib.error.HTTPError`` for an error."""
        with self.open("generate", timeout, model, **inputs) as response:
            return json.load(response)

    def stream(self, timeout: float = 60, model: str = "ensemble", **inputs) -> list[dict]:
        """All events of a generate_stream call."""
        with self.open("generate_stream", timeout, model, **{"stream": True, **inputs}) as response:
            return [json.loads(line[5:]) for line in response if line.startswith(b"data:")]

    def open(self, endpoint: str, timeout: float, model: str = "ensemble", **inputs):
        """The open response of an endpoint of a model."""
        url = f"http://127.0.0.1:{self.http}/v2/models/{model}/{endpoint}"
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(inputs).encode()), timeout=timeout)

    def metrics(self) -> dict[str, float]:
        """Value by name with labels, as on the metrics endpoint."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def used_blocks(self) -> float:
        """KV blocks in use, as the server reports them."""
        found = [v for k, v in self.metrics().items() if 'kv_cache_block_type="used"' in k]
        assert len(found) == 1
        return found[0]

    def server_process(self) -> psutil.Process:
        """The server itself, child of the launcher."""
        servers = [c for c in psutil.Process(self.process.pid).children() if c.name() == "tritonserver"]
        return min(servers, key=lambda c: c.create_time())  # the other one is its spare

    def model_process(self, model: str) -> psutil.Process:
        """The python process of a model."""
        return next(c for c in self.server_process().children() if f"/{model}/1/model.py" in " ".join(c.cmdline()))

    def wait_until(self, holds, timeout: float = 30) -> None:
        """Waits for a condition; fails with the end of the log."""
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=5) as response:
                return response.status == 200 and bool(self.metrics())  # the metrics endpoint starts last
        except (urllib.error.URLError, ConnectionError):
            return False


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_triton(
    folder: Path,
    engine_dir: Path,
    with_whole: bool = False,
    launch: tuple[str, ...] = ("--no-spare",),
    edit: Callable[[Path], object] = lambda repository: None,
    **options,
) -> Triton:
    """Writes a repository and starts the server through ``launch_triton.py``.

    ``edit``: changes the repository before the server reads it.
    ``launch``: its options; a spare would take time from tests that kill nothing.
    ``with_whole``: a further model ``whole``, which is `ensemble` as a repository without decoupled models has it.
    """
    repository = folder / "model_repository"
    options = {"cancellation_check_period_ms": 50, "stats_check_period_ms": 50, **options}
    write_repository(RepositoryOptions(engine_dir, repository, **options))
    if with_whole:
        write_repository(RepositoryOptions(engine_dir, folder / "other", decoupled=False, **options))
        (folder / "other" / "ensemble").rename(repository / "whole")
        config = repository / "whole" / "config.pbtxt"
        config.write_text(config.read_text().replace('name: "ensemble"', 'name: "whole"'))
    edit(repository)
    http, grpc, metrics = free_ports(3)
    command = [sys.executable, str(ROOT / "build_scripts" / "launch_triton.py"), str(repository),
               f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", *launch]  # fmt: skip
    log = folder / "triton.log"
    # One thread for arithmetic: the machine's cores belong to the server and to the clients of the test.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    triton = Triton(process, http, grpc, metrics, log)
    triton.wait_until(lambda: triton.is_ready() or process.poll() is not None, START_TIMEOUT_S)
    assert process.poll() is None, log.read_text(errors="replace")[-3000:]
    return triton


def stop_triton(triton: Triton) -> None:
    triton.process.send_signal(signal.SIGTERM)
    try:
        triton.process.wait(60)
    except subprocess.TimeoutExpired:
        triton.process.kill()
        triton.process.wait()
        raise


@pytest.fixture(scope="session")
def served_engine(tmp_path_factory) -> Path:
    """The bundled model with sharing on."""
    pytest.importorskip("pytriton", reason="nvidia-pytriton, which carries a Triton server, is not installed")
    options = BuildOptions(output_dir=tmp_path_factory.mktemp("triton") / "engine", memshare=True, preset="aligned",
                           build={"max_seq_len": 2048, "max_batch_size": 64})  # fmt: skip
    build_engine(plan_build(options))
    return options.output_dir


@pytest.fixture(scope="session")
def triton(served_engine, tmp_path_factory) -> Iterator[Triton]:
    """One server for the tests that leave it as it was."""
    server = start_triton(tmp_path_factory.mktemp("server"), served_engine, with_whole=True, kv_cache_blocks=2000,
                          max_prompt_tokens=100, max_prompt_bytes=1000)  # fmt: skip
    yield server
    stop_triton(server)


@dataclass(frozen=True)
class OpenAIServer:
    """A running ``memshare serve --engine-dir``."""

    url: str
    model: str
    api_key: str
    tokenizer_dir: Path

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            return response.read().decode()


@pytest.fixture(scope="session")
def openai_server(tmp_path_factory) -> Iterator[OpenAIServer]:
    """Over the bundled model, with a chat template and a key."""
    folder = tmp_path_factory.mktemp("openai")
    options = BuildOptions(output_dir=folder / "tiny", memshare=True,
                           build={"max_seq_len": 2048, "max_batch_size": 16})  # fmt: skip
    build_engine(plan_build(options))
    (folder / "template.jinja").write_text(CHAT_TEMPLATE)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "trtllm_memshare", "serve", "--engine-dir", str(folder / "tiny"),
               f"--port={port}", f"--chat-template={folder / 'template.jinja'}", "--max-prompt-tokens=200",
               "--max-queue-size=20"]  # fmt: skip
    log, environment = folder / "log", {**os.environ, "OMP_NUM_THREADS": "1", "MEMSHARE_API_KEY": "secret"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    server = OpenAIServer(f"http://127.0.0.1:{port}", "tiny", "secret", folder / "tiny" / "model")
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline and not _is_healthy(server.url):
        time.sleep(0.1)
    assert process.poll() is None, log.read_text()
    yield server
    process.terminate()
    assert process.wait(30) == 0, log.read_text()


def _is_healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False
