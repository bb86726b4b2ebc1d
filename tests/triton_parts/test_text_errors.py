"""An error while one request's tokens become text ends that request; those beside it get their own text.

Everywhere that text is made: a listener in Python, the text service over an executor in this process and over the
socket, the OpenAI-compatible endpoint, Triton's `ensemble` and `postprocessing`.
"""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fakes.asgi import ask
from fakes.counting_runner import CountingRunner, expected
from fakes.letters import POISON, VOCAB_SIZE, Letters, letters
from prometheus_client import CollectorRegistry
from serving.counting_executor import assert_clean, make
from triton_parts.test_socket import over_socket

from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.failures import RequestFailedError
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer
from trtllm_memshare.triton.ensemble_model import EnsembleModel
from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.openai_app import Endpoint, make_app
from trtllm_memshare.triton.reply import Reply
from trtllm_memshare.triton.request_metrics import OutcomeCounter, RequestMetrics
from trtllm_memshare.triton.service import ExecutorService, LocalCall
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextRequest, TextService
from trtllm_memshare.triton.token_requests import Limits
from trtllm_memshare.triton.tokenizer_models import PostprocessingModel

PROMPTS = [[5], [40], [20, 21, 22]]
VICTIM = 1  # counts from 41 on and so comes to the token without a text
NEW_TOKENS = 12
LIMITS = TextLimits(50, 1000, 8)


@pytest.fixture
def executor(boundaries):
    with make(boundaries, CountingRunner()) as running:
        yield running
    assert running.is_alive
    assert_clean(running)


def token_service(executor: Executor, registry: CollectorRegistry | None = None) -> ExecutorService:
    limits = Limits(50, 100, 8, VOCAB_SIZE)
    return ExecutorService(executor, limits, (), 16, True, RequestMetrics(registry or CollectorRegistry()))


def text_service(submit) -> TextService:
    return TextService(Letters(), LIMITS, submit, OutcomeCounter(CollectorRegistry()))


def local(executor: Executor, registry: CollectorRegistry | None = None) -> TextService:
    tokens = token_service(executor, registry)

    async def submit(inputs):
        return LocalCall(tokens, RequestTensors.of_values(inputs, TEXT_NAMES))

    return text_service(submit)


async def text_of(service: TextService, prompt: list[int], streams: bool) -> str:
    request = TextRequest(letters(prompt), {"request_output_len": NEW_TOKENS}, streams=streams)
    return "".join([event.text async for event in service.answer(request)])


async def all_texts(service: TextService, streams: bool) -> list:
    asked = (text_of(service, prompt, streams) for prompt in PROMPTS)
    return await asyncio.gather(*asked, return_exceptions=True)


def assert_one_failed(found: list) -> None:
    for place, prompt in enumerate(PROMPTS):
        if place == VICTIM:
            assert isinstance(found[place], IndexError), found[place]
        else:
            assert found[place] == letters(expected(prompt, NEW_TOKENS))


@pytest.mark.parametrize("streams", [False, True])
def test_of_the_text_service(executor, streams):
    assert_one_failed(asyncio.run(all_texts(local(executor), streams)))


def outcomes(registry: CollectorRegistry) -> dict[str, float]:
    names = ("completed", "cancelled", "failed")
    return {name: registry.get_sample_value("memshare_requests_total", {"outcome": name}) for name in names}


def test_of_the_text_service_over_the_socket(boundaries, tmp_path):
    registry, runner = CollectorRegistry(), CountingRunner()
    runner.before_step = lambda batch: time.sleep(0.02)
    with make(boundaries, runner) as executor:
        service = token_service(executor, registry)
        assert_one_failed(over_socket(service, tmp_path, lambda c: all_texts(text_service(c.submit), True)))
    # It is left at its poisoned token, long before its end: the executor's side has to be told why.
    assert outcomes(registry) == {"completed": len(PROMPTS) - 1, "cancelled": 0, "failed": 1}


def test_of_the_text_service_over_the_socket_where_answers_come_whole(executor, tmp_path):
    service = token_service(executor)
    assert_one_failed(over_socket(service, tmp_path, lambda c: all_texts(text_service(c.submit), False)))


