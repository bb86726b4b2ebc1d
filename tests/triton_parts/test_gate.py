"""What a request must pass before its body is read whole: the key, the time of a body, the bytes of all bodies."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest
from fakes.asgi import ask
from fuzz import service_targets
from prometheus_client import CollectorRegistry

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton import body_limit, openai_serve
from trtllm_memshare.triton.events import TextEvent
from trtllm_memshare.triton.openai_app import Endpoint, make_app
from trtllm_memshare.triton.openai_schema import CompletionRequest, token_inputs
from trtllm_memshare.triton.request_metrics import OutcomeCounter
from trtllm_memshare.triton.text_service import TextLimits, TextService

KEY = "a-key"
BODY = json.dumps({"prompt": "5"}).encode()


class Answers(TextService):
    """Answers each prompt at once, or never."""

    waits = False

    async def answer(self, request):
        if self.waits:
            await asyncio.Event().wait()
        figures = {"num_input_tokens": 1, "num_output_tokens": 1, "memshare_retired_pages": 0}
        yield TextEvent([5], 0, "length", True, [], figures, "x")


def make(api_key: str = "", waits: bool = False):
    registry = CollectorRegistry()
    service = Answers(service_targets._Templated(), TextLimits(50, 1000, 8), None, OutcomeCounter(registry))
    service.waits = waits
    return make_app(Endpoint(service, "tiny", 100, 400, lambda: True, registry, api_key))


def post(app, body: bytes = BODY, **options):
    return asyncio.run(ask(app, "POST", "/v1/completions", body, **options))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401), ("", 401), (KEY, 401), ("Bearer", 401), ("Bearer other", 401), (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401), ("Bearer gehe\u00fcm", 401), (f"Bearer {KEY}", 200), (f"bearer  {KEY}", 200),
    ],
)  # fmt: skip
def test_a_request_needs_the_key(authorization, status):
    headers = {} if authorization is None else {"authorization": authorization}
    found, answer = post(make(KEY), headers=headers)
    assert found == status
    if status == 401:
        assert json.loads(answer)["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("body", [b"", b"{", b"x" * 1000])
def test_nothing_of_a_body_is_read_without_the_key(body):
    """It need not even end: nobody takes memory, or keeps a connection, who has no key."""
    answered = dict[str, str]()
    assert post(make(KEY), body, is_whole=False, answered=answered)[0] == 401
    assert (answered["www-authenticate"], answered["connection"]) == ("Bearer", "close")


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/metrics", 200), ("/health/", 307), ("/v1/models", 401)]
)
def test_who_watches_the_server_needs_no_key(path, status):
    assert asyncio.run(ask(make(KEY), "GET", path))[0] == status


def test_a_body_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(body_limit, "MAX_BODY_SECONDS", 0.05)
    answered = dict[str, str]()
    status, answer = post(make(), is_whole=False, answered=answered)
    assert answered["connection"] == "close"  # a byte now and then would keep it
    assert (status, json.loads(answer)["error"]["message"]) == (408, "the body of a request must come in 0 s")


def test_the_bodies_of_all_requests_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(body_limit, "MAX_BODY_SECONDS", 0.2)
    monkeypatch.setattr(body_limit, "MAX_HELD_BYTES", 2 * len(BODY) - 1)
    app = make()

    async def run():
        slow = asyncio.create_task(ask(app, "POST", "/v1/completions", BODY, is_whole=False))
        await asyncio.sleep(0.05)
        beside = await ask(app, "POST", "/v1/completions", BODY)
        return (await slow)[0], beside, (await ask(app, "POST", "/v1/completions", BODY))[0]

    slow, (beside, answer), after = asyncio.run(run())
    assert (slow, beside, after) == (408, 503, 200)
    assert json.loads(answer)["error"]["type"] == "overloaded_error"


def test_an_answer_that_the_server_s_end_cuts_off_says_so():
    """uvicorn cancels what goes on when --drain-seconds are over."""

    async def run():
        asked = asyncio.create_task(ask(make(waits=True), "POST", "/v1/completions", BODY))
        await asyncio.sleep(0.05)
        asked.cancel()
        return await asked

    status, answer = asyncio.run(run())
    assert (status, json.loads(answer)["error"]["message"]) == (503, "the server is shutting down (send it again)")


def test_without_a_seed_every_request_draws_its_own():
    drawn, given = (
        {token_inputs(CompletionRequest(prompt="5", **seed), 5, False)["seed"] for _ in range(3)}
        for seed in ({}, {"seed": 7})
    )
    assert len(drawn) == 3
    assert given == {7}
    assert all(0 <= seed < 2**63 - 64 for seed in drawn)  # each answer of one request adds its number


@pytest.mark.parametrize(("value", "key"), [("k\n", "k"), ("  k ", "k"), ("k", "k")])
def test_the_end_of_a_line_is_no_part_of_the_key(monkeypatch, value, key):
    monkeypatch.setenv("MEMSHARE_API_KEY", value)
    assert openai_serve._api_key() == key


@pytest.mark.parametrize("value", ["gehe\u00fcm", "a\nb", "a\x7f"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(monkeypatch, value):
    monkeypatch.setenv("MEMSHARE_API_KEY", value)
    with pytest.raises(UserError, match="MEMSHARE_API_KEY must hold printable ASCII characters, got others") as caught:
        openai_serve._api_key()
    assert value not in str(caught.value)


def test_a_signal_before_the_server_listens_for_it_ends_it_all_the_same(tmp_path, monkeypatch, tiny_checkpoint):
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build

    build_engine(plan_build(BuildOptions(tiny_checkpoint, tmp_path / "engine", build={"max_seq_len": 64})))
    should_exit = list[bool]()

    def run(server):
        os.kill(os.getpid(), signal.SIGTERM)
        should_exit.append(server.should_exit)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        openai_serve.main("memshare serve", ["--engine-dir", str(tmp_path / "engine"), "--port", "0"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert should_exit == [True]
