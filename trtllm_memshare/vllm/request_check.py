"""Tells a client of vLLM's server which option of its request cannot be used: the scheduler, in another process, can
only end such a request with "internal error".
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.request_options import parse_request_options

_FIELD = "vllm_xargs"


class RequestCheck:
    """ASGI middleware for vLLM's ``--middleware``: what a body's ``vllm_xargs`` say is read as its last part arrives.

    Who reads the body then gets an ``HTTPException`` 400 in its place, which vLLM's own handler puts into its own form.
    So nothing is read ahead of vLLM's check of the API key, and answers are not touched.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        parts: list[bytes] = []

        async def checked() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    _check(b"".join(parts))
            return message

        await self._app(scope, checked if scope["type"] == "http" else receive, send)


def _check(body: bytes) -> None:
    if _FIELD.encode() not in body:  # nearly all bodies: a long prompt is not parsed twice
        return
    try:
        request = json.loads(body)
    except ValueError:
        return  # vLLM says so
    options = request.get(_FIELD) if isinstance(request, dict) else None
    if isinstance(options, dict):
        try:
            parse_request_options(options, 1.0)
        except UserError as error:
            raise HTTPException(400, f"{_FIELD}: {error}") from error
