"""The OpenAI-compatible endpoint: routes over a ``TextService``."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from trtllm_memshare.errors import UserError, shorten
from trtllm_memshare.serving.failures import describe
from trtllm_memshare.triton.body_limit import BodyLimit
from trtllm_memshare.triton.events import QueueFullError, TextEvent
from trtllm_memshare.triton.openai_replies import Replies
from trtllm_memshare.triton.openai_schema import FORMS, ChatRequest, Common, CompletionRequest, token_inputs
from trtllm_memshare.triton.outputs import merged
from trtllm_memshare.triton.reasoning import ends_inside
from trtllm_memshare.triton.text_service import TextRequest, TextService

_LEFT_S = 0.2  # how often it is asked whether the client of an answer that is not streamed is still there
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_AGAIN = {"Retry-After": "1"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """What the routes serve.

    Attributes:
      service: text in, text out.
      model: name that requests may give and answers carry.
      max_output_tokens: of a chat answer that names no limit, if its prompt leaves so many.
      max_seq_len: prompt and answer together, in tokens.
      is_alive: whether the executor works.
      registry: metrics.
      api_key: that requests must carry; empty = none.
    """

    service: TextService
    model: str
    max_output_tokens: int
    max_seq_len: int
    is_alive: Callable[[], bool]
    registry: CollectorRegistry
    api_key: str = ""


def make_app(endpoint: Endpoint) -> FastAPI:
    """The application."""
    app = FastAPI(title="MemShare", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.endpoint = endpoint
    app.add_middleware(BodyLimit, api_key=endpoint.api_key, unauthorized=_unauthorized)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
        field = first["loc"][1] if len(first["loc"]) > 1 else ""
        if (kinds := FORMS.get(field)) and first[
            "type"
        ] != "missing":  # of several forms the first one's fault says little
            return _error(400, f"{field} must be {kinds}")
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'the body'}: {first['msg'].lower()}")

    @app.exception_handler(HTTPException)
    async def refused_by_framework(_: Request, error: HTTPException) -> JSONResponse:
        kind = "overloaded_error" if error.status_code == 503 else "invalid_request_error"
        return _error(error.status_code, str(error.detail), kind, headers=dict(error.headers or {}))

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return _refusal(error)

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if endpoint.is_alive() else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(endpoint.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(endpoint)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return _model(endpoint) if name == endpoint.model else _no_model(name, endpoint)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.model not in ("", endpoint.model):
            return _no_model(body.model, endpoint)
        with endpoint.service.arriving():
            body.check_extra()
            given = body.prompts
            endpoint.service.check_number(len(given) * body.n)
            tokens = body.max_tokens or _DEFAULT_COMPLETION_TOKENS
            inputs = [token_inputs(body, tokens, body.wants_log_probs) for _ in given]
            prompts = [
                TextRequest(prompt, of_one, body.stop_words, [], body.stream, body.echo)
                for prompt, of_one in zip(given, inputs, strict=True)
            ]
        replies = Replies(endpoint.model, endpoint.service.tokenizer, body.n, False, body.wants_log_probs)
        return await _answer(endpoint, body, prompts, replies, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.model not in ("", endpoint.model):
            return _no_model(body.model, endpoint)
        with endpoint.service.arriving():
            body.check_extra()
            endpoint.service.check_number(body.n)
            messages = [m.for_template() for m in body.messages]
            text = await endpoint.service.render(messages, body.chat_template_kwargs)
            # The template writes the special tokens itself.
            ids = await endpoint.service.tokenize(text, add_special_tokens=False)
            room = max(1, min(endpoint.max_output_tokens, endpoint.max_seq_len - len(ids)))
            inputs = token_inputs(body, body.max_completion_tokens or body.max_tokens or room, body.wants_log_probs)
            prompts = [TextRequest(ids, inputs, body.stop_words, streams=body.stream)]
        replies = Replies(
            endpoint.model, endpoint.service.tokenizer, body.n, True, body.wants_log_probs, ends_inside(text)
        )
        return await _answer(endpoint, body, prompts, replies, request)

    return app


async def _answer(
    endpoint: Endpoint, body: Common, prompts: list[TextRequest], replies: Replies, request: Request
) -> Response:
    events = merged([endpoint.service.answer(prompt) for prompt in prompts])
    # A refusal must come as a status, so the first event is waited for before a stream begins.
    waiting = asyncio.ensure_future(anext(events) if body.stream else _collect(events))
    has_left = False
    try:
        while not (await asyncio.wait({waiting}, timeout=_LEFT_S))[0]:
            if await request.is_disconnected():
                has_left = waiting.cancel()
        found: Any = await waiting
        if not body.stream:
            return JSONResponse(replies.whole(found))
    except asyncio.CancelledError:
        if has_left:
            return Response(status_code=499)  # nobody reads it
        waiting.cancel()  # the server ends, and --drain-seconds are over
        return _error(503, "the server is shutting down (send it again)", "overloaded_error", headers=_AGAIN)
    except UserError as error:
        return _refusal(error)
    except Exception as error:
        return _failure(error)
    return StreamingResponse(
        _stream(found, events, replies, body.wants_usage),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


async def _collect(events: AsyncGenerator[tuple[int, Any, bool], None]) -> list[tuple[int, TextEvent]]:
    async with aclosing(events):
        return [(prompt, event) async for prompt, event, _ in events]


async def _stream(
    first: tuple[int, Any, bool],
    events: AsyncGenerator[tuple[int, Any, bool], None],
    replies: Replies,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    async with aclosing(events):
        yield _data(replies.chunk(first[0], first[1]))
        try:
            async for prompt, event, _ in events:
                yield _data(replies.chunk(prompt, event))
        except Exception as error:  # too late for a status
            yield b"data: " + bytes(_failure(error).body) + b"\n\n"
            return
        if with_usage:
            yield _data(replies.usage_chunk())
        yield b"data: [DONE]\n\n"


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _model(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.model, "object": "model", "created": _STARTED, "owned_by": "memshare",
        "max_model_len": endpoint.max_seq_len,
    }  # fmt: skip


def _no_model(name: str, endpoint: Endpoint) -> JSONResponse:
    return _error(404, f"there is no model {shorten(name)}, this server has {endpoint.model}", code="model_not_found")


def _refusal(error: UserError) -> JSONResponse:
    if isinstance(error, QueueFullError):
        return _error(503, str(error), "overloaded_error", headers=_AGAIN)
    return _error(400, str(error))


def _unauthorized() -> JSONResponse:
    # Nothing of the body was read.
    headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
    return _error(401, "the request carries no valid API key", "authentication_error", headers=headers)


def _failure(error: Exception) -> JSONResponse:
    """The answer to a request that nothing was wrong with."""
    _log.error("a request failed: %s", describe(error))
    return _error(500, f"the request failed: {describe(error)}", "server_error")


def _error(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    readable = message.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate cannot be sent
    content = {"error": {"message": readable, "type": kind, "param": None, "code": code}}
    return JSONResponse(content, status, headers=headers)


_STARTED = int(time.time())
