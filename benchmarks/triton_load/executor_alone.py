"""An executor in a process of its own, without Triton and without text, behind the socket that `ensemble` uses.

Run as a module it is that process: `python -m benchmarks.triton_load.executor_alone ENGINE_DIR SOCKET NUM_BLOCKS`.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import psutil
    from prometheus_client import CollectorRegistry

    from benchmarks.triton_load.server import START_TIMEOUT_S, cpu_seconds
    from trtllm_memshare.errors import UserError
    from trtllm_memshare.runners.engines import load_engine
    from trtllm_memshare.triton.request_metrics import RequestMetrics
    from trtllm_memshare.triton.runtime import end_with_parent
    from trtllm_memshare.triton.service import ExecutorService
    from trtllm_memshare.triton.socket_server import SocketServer
    from trtllm_memshare.triton.token_model import make_executor
    from trtllm_memshare.triton.token_requests import Limits
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_MAX_REQUESTS = 4096


class ExecutorAlone:
    """Starts the process and waits until it listens.

    Args:
      engine_dir: what is served.
      folder: for the socket.
      num_blocks: of the KV pool.

    Raises:
      UserError: it ended, or does not listen in time.
    """

    def __init__(self, engine_dir: Path, folder: Path, num_blocks: int) -> None:
        self.path = folder / "executor.sock"
        module = [sys.executable, "-m", "benchmarks.triton_load.executor_alone"]
        self._process = subprocess.Popen([*module, str(engine_dir), str(self.path), str(num_blocks)])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise UserError("the executor's process did not start (what it printed says why)")
            time.sleep(0.05)

    def cpu_s(self) -> float:
        """CPU time so far."""
        return cpu_seconds(psutil.Process(self._process.pid))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


async def serve(engine_dir: Path, path: Path, num_blocks: int) -> None:
    """Until SIGTERM."""
    engine = load_engine(engine_dir)
    executor, _ = make_executor(engine, num_blocks, "MAX_UTILIZATION")
    longest = engine.build.max_seq_len - 1
    limits = Limits(longest, longest, _MAX_REQUESTS, engine.vocab_size)
    with executor:
        metrics = RequestMetrics(CollectorRegistry())
        size = engine.build.tokens_per_block
        service = ExecutorService(executor, limits, engine.stop_token_ids, size, True, metrics)
        draft = path.with_suffix(".draft")
        server = SocketServer(service, draft)
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await server.start()
        draft.rename(path)  # clients see it once it listens
        await stopped.wait()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
