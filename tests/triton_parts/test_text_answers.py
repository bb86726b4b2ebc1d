"""Answers as text: what a request that a stop text ends counts as, and prompts that are echoed."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from fakes.asgi import ask
from fakes.counting_runner import CountingRunner
from fakes.letters import Letters, letters
from prometheus_client import CollectorRegistry
from serving.counting_executor import make
from triton_parts.test_socket import over_socket

from trtllm_memshare.triton.events import Call
from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.openai_app import Endpoint, make_app
from trtllm_memshare.triton.request_metrics import OUTCOMES, OutcomeCounter, RequestMetrics
from trtllm_memshare.triton.service import ExecutorService, LocalCall
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextRequest, TextService
from trtllm_memshare.triton.token_requests import Limits


class Served:
    """An executor's service with its metrics, and a text service in the same process."""

    def __init__(self, executor) -> None:
        self.executor, self._registry = executor, CollectorRegistry()
        self.tokens = ExecutorService(executor, Limits(50, 350, 8, 80), (), 16, True, RequestMetrics(self._registry))

    def texts(self, submit=None) -> TextService:
        outcomes = OutcomeCounter(CollectorRegistry())
        return TextService(Letters(), TextLimits(50, 1000, 8), submit or self.submit, outcomes)

    async def submit(self, inputs) -> Call:
        return LocalCall(self.tokens, RequestTensors.of_values(inputs, TEXT_NAMES))

    def outcomes(self) -> dict[str, float]:
        values = {o: self._registry.get_sample_value("memshare_requests_total", {"outcome": o}) for o in OUTCOMES}
        return {outcome: value for outcome, value in values.items() if value}

    def complete(self, **body) -> tuple[int, dict]:
        app = make_app(Endpoint(self.texts(), "tiny", 100, 400, lambda: True, CollectorRegistry()))
        content = json.dumps({"max_tokens": 2, "temperature": 0, **body}).encode()
        status, answer = asyncio.run(ask(app, "POST", "/v1/completions", content))
        return status, json.loads(answer)


@pytest.fixture
def served(boundaries):
    runner = CountingRunner()
    runner.before_step = lambda batch: time.sleep(
        0.005
    )  # a reader that is held up would find poison behind a stop text
    with make(boundaries, runner) as executor:
        yield Served(executor)


@pytest.mark.parametrize("way", ["in the same process", "over the socket, as Triton's ensemble"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_request_that_a_stop_text_ends_is_a_completed_one(served, tmp_path, way, sequences):
    inputs = {"request_output_len": 300, "num_return_sequences": sequences}
    request = TextRequest(letters([5]), inputs, stop_words=[letters([9, 10])])

    async def use(service):
        return [e async for e in service.answer(request) if e.finish_reason]

    if way == "in the same process":
        events = asyncio.run(use(served.texts()))
    else:
        events = over_socket(served.tokens, tmp_path, lambda client: use(served.texts(client.submit)))
    assert [(e.text, e.finish_reason) for e in events] == [(letters([6, 7, 8]), "stop")] * sequences
    assert served.outcomes() == {"completed": 1}


def test_a_request_that_its_client_stops_is_a_cancelled_one(served):
    tensors = RequestTensors.of_values({"input_ids": [5], "request_output_len": 300, "streaming": True}, {})

    async def use():
        reasons = []
        async for event in served.tokens.answer(tensors, "label"):
            served.tokens.stop("label")
            reasons.append(event.finish_reason)
        return reasons

    assert asyncio.run(use())[-1] == "cancelled"
    assert served.outcomes() == {"cancelled": 1}


@pytest.mark.parametrize("prompt", [letters([5, 6, 7]), [5, 6, 7]])
def test_a_prompt_is_echoed_as_text_or_as_the_text_of_its_tokens(served, prompt):
    status, answer = served.complete(prompt=prompt, echo=True)
    assert (status, answer["choices"][0]["text"]) == (200, letters([5, 6, 7, 8, 9]))
    assert served.complete(prompt=prompt)[1]["choices"][0]["text"] == letters([8, 9])


def test_an_echo_with_log_probabilities_is_refused(served):
    status, answer = served.complete(prompt="5", echo=True, logprobs=1)
    assert (status, answer["error"]["message"]) == (
        400,
        "logprobs are those of the answer's tokens, which echo puts the prompt's in front of, got both (leave one of "
        "them out)",
    )
    assert served.complete(prompt="5", logprobs=1)[0] == served.complete(prompt="5", echo=True)[0] == 200
