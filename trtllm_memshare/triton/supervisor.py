"""Runs Triton as a child: starts it anew when it or one of its model processes dies, and drains it when told to stop.

Triton 2.51 keeps answering 200 on its health endpoints after a model's process was killed, and the requests that this
process had never end. So one dead process ends the whole server: every client sees its connection close, the health
endpoints are red until the server is ready again, and nothing half-alive is left. A model process that lives but does
not move counts as dead.

Most of a start is imports. A spare server that has done them, and has loaded nothing, waits for its turn.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

from trtllm_memshare.triton.server_process import ServerPlan, ServerProcess

_POLL_S = 0.1
_EXECUTOR = "tensorrt_llm"  # every request ends in its process, in both flavours


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
      max_stall_s: a model without a sign of life for so long counts as dead.
      spare_after_s: a spare is started when the server was ready for so long; None = none is kept.
      unload_s: how long a stopping server may take once its executor has ended, and with it every request.
    """

    answer_s: float = 0.5
    drain_s: float = 60.0
    settled_s: float = 30.0
    max_wait_s: float = 60.0
    max_failures: int = 5
    max_stall_s: float = 120.0
    spare_after_s: float | None = 3.0
    unload_s: float = 10.0


class Supervisor:
    """Keeps one server running.

    Args:
      plan: what to start.
      policy: see ``RestartPolicy``.
    """

    def __init__(self, plan: ServerPlan, policy: RestartPolicy) -> None:
        self._plan, self._policy = plan, policy
        self._stops = 0
        self._spare: ServerProcess | None = None
        self.num_restarts = 0

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT. Returns 0 after draining, 1 if the server could not be kept."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        failures, server = 0, ServerProcess(self._plan, 0)
        try:
            while True:
                ending = self._watch(server)
                server.end()
                if self._stops:
                    return ending
                failures = 1 if self._has_settled(server) else failures + 1
                was_ready = server.ready_at is not None
                if failures >= self._policy.max_failures or not (was_ready or self.num_restarts):
                    _say(f"giving up: {failures} failures in a row" if was_ready else "the server did not become ready")
                    return 1
                if not self._wait(0.0 if failures == 1 else min(self._policy.max_wait_s, 2.0 ** (failures - 2))):
                    return 0
                server = self._next()
        finally:
            server.end()
            self._drop_spare()

    def _stop(self, *_: object) -> None:
        self._stops += 1

    def _has_settled(self, server: ServerProcess) -> bool:
        return server.ready_at is not None and time.monotonic() - server.ready_at > self._policy.settled_s

    def _wait(self, seconds: float) -> bool:
        """Waits before a start. Returns False if told to stop meanwhile."""
        self.num_restarts += 1
        _say(f"starting the server anew in {seconds:g} s (restart {self.num_restarts})")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stops:
            time.sleep(_POLL_S)
        return not self._stops

    def _next(self) -> ServerProcess:
        """The spare if there is one, else a new server."""
        server, self._spare = self._spare, None
        if server is None or not server.is_running():
            if server is not None:
                server.end()
            return ServerProcess(self._plan, self.num_restarts)
        server.open_gate()
        return server

    def _watch(self, server: ServerProcess) -> int:
        """Until the server ends or has to. Returns the exit code for the case that this was told to stop."""
        spare_fails = False
        while server.is_running():
            if self._stops:
                return self._drain(server)
            if server.became_ready():
                _say(f"ready after {time.monotonic() - server.began:.1f} s: {', '.join(server.models())}")
            if dead := server.dead_models(_POLL_S):
                if server.is_running():
                    _say(f"the process of {', '.join(dead)} has died: the server ends")
                    time.sleep(self._policy.answer_s)
                    return 1
            elif silent := server.silent_models(self._policy.max_stall_s):
                _say(
                    f"{', '.join(silent)} gave no sign of life for {self._policy.max_stall_s:g} s: the server ends "
                    f"(raise --max-stall if a step may take that long)"
                )
                return 1
            spare_fails = spare_fails or self._keep_spare(server)
        _say(f"tritonserver ended with {server.process.returncode}")
        return 1

    def _keep_spare(self, server: ServerProcess) -> bool:
        """Starts a spare when it is time. Returns True if it has ended by itself: no other is tried then."""
        after = self._policy.spare_after_s
        if self._spare is not None and not self._spare.is_running():
            _say(f"the spare server ended with {self._spare.process.returncode}: the next start will be a full one")
            self._drop_spare()
            return True
        is_time = after is not None and server.ready_at is not None and time.monotonic() - server.ready_at > after
        if self._spare is None and is_time and self._plan.can_wait:
            self._spare = ServerProcess(self._plan, self.num_restarts + 1, waits=True)
        return False

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def _drain(self, server: ServerProcess) -> int:
        """SIGTERM, then waits for requests in flight; a second request to stop ends at once."""
        self._drop_spare()
        server.process.terminate()
        deadline, all_ended = time.monotonic() + self._policy.drain_s + 10, False  # the server stops waiting at drain_s
        while server.is_running() and time.monotonic() < deadline and self._stops < 2:
            time.sleep(_POLL_S)
            if not all_ended and _EXECUTOR in server.dead_models(0):
                all_ended, deadline = True, min(deadline, time.monotonic() + self._policy.unload_s)
        if server.is_running() and all_ended:
            # Triton 2.51 keeps a model for a client that died and left what its stream held unread.
            _say("all requests have ended, but not the server: it is killed")
            return 0
        if server.is_running():
            _say(f"requests were still in flight after {self._policy.drain_s:g} s: they are lost")
            return 1
        return int(server.process.returncode)


def _say(text: str) -> None:
    print(f"memshare: {text}", flush=True)
