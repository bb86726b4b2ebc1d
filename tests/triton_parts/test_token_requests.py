"""A request of `tensorrt_llm`: every input reaches its parameter, and what makes no sense is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.pressure import floor_room
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.token_requests import Limits, parse_token_request

LIMITS = Limits(max_prompt_tokens=50, max_output_tokens=100, max_requests=3, vocab_size=80)


def tensors(**arrays) -> RequestTensors:
    return RequestTensors({name: np.asarray(value) for name, value in arrays.items()})


def parse(**arrays):
    defaults = {"input_ids": [[4, 5, 6]], "request_output_len": [[7]]}
    return parse_token_request(tensors(**{**defaults, **arrays}), LIMITS, (1,), exclude_input=True)


def test_defaults_are_greedy_and_the_model_s_stop_token():
    request = parse()
    assert request.input_ids == [4, 5, 6]
    assert (request.params.max_new_tokens, request.params.temperature, request.params.stop_token_ids) == (7, 0.0, (1,))
    assert not request.streaming
    assert not request.echo_input


def test_every_input_reaches_its_parameter():
    request = parse(
        input_lengths=[[2]], end_id=[[9]], min_tokens=[[3]], repetition_penalty=[[1.5]],
        presence_penalty=[[0.5]],
        frequency_penalty=[[0.25]], num_return_sequences=[[2]], return_log_probs=[[True]],
        temperature=[[0.5]], runtime_top_k=[[3]], runtime_top_p=[[0.9]],
        seed=[[2**40]], stop_words_list=[[[7, 8, 9], [2, 3, -1]]], bad_words_list=[[[5], [1]]], streaming=[[True]],
        exclude_input_in_output=[[False]], memshare_group=[[7]],
    )  # fmt: skip
    assert request.input_ids == [4, 5]
    params = request.params
    assert (params.stop_token_ids, params.temperature, params.top_k, params.seed) == ((9,), 0.5, 3, 2**40)
    assert params.top_p == pytest.approx(0.9)
    assert params.stop_sequences == ((7, 8), (9,))
    assert params.bad_words == ((5,),)
    assert (params.min_new_tokens, params.repetition_penalty, params.presence_penalty) == (3, 1.5, 0.5)
    assert (params.frequency_penalty, params.log_probs, request.num_sequences) == (0.25, True, 2)
    assert request.streaming
    assert request.echo_input
    assert (params.min_kept, params.memshare) == (None, True)
    own = parse(memshare_min_kept=[[0.75]], memshare_off=[[True]]).params
    assert (own.min_kept, own.memshare) == (0.75, False)
    assert (request.group, parse().group, parse(memshare_group=[[0]]).group) == (7, None, 0)


@pytest.mark.parametrize("meant", [0.0, 0.1, 0.3, 0.4, 0.6, 0.55, 0.123, 1 / 3, 2 / 3, 5 / 6, 1.0])
def test_a_share_in_fp32_keeps_as_many_pages_as_the_number_that_was_meant(meant):
    tensor = np.array([[meant]], np.float32)
    for sent in (tensor, tensor.astype(np.float64), [[meant]]):  # Triton's; the same by way of our socket; JSON
        got = parse(memshare_min_kept=sent).params.min_kept
        assert all(floor_room(count, 0, got) == floor_room(count, 0, meant) for count in range(2000))


def test_an_empty_share_asks_for_nothing():
    assert parse(memshare_min_kept=np.zeros((1, 0), np.float32)).params.min_kept is None


@pytest.mark.parametrize(
    ("arrays", "temperature", "top_k", "top_p"),
    [
        ({"temperature": [[0.7]]}, 0.0, 0, 1.0),  # greedy: neither top_k nor top_p
        ({"temperature": [[0.7]], "runtime_top_p": [[0.0]]}, 0.0, 0, 1.0),
        ({"runtime_top_k": [[50]]}, 1.0, 50, 1.0),
        ({"runtime_top_k": [[50]], "runtime_top_p": [[0.0]]}, 1.0, 50, 1.0),
        ({"runtime_top_p": [[1.0]]}, 1.0, 0, 1.0),
        ({"temperature": [[1.0]], "runtime_top_k": [[1]]}, 0.0, 1, 1.0),
        ({"temperature": [[0.0]], "runtime_top_k": [[50]]}, 0.0, 50, 1.0),
    ],
)
def test_sampling_follows_tensorrt_llm_s_rules(arrays, temperature, top_k, top_p):
    params = parse(**arrays).params
    assert (params.temperature, params.top_k, params.top_p) == (temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": np.zeros((1, 0), np.int32)}, "input_ids must hold at least one token"),
        ({"input_ids": [[4] * 51]}, "51 tokens, over the limit max_prompt_tokens 50"),
        ({"input_ids": [[4, 80]]}, r"vocabulary 0..79, got 80"),
        ({"input_ids": [[-1]]}, r"vocabulary 0..79, got -1"),
        ({"input_lengths": [[4]]}, "at most the 3 tokens of input_ids, got 4"),
        ({"request_output_len": [[101]]}, "the limit max_output_tokens 100, got 101"),
        ({"temperature": [[np.nan]]}, "temperature must be between 0 and 100, got nan"),
        ({"runtime_top_p": [[1.5]]}, "runtime_top_p must be between 0 and 1, got 1.5"),
        ({"seed": [[1, 2]]}, r"seed must be one value for each prompt, got shape \[1, 2\]"),
        ({"memshare_group": [[-2]]}, "memshare_group must be at least -1"),
        ({"memshare_min_kept": [[1.5]]}, "memshare_min_kept must be between 0 and 1, got 1.5"),
        ({"request_output_len": [[10**10]]}, "the limit max_output_tokens 100, got 10000000000"),
        ({"seed": [[2**64 - 1]]}, "seed must be at most 9223372036854775807, got 18446744073709551615"),
        ({"seed": [[-1]]}, "seed must be at least 0, got -1"),
        ({"runtime_top_k": [[2**31]]}, "runtime_top_k must be at most 2147483647, got 2147483648"),
        ({"end_id": [[80]]}, "end_id must be between -1 and 79, got 80"),
    ],
)
def test_bad_values_are_refused_by_name_and_limit(arrays, message):
    with pytest.raises(UserError, match=message):
        parse(**arrays)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(UserError, match="text_input must be UTF-8"):
        tensors(text_input=np.array([[b"\xff\xfe"]], np.object_)).texts("text_input")
