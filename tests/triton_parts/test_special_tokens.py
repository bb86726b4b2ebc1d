"""Special tokens stand once in a prompt, whoever tokenizes it for Triton and the OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
from functools import partial

import numpy as np
import pytest
from fakes.asgi import ask
from fakes.letters import Letters, letters
from prometheus_client import CollectorRegistry
from serving.counting_executor import make

from trtllm_memshare.triton.inputs import TEXT_NAMES
from trtllm_memshare.triton.openai_app import Endpoint, make_app
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.service import ExecutorService, LocalCall
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextService
from trtllm_memshare.triton.token_requests import Limits
from trtllm_memshare.triton.tokenizer_models import PreprocessingModel

BOS = 256


class Bytes:
    """A tokenizer of bytes that puts its BOS in front, as Llama's does; the BOS written out is the same token."""

    bos_token, pad_token_id, eos_token_id = "<s>", 0, 0
    all_special_tokens, all_special_ids = ["<s>"], [BOS]

    def __call__(self, text, add_special_tokens=True):
        ids = [BOS] if add_special_tokens else []
        for place, part in enumerate(text.split("<s>")):
            ids += ([BOS] if place else []) + list(part.encode())
        return {"input_ids": ids}


TEXTS = [("hi", [BOS, *b"hi"]), ("<s>hi", [BOS, *b"hi"])]


@pytest.mark.parametrize(("text", "ids"), TEXTS)
def test_of_a_text_that_a_template_made_as_of_a_plain_one(text, ids):
    service = TextService(Bytes(), TextLimits(100, 1000, 8), lambda *_: None, None)  # type: ignore[arg-type]
    assert asyncio.run(service.tokenize(text)) == ids
    assert asyncio.run(service.tokenize("hi", add_special_tokens=False)) == list(b"hi")


@pytest.mark.parametrize(("text", "ids"), TEXTS)
def test_in_the_preprocessing_model(text, ids):
    model = PreprocessingModel.__new__(PreprocessingModel)
    model.__dict__ |= {"tokenizer": Bytes(), "parameters": {"max_prompt_bytes": "1000"}}
    row = partial(np.array, dtype=object)
    tensors = RequestTensors({"QUERY": row([[text.encode()]]), "REQUEST_OUTPUT_LEN": np.array([[4]], np.int32)})
    assert model.outputs(tensors)["INPUT_ID"].tolist() == [ids]


@pytest.mark.parametrize(
    ("stop", "tokens", "reason"), [(["<|im_end|>"], [41, 42, 43], "stop"), ([], [*range(41, 44)], "length")]
)
def test_a_special_token_as_stop_word_ends_the_answer_before_it(boundaries, stop, tokens, reason):
    """From the HTTP body to the executor and back; special tokens never appear in a text, so no text could match."""
    executor = make(boundaries)
    metrics = RequestMetrics(CollectorRegistry())
    service = ExecutorService(executor, Limits(50, 100, 8, 80), (), 16, True, metrics)

    async def submit(inputs):
        return LocalCall(service, RequestTensors.of_values(inputs, TEXT_NAMES))

    texts = TextService(Letters(), TextLimits(50, 1000, 8), submit, metrics)
    app = make_app(Endpoint(texts, "tiny", 100, 400, lambda: executor.is_alive, CollectorRegistry()))
    body = {"prompt": letters([40]), "max_tokens": 10 if stop else 4, "temperature": 0, "stop": stop}
    with executor:
        status, answer = asyncio.run(ask(app, "POST", "/v1/completions", json.dumps(body).encode()))
    document = json.loads(answer)
    assert (status, document["choices"][0]["text"]) == (200, letters(tokens))
    assert document["choices"][0]["finish_reason"] == reason
    assert document["usage"]["completion_tokens"] == 4  # the special token was generated
