"""One life of a Triton server as its supervisor sees it: the process, its model processes, and their end together."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import time
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trtllm_memshare.child_process import end_with_parent
from trtllm_memshare.triton.local_http import open_local
from trtllm_memshare.triton.runtime import GATE_VARIABLE, RESTARTS_VARIABLE, remove_shared_memory, signs_of_life

_STUB = b"triton_python_backend_stub"
_ANSWER_S = 5.0  # a loaded server may take seconds to say that it is ready, and nobody watches it until then


@dataclass(frozen=True)
class ServerPlan:
    """What to start.

    Attributes:
      command: of the life with this number, which its shared memory is named after.
      environment: of the server.
      ready_url: answers 200 when the server is ready.
      runtime: folder of the launcher, see ``runtime_folder``.
      can_wait: the models know the gate: a spare may be kept.
    """

    command: Callable[[int], list[str]]
    environment: Mapping[str, str]
    ready_url: str
    runtime: Path
    can_wait: bool


class ServerProcess:
    """A server that was started.

    Args:
      plan: what to start.
      number: 0 for the launcher's first server; what the server's metric of restarts says.
      waits: a spare: its model processes import what they need, then wait for ``open_gate`` before they load anything.
        Triton opens its ports when all models are loaded, so that a spare disturbs nobody.
    """

    def __init__(self, plan: ServerPlan, number: int, waits: bool = False) -> None:
        self._plan, self.number = plan, number
        self.began = time.monotonic()
        self.ready_at: float | None = None
        self._models: dict[int, str] = {}
        self._gate: int | None = None
        self._has_ended = False
        environment = {**plan.environment, RESTARTS_VARIABLE: str(number)}
        if waits:
            gate = plan.runtime / f"gate-{number}"
            # A lock that the kernel releases whatever becomes of the supervisor.
            self._gate = os.open(gate, os.O_CREAT | os.O_WRONLY, 0o600)
            fcntl.flock(self._gate, fcntl.LOCK_EX)
            environment[GATE_VARIABLE] = str(gate)
        self.process = subprocess.Popen(
            plan.command(number), env=environment, start_new_session=True, preexec_fn=end_with_parent
        )

    def open_gate(self) -> None:
        """Lets a spare load its models."""
        self.began = time.monotonic()
        if self._gate is not None:
            os.close(self._gate)
            self._gate = None

    def is_running(self) -> bool:
        return self.process.poll() is None

    def became_ready(self) -> bool:
        """Asks a server that was not ready yet; from its first yes on its model processes are watched."""
        if self.ready_at is not None:
            return False
        try:
            with open_local(self._plan.ready_url, timeout=_ANSWER_S) as response:
                if response.status != 200:
                    return False
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        self._models, self.ready_at = _watch_models(self.process.pid), time.monotonic()
        return True

    def models(self) -> list[str]:
        """Names of the model processes."""
        return sorted(self._models.values())

    def dead_models(self, wait_s: float) -> list[str]:
        """Waits for a model process to die; the names of those that have."""
        return sorted(self._models[handle] for handle in select.select(list(self._models), [], [], wait_s)[0])

    def silent_models(self, max_stall_s: float) -> list[str]:
        """Models of a ready server that gave no sign of life for so long: they live, but nothing moves."""
        if self.ready_at is None:
            return []
        now = time.monotonic()
        signs = signs_of_life(self._plan.runtime)
        return sorted(model for model, at in signs.items() if now - max(at, self.ready_at) > max_stall_s)

    def end(self) -> None:
        """Kills what is left of it and removes what it left behind; a second call does nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        self.open_gate()
        for handle in self._models:
            os.close(handle)
        self._models = {}
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        remove_shared_memory(self._plan.runtime, self.number)


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
