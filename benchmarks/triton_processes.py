"""Processes that the Triton benchmarks start: a server, and an executor by itself behind the same socket protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry

from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.server import Ports, find_server
from trtllm_memshare.triton.service import ExecutorService
from trtllm_memshare.triton.socket_server import SocketServer
from trtllm_memshare.triton.token_model import make_executor
from trtllm_memshare.triton.token_requests import Limits

_START_TIMEOUT_S = 180
MODELS = ("ensemble", "tensorrt_llm", "preprocessing", "postprocessing")


class Server:
    """A Triton server under its launcher.

    Args:
      engine_dir: what is served.
      folder: for the repository and the log.
      options: of the repository.
    """

    def __init__(self, engine_dir: Path, folder: Path, **options: Any) -> None:
        write_repository(RepositoryOptions(engine_dir, folder / "repository", **options))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self._ports = Ports(*(s.getsockname()[1] for s in sockets))
        for s in sockets:
            s.close()
        command = [sys.executable, "-m", "trtllm_memshare.triton.launch", str(folder / "repository")]
        command += [f"--{name}-port={getattr(self._ports, name)}" for name in ("http", "grpc", "metrics")]
        self.log = folder / "triton.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.origin = find_server().origin
        self.start_s = self.wait_until_ready()

    def request(self, endpoint: str, timeout: float = 300, **inputs: Any) -> Any:
        """The open response of an endpoint of ``ensemble``."""
        url = f"http://127.0.0.1:{self._ports.http}/v2/models/ensemble/{endpoint}"
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(inputs).encode()), timeout=timeout)

    def metric(self, part: str) -> float:
        """The first metric whose line holds ``part``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._ports.metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if part in line and line[0] != "#")

    def used_blocks(self) -> float:
        """KV blocks in use."""
        return self.metric('kv_cache_block_type="used"')

    def processes(self) -> dict[str, psutil.Process]:
        """Launcher, server and model processes by name, those that are there."""
        launcher = psutil.Process(self.process.pid)
        found = {"launcher": launcher}
        for child in launcher.children(recursive=True):
            try:
                line = " ".join(child.cmdline())
                if child.name() == "tritonserver":
                    found["tritonserver"] = child
                found |= {model: child for model in MODELS if f"/{model}/1/model.py" in line}
            except psutil.NoSuchProcess:
                continue  # it ended between being listed and being looked at
        return found

    def wait_until_ready(self) -> float:
        """Seconds until the server takes requests. Raises UserError if it does not."""
        started = time.monotonic()
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - started > _START_TIMEOUT_S:
                raise UserError(f"Triton did not start, see {self.log} (its last lines say why)")
            time.sleep(0.05)
        return time.monotonic() - started

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports.http}/v2/health/ready", timeout=5):
                return self.used_blocks() >= 0
        except (OSError, StopIteration):
            return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


class ExecutorProcess:
    """An executor in a process of its own, without Triton and without text, on a Unix socket."""

    def __init__(self, engine_dir: Path, folder: Path, num_blocks: int) -> None:
        self.path = folder / "executor.sock"
        command = [
            sys.executable,
            "-m",
            "benchmarks.triton_processes",
            str(engine_dir),
            str(self.path),
            str(num_blocks),
        ]
        self.process = subprocess.Popen(command)
        while not self.path.exists():
            if self.process.poll() is not None:
                raise UserError("the executor's process did not start")
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


async def _serve(engine_dir: Path, path: Path, num_blocks: int) -> None:
    engine = load_engine(engine_dir)
    executor, _ = make_executor(engine, num_blocks, "MAX_UTILIZATION")
    longest = engine.build.max_seq_len - 1
    limits = Limits(longest, longest, 4096, engine.vocab_size)
    with executor:
        service = ExecutorService(
            executor, limits, engine.stop_token_ids, engine.build.tokens_per_block, True,
            RequestMetrics(CollectorRegistry()),
        )  # fmt: skip
        draft = path.with_suffix(".draft")
        server = SocketServer(service, draft)
        await server.start()
        os.rename(draft, path)  # clients see it once it listens
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
