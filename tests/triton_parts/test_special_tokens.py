"""Special tokens stand once in a prompt, whoever tokenizes it for Triton and the OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
import pytest

from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextService
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