@pytest.mark.parametrize("streams", [False, True])
def test_of_the_openai_endpoint(executor, streams):
    registry = CollectorRegistry()
    app = make_app(Endpoint(local(executor, registry), "tiny", 100, 400, lambda: executor.is_alive, registry))
    bodies = [{"prompt": letters(p), "max_tokens": NEW_TOKENS, "temperature": 0, "stream": streams} for p in PROMPTS]

    async def run():
        return await asyncio.gather(*(ask(app, "POST", "/v1/completions", json.dumps(b).encode()) for b in bodies))

    found = asyncio.run(run())
    sentence = f"the request failed: IndexError: token {POISON} has no text"
    for place, (status, body) in enumerate(found):
        if place == VICTIM:  # a stream that has begun cannot have another status
            error = json.loads(body.decode().strip().splitlines()[-1].removeprefix("data: "))["error"]
            assert error == {"message": sentence, "type": "server_error", "param": None, "code": None}
            assert status == 500 or (streams and status == 200)
            continue
        assert status == 200
        lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")] if streams else [body]
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        assert text == letters(expected(PROMPTS[place], NEW_TOKENS))
    assert outcomes(registry) == {"completed": len(PROMPTS) - 1, "cancelled": 0, "failed": 1}


class TritonError:
    """Triton's error: a text and a code."""

    INVALID_ARG, INTERNAL, CANCELLED, UNAVAILABLE = range(4)

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


PB = SimpleNamespace(
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    TritonError=TritonError,
    InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(outputs=output_tensors, error=error),
    Tensor=lambda name, array: SimpleNamespace(name=lambda: name, as_numpy=lambda: array),
)


class Sender:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list = []

    def send(self, response=None, flags=0) -> None:
        self.sent.append(response)

    def is_cancelled(self) -> bool:
        return False


def test_of_triton_s_ensemble(executor):
    model = object.__new__(EnsembleModel)
    model.pb, model._level, model._decoupled, model._poll_s = PB, "text", False, 0.05
    model._limits, model._exclude_input, model._service = LIMITS, True, local(executor)
    model._outcomes = OutcomeCounter(CollectorRegistry())
    senders = [Sender() for _ in PROMPTS]

    def handle(prompt, sender):
        text = np.array([[letters(prompt).encode()]], np.object_)
        tensors = RequestTensors({"text_input": text, "max_tokens": np.array([[NEW_TOKENS]], np.int32)})
        return model._handle("", tensors, [], Reply(PB, sender))

    async def run():
        await asyncio.gather(*map(handle, PROMPTS, senders))

    asyncio.run(run())
    for place, (prompt, sender) in enumerate(zip(PROMPTS, senders, strict=True)):
        (response,) = sender.sent
        if place == VICTIM:
            assert response.error.code == TritonError.INTERNAL
            assert response.error.message == f"the request failed: IndexError: token {POISON} has no text"
        else:
            (text,) = [t.as_numpy().item() for t in response.outputs if t.name() == "text_output"]
            assert text == letters(expected(prompt, NEW_TOKENS))


def test_of_triton_s_postprocessing():
    model = object.__new__(PostprocessingModel)
    model.__dict__ |= {"tokenizer": Letters(), "_pb": PB}

    def request(*ids):
        arrays = {"TOKENS_BATCH": np.array([[ids]], np.int32), "SEQUENCE_LENGTH": np.array([[len(ids)]], np.int32)}
        return SimpleNamespace(inputs=lambda: [PB.Tensor(name, array) for name, array in arrays.items()])

    first, failed, last = model.execute([request(5, 6), request(7, POISON), request(8)])
    assert (first.outputs[0].as_numpy().tolist(), last.outputs[0].as_numpy().tolist()) == ([b"56"], [b"8"])
    assert failed.error.code == TritonError.INTERNAL
    assert failed.error.message == f"the request failed: IndexError: token {POISON} has no text"


def test_of_a_listener(boundaries):
    executor, handles, texts = make(boundaries), [], {place: "" for place in range(len(PROMPTS))}

    def writer(place: int):
        detokenizer = IncrementalDetokenizer(Letters())

        def write(has_ended: bool) -> None:
            texts[place] += detokenizer.push(handles[place].drain()[0], has_ended)

        return write

    for place, prompt in enumerate(PROMPTS):
        handles.append(executor.submit(prompt, SamplingParams(NEW_TOKENS), listener=writer(place)))
    executor.run_until_idle()
    with pytest.raises(RequestFailedError, match=f"its listener raised .IndexError: token {POISON} has no text"):
        handles[VICTIM].result(0)
    for place in (0, 2):
        assert handles[place].result(0).token_ids == expected(PROMPTS[place], NEW_TOKENS)
        assert texts[place] == letters(expected(PROMPTS[place], NEW_TOKENS))
    assert texts[VICTIM] == letters([41, 42, 43])
    assert_clean(executor)
