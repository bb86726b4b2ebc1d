"""What an HTTP request must pass before its body is parsed: the API key, and limits on the body's bytes and time.

A body is parsed whole. Read without these, it may have taken all memory before anybody asked who sends it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers

from trtllm_memshare.json_input import MAX_LINE_BYTES

MAX_BODY_BYTES = MAX_LINE_BYTES
"""A prompt of a million tokens, written as ids, takes half of it."""
MAX_HELD_BYTES = 32 * MAX_BODY_BYTES
"""Of the bodies of all requests in the system."""
MAX_BODY_SECONDS = 60.0
"""From a request's beginning to the end of its body."""
_CLOSE = {"Connection": "close"}
"""With an answer to a body that has not come whole: the rest of it would keep the connection for ever."""
_OPEN = ("/health", "/metrics")
"""Asked by who watches the server, without a key; they have no body."""


class BodyLimit:
    """ASGI middleware.

    Args:
      app: what comes next.
      api_key: that requests must carry; empty = none.
      unauthorized: makes the answer to a request without it.
    """

    def __init__(self, app: Any, api_key: str, unauthorized: Callable[[], JSONResponse]) -> None:
        self._app, self._key, self._unauthorized = app, api_key.encode(), unauthorized
        self._num_held = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._may_pass(scope):
            await self._unauthorized()(scope, receive, send)
            return
        num_bytes, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + MAX_BODY_SECONDS

        async def counted() -> Any:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes now is that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError as error:
                raise HTTPException(
                    408, f"the body of a request must come in {MAX_BODY_SECONDS:.0f} s", _CLOSE
                ) from error
            is_whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            num_bytes += size
            self._num_held += size
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body of a request may have {MAX_BODY_BYTES:,} bytes, got more", _CLOSE)
            if self._num_held > MAX_HELD_BYTES:
                raise HTTPException(
                    503,
                    f"the bodies of all requests may have {MAX_HELD_BYTES:,} bytes together (try again later)",
                    {"Retry-After": "1", **_CLOSE},
                )
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._num_held -= num_bytes

    def _may_pass(self, scope: Any) -> bool:
        if not self._key or scope["path"].rstrip("/") in _OPEN:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Starlette reads headers as latin-1; a key is ASCII.
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key)
