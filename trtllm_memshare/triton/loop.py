"""An asyncio loop in a thread of its own: the one thread of a model process that talks to Triton's senders.

Triton's stub does not stand senders, cancellation checks and BLS calls from many threads (seen with 2.51: a corrupted
heap, a deadlock between the interpreter's lock and the stub's own, and a crash of the server).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any


class LoopThread:
    """Runs coroutines until ``stop``, which waits for them.

    Args:
      name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Starts a coroutine from any thread."""
        self.loop.call_soon_threadsafe(self._spawn, coroutine)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine from another thread and waits for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def stop(self) -> None:
        """Waits for what was started, then ends the loop."""
        self.run(self._wait())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}  # readers of connections
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class TokenStream:
    """Wakes a coroutine when the executor has something for it: the listener of one or several requests.

    Args:
      streaming: wake up for every token, not only at the end.
    """

    def __init__(self, streaming: bool) -> None:
        self._loop, self._event, self._streaming = asyncio.get_running_loop(), asyncio.Event(), streaming

    def listener(self, ended: bool) -> None:
        """For ``Executor.submit``; called by the executor's thread."""
        if self._streaming or ended:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Until something has come since the last time; a slow reader then finds more at once."""
        await self._event.wait()
        self._event.clear()
