"""Serves an ``ExecutorService`` on a Unix socket, one JSON object a line."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing
from pathlib import Path
from typing import Any

from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.serving.failures import describe
from trtllm_memshare.triton.events import QueueFullError
from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.service import ExecutorService
from trtllm_memshare.triton.tensors import RequestTensors

MAX_MESSAGE_BYTES = 64 << 20  # requests are checked before they are sent, so that none comes near it
_log = logging.getLogger(__name__)


class SocketServer:
    """The executor's side.

    A client sends ``{"id": 1, "inputs": {...}}``, ``{"id": 1, "cancel": SEQUENCE}`` or ``{"id": 1, "forget": true,
    "failed": false}`` and gets the fields of a
    ``TokenEvent`` with the id, or ``{"id": 1, "error": "...", "queue_full": false, "user": true}``. When it goes away
    its requests are cancelled, and so they are when it sends what is no message. Errors use the names of `ensemble`,
    whose callers read them.

    Args:
      service: what answers.
      path: of the socket, in a private folder.
    """

    def __init__(self, service: ExecutorService, path: Path) -> None:
        self._service, self._path = service, path
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens; a socket that an earlier process left behind is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_MESSAGE_BYTES)

    async def stop(self) -> None:
        """Stops listening; connections end with their clients."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                message = _parse(line)
                label = f"socket {id(writer)} {message['id']}"
                if "cancel" in message:
                    self._service.cancel(label, message["cancel"])
                elif message.get("forget"):
                    if message.get("failed"):
                        self._service.fail(label)
                    self._service.stop(label)
                else:
                    task = asyncio.create_task(self._answer(label, message, writer))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        except (asyncio.CancelledError, ConnectionError):
            pass  # this process stops, or the client's was killed
        except ValueError as error:  # no message, or a line without an end
            _log.error("a client of the executor is cut off: %s", describe(error))
        finally:
            for task in tasks:
                task.cancel()
            writer.close()

    async def _answer(self, label: str, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        def send(**fields: Any) -> None:
            writer.write(json.dumps({"id": message["id"], **fields}).encode() + b"\n")

        try:
            tensors = RequestTensors.of_values(message["inputs"], TEXT_NAMES)
            async with aclosing(self._service.answer(tensors, label)) as events:
                async for event in events:
                    send(**event.as_message())
                    await writer.drain()
        except UserError as error:
            send(error=str(error), queue_full=isinstance(error, QueueFullError), user=True)
        except Exception as error:  # whatever it is, the other side waits for an answer
            send(error=describe(error), queue_full=False, user=False)


def _parse(line: bytes) -> dict[str, Any]:
    """A client's message. Numbers may be NaN: what a caller set is refused by name later.

    Raises:
      UserError: no JSON object with a number as id, or a sequence to cancel that is no number.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a message must be a JSON object, got {quote(line[:200])}") from error
    numbers = [message.get("id"), message.get("cancel", 0)] if isinstance(message, dict) else [None]
    if not all(type(number) is int for number in numbers):
        raise UserError(f"a message must be a JSON object with an id, got {quote(line[:200])}")
    return dict(message)
