"""A limit on the body of an HTTP request, held while it is read: read whole, it may have taken all memory."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from trtllm_memshare.json_input import MAX_LINE_BYTES

MAX_BODY_BYTES = MAX_LINE_BYTES
"""A prompt of a million tokens, written as ids, takes half of it."""


class BodyLimit:
    """ASGI middleware.

    Args:
      app: what comes next.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        num_bytes = 0

        async def counted() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body of a request may have {MAX_BODY_BYTES:,} bytes, got more")
            return message

        await self._app(scope, counted, send)
