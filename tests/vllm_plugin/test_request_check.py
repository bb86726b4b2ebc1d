"""What a client hears of options of its request that cannot be used."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
from fastapi import FastAPI, Request

from trtllm_memshare.vllm import REQUEST_CHECK
from trtllm_memshare.vllm.request_check import RequestCheck


def post(body, prepare=lambda app: None):
    """Status and JSON of an app's answer to a body that arrives in parts; the app says how many bytes it read."""
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    prepare(app)

    @app.post("/v1/completions")
    async def complete(request: Request, row: dict) -> int:
        return len(await request.body())

    app.add_middleware(RequestCheck)
    size = -(-len(body) // 3)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    messages = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_kept": 2}, "vllm_xargs: min_kept must be a number between 0 and 1, got 2"),
        ({"memshare": "no"}, "vllm_xargs: memshare must be true or false, got 'no'"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_with_its_reason(options, message):
    status, answer = post(json.dumps({"prompt": "x", "vllm_xargs": options}).encode())
    assert status == 400
    assert answer == {"detail": message}


@pytest.mark.parametrize(
    "row", [{"prompt": "x" * 999}, {"vllm_xargs": {"min_kept": 0.5, "other": "y"}}, {"vllm_xargs": None}]
)
def test_other_bodies_pass_as_they_are(row):
    body = json.dumps(row).encode()
    assert post(body) == (200, len(body))


def test_what_is_no_json_is_left_to_the_server():
    assert post(b'{"vllm_xargs": ')[0] == 422


def test_vllms_own_handler_gives_the_reason():
    pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    status, answer = post(b'{"vllm_xargs": {"min_kept": 2}}', init_exception_handler)
    assert status == answer["error"]["code"] == 400
    assert answer["error"]["message"].startswith("vllm_xargs: min_kept must be a number")


def test_the_option_names_the_class():
    assert f"{RequestCheck.__module__}.{RequestCheck.__name__}" == REQUEST_CHECK
