"""Runs Triton as a child: starts it anew when it or one of its model processes dies, and drains it when told to stop.

Triton 2.51 keeps answering 200 on its health endpoints after a model's process was killed, and the requests that this
process had never end. So one dead process ends the whole server: every client sees its connection close, the health
endpoints are red until the server is ready again, and nothing half-alive is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trtllm_memshare.triton.runtime import RESTARTS_VARIABLE

_STUB = b"triton_python_backend_stub"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1


@dataclass(frozen=True)
class RestartPolicy:
    """How the supervisor bears failure. Times in seconds.

    Attributes:
      answer_s: between a model process's death and the server's end, so that other processes can still tell their
        clients what happened.
      drain_s: how long requests in flight may take after a request to stop.
      settled_s: a server that was ready for so long starts the count of failures anew.
      max_wait_s: longest wait before a start; the wait doubles with each failure.
      max_failures: so many in a row, or a first start that fails, and the supervisor gives up.
    """

    answer_s: float = 0.5
    drain_s: float = 60.0
    settled_s: float = 30.0
    max_wait_s: float = 60.0
    max_failures: int = 5


class Supervisor:
    """Keeps one server running.

    Args:
      command, environment: of the server.
      ready_url: answers 200 when the server is ready.
      policy: see ``RestartPolicy``.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], ready_url: str, policy: RestartPolicy
    ) -> None:
        self._command, self._environment, self._ready_url, self._policy = command, environment, ready_url, policy
        self._stops = 0
        self._ready_at = 0.0
        self.num_restarts = 0

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT. Returns 0 after draining, 1 if the server could not be kept."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures = 0
        while True:
            was_ready, ending = self._serve()
            if self._stops:
                return ending
            settled = was_ready and time.monotonic() - self._ready_at > self._policy.settled_s
            failures = 1 if settled else failures + 1
            if failures >= self._policy.max_failures or not (was_ready or self.num_restarts):
                _say(f"giving up: {failures} failures in a row" if was_ready else "the server did not become ready")
                return 1
            wait = 0.0 if failures == 1 else min(self._policy.max_wait_s, 2.0 ** (failures - 2))
            self.num_restarts += 1
            _say(f"starting the server anew in {wait:g} s (restart {self.num_restarts})")
            until = time.monotonic() + wait
            while time.monotonic() < until and not self._stops:
                time.sleep(_POLL_S)
            if self._stops:
                return 0

    def _stop(self, *_: object) -> None:
        self._stops += 1

    def _serve(self) -> tuple[bool, int]:
        """One life of the server. Returns whether it was ready and, when told to stop, the exit code."""
        environment = {**self._environment, RESTARTS_VARIABLE: str(self.num_restarts)}
        server = subprocess.Popen(self._command, env=environment, start_new_session=True, preexec_fn=_end_with_launcher)
        began, models = time.monotonic(), dict[int, str]()
        try:
            while server.poll() is None:
                if self._stops:
                    return bool(models), self._drain(server)
                if not models and self._is_ready():
                    models, self._ready_at = _watch_models(server.pid), time.monotonic()
                    _say(f"ready after {time.monotonic() - began:.1f} s: {', '.join(sorted(models.values()))}")
                dead = select.select(list(models), [], [], _POLL_S)[0]
                if dead and server.poll() is None:
                    names = ", ".join(sorted(models[handle] for handle in dead))
                    _say(f"the process of {names} has died: the server ends")
                    time.sleep(self._policy.answer_s)
                    return True, 1
            _say(f"tritonserver ended with {server.returncode}")
            return bool(models), 1
        finally:
            for handle in models:
                os.close(handle)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def _drain(self, server: subprocess.Popen[bytes]) -> int:
        """SIGTERM, then waits for requests in flight; a second request to stop ends at once."""
        server.terminate()
        deadline = time.monotonic() + self._policy.drain_s + 10  # the server itself stops waiting at drain_s
        while server.poll() is None and time.monotonic() < deadline and self._stops < 2:
            time.sleep(_POLL_S)
        if server.poll() is None:
            _say(f"requests were still in flight after {self._policy.drain_s:g} s: they are lost")
            return 1
        return server.returncode

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self._ready_url, timeout=1) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def _watch_models(server: int) -> dict[int, str]:
    """Handles that become readable when a model process dies, with the models' names."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if _STUB in arguments[0] and _parent(folder) == server:
                # The first argument is .../MODEL/VERSION/model.py.
                found[os.pidfd_open(int(folder.name))] = Path(arguments[1].decode()).parts[-3]
    return found


def _parent(folder: Path) -> int:
    # The name, second field, may hold spaces and parentheses; what follows the last one does not.
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def _end_with_launcher() -> None:
    """In the child: the kernel kills it when the supervisor dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(text: str) -> None:
    print(f"memshare: {text}", flush=True)
