"""What one HTTP request may ask of the OpenAI-compatible endpoint: more is refused with a status and a sentence."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
from fakes.asgi import ask
from fakes.counting_runner import CountingRunner
from fakes.letters import Letters
from fuzz import service_targets
from fuzz.service_targets import openai_body
from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from serving.counting_executor import WAIT, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton import body_limit
from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.openai_app import Endpoint, make_app
from trtllm_memshare.triton.openai_schema import ChatRequest, CompletionRequest
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.service import ExecutorService, LocalCall
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextService
from trtllm_memshare.triton.token_requests import Limits

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "stop": ["x"] * 1025}, "stop may hold 1024 texts and 16384 characters, got 1025 and 1025"),
        ({"prompt": "a", "stop": "x" * 20_000}, "stop may hold 1024 texts and 16384 characters, got 1 and 20000"),
        ({"prompt": ["a"] * 1025}, r"prompt may hold 1024 prompts, got 1025 \(send several requests\)"),
        ({"prompt": [1, 10**40]}, "prompt must hold integers of 64 bits|input_ids must hold integers of 64 bits"),
        ({"prompt": "a", "seed": 10**400}, "seed must be .*, got an integer of 1329 bits"),
        ({"prompt": "a", "model": "m" * 3000}, "there is no model m+ ... m+, this server has tiny"),
        ({**CHAT, "chat_template_kwargs": {"chat_template": "{% for i in range(9**9) %}{% endfor %}"}},
         r"chat_template_kwargs must be names that the template reads, got chat_template, which is an argument of "
         r"the tokenizer's method \(leave it out\)"),
        ({**CHAT, "chat_template_kwargs": {"tokenize": True}}, "got tokenize"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "user"}] * 2000}, ""),
    ],
)  # fmt: skip
def test_what_is_too_much_is_refused(body, message):
    if message:
        with pytest.raises(UserError, match=message) as caught:
            openai_body(json.dumps(body).encode())
        assert len(str(caught.value)) < 500
    else:
        with pytest.raises(UserError):
            openai_body(json.dumps(body).encode())


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"{"])
def test_what_is_no_json_gets_an_error_in_openai_s_form(body):
    status, answer = asyncio.run(ask(service_targets._app(), "POST", "/v1/completions", body))
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_where_a_body_is_no_json_is_said():
    with pytest.raises(UserError, match=r"^the body is not JSON: Expecting value at character 11$"):
        openai_body(b'{"prompt": ')


def test_a_body_is_not_read_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(body_limit, "MAX_BODY_BYTES", 1000)
    body = json.dumps({"prompt": "a" * 1000}).encode()
    status, answer = asyncio.run(ask(service_targets._app(), "POST", "/v1/completions", body))
    assert (status, json.loads(answer)["error"]["message"]) == (
        413, "the body of a request may have 1,000 bytes, got more"
    )  # fmt: skip


_MANY = 100_000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [None] * _MANY},
        {"prompt": [[None] * _MANY]},
        {"prompt": [[]] * _MANY + [None] * _MANY},
        {"prompt": "5", "stop": [1] * _MANY},
        {"messages": [{}] * _MANY},
        {"messages": [{"role": "user", "content": [{}] * _MANY}]},
    ],
)
def test_a_body_of_many_faults_has_few_errors(body):
    """Each takes memory in pydantic and again in FastAPI: millions would take all of it."""
    kind = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize("prompt", [["5", 6], [5, "6"], [True, False], [1.0, 2.0], [[1], ["2"]], [[1], [2.0]]])
def test_a_prompt_of_two_kinds_is_not_guessed_at(prompt):
    with pytest.raises(UserError, match="prompt"):
        openai_body(json.dumps({"prompt": prompt}).encode())


def test_a_template_that_fails_over_the_messages_is_the_request_s_fault(monkeypatch):
    def fail(self, messages, **_):
        raise KeyError("tool_calls")

    monkeypatch.setattr(service_targets._Templated, "apply_chat_template", fail)
    with pytest.raises(UserError, match="the chat template cannot be applied: KeyError: 'tool_calls'"):
        openai_body(json.dumps(CHAT).encode())


def test_a_template_gets_the_tools_and_documents_of_a_request():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = "{{ tools[0].function.name }} {{ documents[0].text }} {{ messages[0].content }}"
    service = TextService(tokenizer, TextLimits(100, 1000, 1), None, None)
    options = {"tools": [{"type": "function", "function": {"name": "add"}}], "documents": [{"text": "a page"}]}
    assert asyncio.run(service.render(CHAT["messages"], options)) == "add a page hi"
    with pytest.raises(UserError, match="the chat template cannot be applied"):
        asyncio.run(service.render(CHAT["messages"], {"tools": 5}))


def counted_app(tokenizer, max_requests):
    """The application, and how many requests ended in one way or another."""
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)

    async def submit(inputs):
        raise AssertionError("nothing reaches the executor")

    texts = TextService(tokenizer, TextLimits(50, 1000, max_requests), submit, metrics)
    app = make_app(Endpoint(texts, "tiny", 100, 400, lambda: True, registry))
    return app, lambda outcome: registry.get_sample_value("memshare_requests_total", {"outcome": outcome})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "5", "logit_bias": {"1": 1}},
        {"prompt": ["5"] * 9},
        {"prompt": ["5"] * 3, "n": 3},
        {**CHAT, "n": 9},
        {"prompt": "5", "stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"prompt": ""},
        {"prompt": "5", "stop": ["x"] * 1025},
        {"prompt": "5" * 900},
        {**CHAT, "logit_bias": {"1": 1}},
        {**CHAT, "stop": ["x"] * 1025},
        {"messages": [{"role": "user", "content": "5" * 900}]},
        {"messages": [{"role": "user", "content": "5" * 2000}]},
        {**CHAT, "chat_template_kwargs": {"tokenize": True}},
    ],
)
def test_what_a_route_refuses_is_counted_once(body):
    app, count = counted_app(service_targets._Templated(), 8)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, _ = asyncio.run(ask(app, "POST", path, json.dumps(body).encode()))
    assert (status, count("refused")) == (400, 1)
    assert count("failed") == count("queue_full") == 0


def test_chats_that_find_the_queue_full_are_not_rendered():
    """Templates take long over long chats: what waits for them counts like any other request."""
    may_go, num_rendered = threading.Event(), []

    class Slow(service_targets._Templated):
        def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False, **options):
            num_rendered.append(1)
            assert may_go.wait(WAIT)
            raise ValueError("made up")

    app, count = counted_app(Slow(), 8)

    async def ask_often():
        body, statuses = json.dumps(CHAT).encode(), []
        try:
            asked = [ask(app, "POST", "/v1/chat/completions", body) for _ in range(12)]
            for answered in asyncio.as_completed(asked, timeout=WAIT):
                statuses.append((await answered)[0])
                if len(statuses) == 4:
                    may_go.set()
        finally:
            may_go.set()
        return statuses

    assert asyncio.run(ask_often()) == [503] * 4 + [400] * 8
    assert len(num_rendered) == 8
    assert (count("queue_full"), count("refused")) == (4, 8)


def test_a_route_that_is_not_there_says_so_in_the_same_form():
    status, answer = asyncio.run(ask(service_targets._app(), "GET", "/v1/embeddings"))
    assert (status, json.loads(answer)["error"]["message"]) == (404, "Not Found")


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_the_queue_leaves_no_request_behind(boundaries, streams):
    """Before its first token as well: clients that give up and try again would fill the queue with the dead."""
    runner, metrics = CountingRunner(), RequestMetrics(CollectorRegistry())
    runner.before_step = lambda batch: time.sleep(0.01)
    executor = make(boundaries, runner, max_batch_size=1)
    service = ExecutorService(executor, Limits(50, 100, 8, 80), (), 16, True, metrics)

    async def submit(inputs):
        return LocalCall(service, RequestTensors.of_values(inputs, TEXT_NAMES))

    texts = TextService(Letters(), TextLimits(50, 1000, 8), submit, metrics)
    app = make_app(Endpoint(texts, "tiny", 100, 400, lambda: executor.is_alive, CollectorRegistry()))
    body = json.dumps({"prompt": "5", "max_tokens": 30, "temperature": 0, "stream": streams}).encode()
    with executor:
        first = executor.submit([5], SamplingParams(390))  # takes four seconds; the other one waits behind it
        status, _ = asyncio.run(ask(app, "POST", "/v1/completions", body, leaves_after_s=0.05))
        deadline = time.monotonic() + WAIT
        while executor.status().num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (status, executor.status().num_waiting, first.future.done()) == (499, 0, False)
        first.cancel()
