"""Everything a caller can set, at its extremes: refused at submit with one sentence, or followed."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import repeat

import numpy as np
import pytest
import torch
from request_extremes import BAD, GOOD, GREEDY, VOCAB_SIZE, NoLength

from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams
from trtllm_memshare.serving.sampling import Sampler
from trtllm_memshare.serving.validation import CHECKS, check_group, check_listener, check_params, check_prompt


def test_every_field_has_its_check():
    assert {field.name for field in fields(SamplingParams)} <= CHECKS.keys()
    assert {name for name, *_ in BAD} >= {field.name for field in fields(SamplingParams)}


def check(name: str, value: object) -> object:
    if name == "input_ids":
        return check_prompt(value, VOCAB_SIZE)
    if name == "group":
        return check_group(value)
    if name == "listener":
        return check_listener(value)
    return check_params(SamplingParams(**{name: value}), VOCAB_SIZE)


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{place}" for place, (name, _) in enumerate(BAD)])
def test_extremes_are_refused(name, value):
    with pytest.raises(UserError) as caught:
        check(name, value)
    assert name.split("[")[0] in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_what_is_within_its_range_is_kept(name, value):
    assert getattr(check_params(SamplingParams(**{"temperature": 0.5, name: value}), VOCAB_SIZE), name) == value


@pytest.mark.parametrize("preset", ["aligned", "off"])
def test_a_floor_needs_pressure(preset):
    with pytest.raises(UserError, match=f"^min_kept needs preset pressure, got preset {preset} \\(build"):
        check_params(SamplingParams(min_kept=0.9), VOCAB_SIZE, make_config(preset))
    assert check_params(SamplingParams(min_kept=0.9), VOCAB_SIZE, make_config("pressure")).min_kept == 0.9
    assert check_params(SamplingParams(memshare=False), VOCAB_SIZE, make_config(preset)).memshare is False


@pytest.mark.parametrize("changes", GREEDY)
def test_greedy_where_tensorrt_llm_is_greedy(changes):
    checked = check_params(SamplingParams(**{"temperature": 0.6, **changes}), VOCAB_SIZE)
    assert (checked.temperature, checked.top_k, checked.top_p) == (0.0, 0, 1.0)


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 0.0}])
def test_with_penalties_the_temperature_stays(changes):
    """It comes before them: 4.0 - 0.8 against 3.0, where 2.0 - 0.8 against 1.5 would turn it round."""
    params = SamplingParams(temperature=0.5, presence_penalty=0.8, **changes)
    checked = check_params(params, VOCAB_SIZE)
    state = RequestState(0, [0], checked, RequestHandle(0), tokens=[0])
    assert Sampler().sample(torch.tensor([[2.0, 1.5]]), [state]) == [0]
    cold = check_params(replace(params, temperature=0.0), VOCAB_SIZE)
    assert (cold.temperature, cold.top_k, cold.top_p) == (0.0, 0, 1.0)


def test_numbers_of_numpy_are_numbers():
    assert check_prompt(np.array([1, 2], np.int32), VOCAB_SIZE) == [1, 2]
    assert all(type(i) is int for i in check_prompt(np.array([1, 2]), VOCAB_SIZE))
    checked = check_params(SamplingParams(np.int64(5), np.float32(0.5), top_k=np.int32(3)), VOCAB_SIZE)
    assert (checked.max_new_tokens, checked.temperature, checked.top_k) == (5, 0.5, 3)
    assert not math.isnan(checked.temperature)


def test_an_error_names_the_place():
    with pytest.raises(UserError, match=r"input_ids\[2\] must be between 0 and 79, got 440 \(ids of this model lie"):
        check_prompt([1, 2, 440], VOCAB_SIZE)
    with pytest.raises(UserError, match=r"bad_words\[1\]\[0\] must be between 0 and 79, got 999"):
        check_params(SamplingParams(bad_words=((1,), (999,))), VOCAB_SIZE)
    with pytest.raises(UserError, match=r"bad_words ban all 80 tokens"):
        check_params(SamplingParams(bad_words=tuple((i,) for i in range(80))), VOCAB_SIZE)
    with pytest.raises(UserError, match=r"min_new_tokens must be at most max_new_tokens 4, got 5"):
        check_params(SamplingParams(4, min_new_tokens=5), VOCAB_SIZE)


@pytest.mark.parametrize("prompt", [NoLength(), np.array(5), repeat(1), (i for i in (1, 2)), None])
def test_a_prompt_without_a_length_is_refused_in_one_sentence(prompt):
    with pytest.raises(
        UserError, match=r"^input_ids must be a list of token ids, got .* \(tokenize the prompt first\)$"
    ):
        check_prompt(prompt, VOCAB_SIZE)
