"""How `ensemble` reaches the executor in the process of `tensorrt_llm`: one connection for all requests."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.events import QueueFullError, ServiceLostError, TokenEvent

_MAX_ANSWER_BYTES = 64 << 20


class RemoteCall:
    """A ``Call`` of the executor in another process."""

    def __init__(self, client: ServiceClient, request_id: int) -> None:
        self._client, self._id = client, request_id
        self._messages = asyncio.Queue[dict[str, Any] | None]()
        self._has_failed = False

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """See ``Call``."""
        ended = False
        try:
            while not ended:
                message = await self._messages.get()
                ended = message is None or "error" in message or message["is_last"]
                yield _event(message)
        finally:
            self._client.forget(self._id)
            if not ended:
                self._client.send({"id": self._id, "forget": True, "failed": self._has_failed})

    def cancel(self, sequence_index: int) -> None:
        """See ``Call``."""
        self._client.send({"id": self._id, "cancel": sequence_index})

    def fail(self) -> None:
        """See ``Call``. An answer that the other side has sent whole is counted as completed there."""
        self._has_failed = True

    def take(self, message: dict[str, Any] | None) -> None:
        """Client's side: a message for this request, None = there will be no more."""
        self._messages.put_nowait(message)


class ServiceClient:
    """Client of ``SocketServer``; for one asyncio loop.

    Args:
      path: of the socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids = itertools.count()
        self._calls: dict[int, RemoteCall] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    async def submit(self, inputs: dict[str, Any]) -> RemoteCall:
        """Sends a request.

        Args:
          inputs: of the model `tensorrt_llm`, as lists and numbers.

        Raises:
          ServiceLostError: the other process is not there.
        """
        await self._connect()
        request_id = next(self._ids)
        call = self._calls[request_id] = RemoteCall(self, request_id)
        self.send({"id": request_id, "inputs": inputs})
        return call

    def send(self, message: dict[str, Any]) -> None:
        """One line to the other side, if it is still there."""
        if self._writer is not None:
            self._writer.write(json.dumps(message).encode() + b"\n")

    def forget(self, request_id: int) -> None:
        """Drops a request that ended."""
        self._calls.pop(request_id, None)

    async def close(self) -> None:
        """Ends the connection; requests still running there are cancelled."""
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            await self._reading

    async def _connect(self) -> None:
        async with self._connecting:
            if self._writer is not None:
                return
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=_MAX_ANSWER_BYTES)
            except OSError as error:
                raise ServiceLostError(
                    f"the model tensorrt_llm cannot be reached: {error} (it may be starting)"
                ) from error
            self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hands messages to their requests; at the end of the connection all of them are told."""
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if (call := self._calls.get(message["id"])) is not None:
                    call.take(message)
        except (ConnectionError, json.JSONDecodeError):
            pass  # the other process was killed in the middle of a line
        finally:
            self._writer = None
            for call in self._calls.values():
                call.take(None)


def _event(message: dict[str, Any] | None) -> TokenEvent:
    if message is None:
        raise ServiceLostError("the model tensorrt_llm went away while it worked on this request (send it again)")
    if "error" not in message:
        return TokenEvent(**{name: value for name, value in message.items() if name != "id"})
    if message["queue_full"]:
        raise QueueFullError(message["error"])
    raise UserError(message["error"]) if message["user"] else RuntimeError(message["error"])
