"""One HTTP request to an ASGI application in this process: no server, no client library."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any


async def ask(
    app: Any,
    method: str,
    path: str,
    body: bytes = b"",
    leaves_after_s: float | None = None,
    headers: dict[str, str] | None = None,
    is_whole: bool = True,
    answered: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body of the answer. An error that the application lets through comes out here.

    Args:
      leaves_after_s: when the client closes its connection, None = it stays.
      headers: beside the type of the body.
      is_whole: whether the body ever ends.
      answered: gets the headers of the answer.
    """
    arrived = time.monotonic()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    pending = [{"type": "http.request", "body": body, "more_body": not is_whole}]
    status, parts = 0, list[bytes]()

    async def receive() -> dict[str, Any]:
        if not pending:
            left = None if leaves_after_s is None else max(0.0, arrived + leaves_after_s - time.monotonic())
            if left != 0.0:  # an application may look and not wait
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.Event().wait(), left)
            return {"type": "http.disconnect"}
        return pending.pop()

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        if answered is not None:
            answered.update((name.decode(), value.decode()) for name, value in message.get("headers", ()))
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
