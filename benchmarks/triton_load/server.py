"""A Triton server under its launcher, as the benchmarks see it: started, asked, looked at, stopped."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository
from trtllm_memshare.triton.server import Ports, find_server

START_TIMEOUT_S = 180
_SHARED_MEMORY = Path("/dev/shm")


class TritonServer:
    """Starts the server and waits until it is ready.

    Args:
      engine_dir: what is served.
      folder: for the repository and the log.
      launch: options of the launcher.
      repository: options of the repository, see ``RepositoryOptions``.

    Raises:
      UserError: it does not become ready.
    """

    def __init__(self, engine_dir: Path, folder: Path, launch: tuple[str, ...] = (), **repository: Any) -> None:
        write_repository(RepositoryOptions(engine_dir, folder / "repository", **repository))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self._ports = Ports(*(s.getsockname()[1] for s in sockets))
        for s in sockets:
            s.close()
        self.url = f"http://127.0.0.1:{self._ports.http}"
        self.log, self.origin = folder / "triton.log", find_server().origin
        command = [sys.executable, "-m", "trtllm_memshare.triton.launch", str(folder / "repository"), *launch]
        command += [f"--{name}-port={getattr(self._ports, name)}" for name in ("http", "grpc", "metrics")]
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self.wait_until_ready()
            self._runtime = runtime_name(self.processes()["tritonserver"].cmdline())
        except BaseException:
            self.launcher.kill()
            raise

    def wait_until_ready(self) -> None:
        """Raises UserError if that takes too long or the launcher has given up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                log = self.log.read_text(errors="replace")[-1500:]
                raise UserError(f"Triton did not start within {START_TIMEOUT_S} s; the end of its log:\n{log}")
            time.sleep(0.02)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5):
                return True
        except OSError:
            return False

    def metric(self, part: str) -> float:
        """The first metric whose line holds ``part``; NaN if there is none."""
        url = f"http://127.0.0.1:{self._ports.metrics}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                lines = response.read().decode().splitlines()
        except OSError:  # the metrics endpoint is the last to start
            return float("nan")
        return next((float(line.split()[-1]) for line in lines if part in line and line[0] != "#"), float("nan"))

    def processes(self) -> dict[str, psutil.Process]:
        """Those that serve, by name: ``launcher``, ``tritonserver`` and the models; without the spare."""
        launcher = psutil.Process(self.launcher.pid)
        servers = [c for c in launcher.children() if _line(c).endswith("/tritonserver")]
        if not servers:
            return {"launcher": launcher}
        serving = min(servers, key=psutil.Process.create_time)
        models = {parts[-3]: c for c in serving.children() if len(parts := Path(_line(c, 1)).parts) > 2}
        return {"launcher": launcher, "tritonserver": serving, **models}

    def spare(self) -> list[psutil.Process]:
        """Every process of the spare server; empty if there is none."""
        serving = {p.pid for p in self.processes().values()}
        return [p for p in psutil.Process(self.launcher.pid).children(recursive=True) if p.pid not in serving]

    def cpu_s(self) -> float:
        """CPU time of all that serves, its launcher not counted."""
        return sum(cpu_seconds(p) for name, p in self.processes().items() if name != "launcher")

    def shared_memory(self) -> list[str]:
        """Names of the shared memory of every server that this launcher has started."""
        return sorted(path.name for path in _SHARED_MEMORY.glob(f"{self._runtime}_*"))

    def stop(self) -> int:
        """Drains. Returns the launcher's exit code."""
        self.launcher.send_signal(signal.SIGTERM)
        return self.launcher.wait(120)


def runtime_name(command: list[str]) -> str:
    """What the names of all shared memory of a launcher's servers begin with, from one server's command line."""
    option = next(part for part in command if "shm-region-prefix-name=" in part)
    return option.partition("shm-region-prefix-name=")[2].rsplit("_", 2)[0]


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time; 0 for a process that has ended."""
    try:
        return sum(process.cpu_times()[:2])
    except psutil.Error:
        return 0.0


def cpu_pressure_s() -> float:
    """Seconds since boot in which some process of the machine waited for a core; NaN where the kernel does not say."""
    try:
        return int(Path("/proc/pressure/cpu").read_text().split("total=")[1].split()[0]) / 1e6
    except OSError:
        return float("nan")


def _line(process: psutil.Process, place: int = 0) -> str:
    try:
        return str(process.cmdline()[place])
    except (psutil.Error, IndexError):
        return ""  # it ended between being listed and being looked at
