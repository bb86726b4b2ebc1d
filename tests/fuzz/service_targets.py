"""What reaches a running server: bodies of the OpenAI-compatible endpoint, and lines of the socket between processes.

The whole path runs, but for the model: an executor of the fuzzer's own checks a request as the real one does and ends
it at once. Apart from ``targets``, since what is imported here takes a second.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from typing import Any

from fakes.asgi import ask
from fakes.letters import VOCAB_SIZE, Letters
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from trtllm_memshare.cache.sequence import NOTHING_SHARED
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.request import RequestHandle, RequestResult, RequestStats, SamplingParams
from trtllm_memshare.serving.validation import check_group, check_params, check_prompt
from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.openai_app import Endpoint, make_app
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.service import ExecutorService, LocalCall
from trtllm_memshare.triton.socket_server import SocketServer
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextService
from trtllm_memshare.triton.token_requests import Limits

_LIMITS = Limits(max_prompt_tokens=200, max_output_tokens=200, max_requests=80, vocab_size=VOCAB_SIZE)


class _Templated(Letters):
    """A tokenizer with a chat template."""

    chat_template = "x"

    def apply_chat_template(
        self, messages: list[dict[str, Any]], chat_template: str | None = None, tokenize: bool = True, **_: object
    ) -> str:
        assert chat_template is None, "a client has given a template of its own"
        return "".join(m["role"] + m["content"] for m in messages)


class _AtOnce:
    """An executor that answers every request that can be followed with two tokens."""

    config = make_config("off")

    def submit(
        self, input_ids: Any, params: SamplingParams, group: int | None, listener: Callable[[bool], None]
    ) -> RequestHandle:
        check_prompt(input_ids, VOCAB_SIZE)
        check_params(params, VOCAB_SIZE)
        check_group(group)
        handle = RequestHandle(0, listener)
        for token in (5, 6):
            handle.push(token, -0.5 if params.log_probs else None)
        stats = RequestStats(0.0, 0.0, len(input_ids), 2, 0, NOTHING_SHARED)
        handle.finish(RequestResult(0, [5, 6], "length", stats))
        return handle


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def _service() -> ExecutorService:
    metrics = RequestMetrics(CollectorRegistry())
    return ExecutorService(_AtOnce(), _LIMITS, (), 16, True, metrics)  # type: ignore[arg-type]


@cache
def _app() -> FastAPI:
    metrics = RequestMetrics(CollectorRegistry())

    async def submit(inputs: dict[str, Any]) -> LocalCall:
        return LocalCall(_service(), RequestTensors.of_values(inputs, TEXT_NAMES))

    texts = TextService(_Templated(), TextLimits(200, 4000, 80), submit, metrics)
    return make_app(Endpoint(texts, "tiny", 200, 400, lambda: True, CollectorRegistry()))


def openai_body(data: bytes) -> None:
    """A body of either endpoint: an answer, or a status that says what is wrong, with a sentence."""
    path = "/v1/chat/completions" if b'"messages"' in data else "/v1/completions"
    status, body = _loop().run_until_complete(ask(_app(), "POST", path, data))
    if body.startswith(b"data: "):
        assert status == 200
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
        assert events
        assert not any("error" in event for event in events), events
        return
    document = json.loads(body)
    if status == 200:
        assert document["choices"]
        return
    assert status in (400, 404, 413, 503), (status, body)
    raise UserError(document["error"]["message"])


class _Writer:
    """The other end of a connection: keeps what is written."""

    def __init__(self) -> None:
        self.lines, self.is_closed = b"", False

    def write(self, data: bytes) -> None:
        self.lines += data

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def token_socket(data: bytes) -> None:
    """Lines of one connection: each request is answered, and what is no message ends the connection without a fault."""
    writer = _Writer()

    async def serve() -> None:
        reader = asyncio.StreamReader(limit=64 << 20)
        reader.feed_data(data)
        serving = asyncio.create_task(SocketServer(_service(), None)._serve(reader, writer))  # type: ignore[arg-type]
        for _ in range(12):  # turns of the loop, for answers to be written before the client goes
            await asyncio.sleep(0)
        reader.feed_eof()
        await serving

    _loop().run_until_complete(serve())
    assert writer.is_closed
    answers = [json.loads(line) for line in writer.lines.splitlines()]
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert all(isinstance(answer["id"], int) for answer in answers)
    if errors or not answers:
        raise UserError(errors[0] if errors else "no answer")
