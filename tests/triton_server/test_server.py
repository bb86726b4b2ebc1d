"""The two models on a real Triton server, through real clients."""

from __future__ import annotations

import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

QUESTION = "Q: 51 + 142 + 217 - 254 = ?\n"
LONG = "Q: 980 + 9 - 640 - 337 - 11 - 1 = ?\n"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(4096)


def own_text(bundled_model, boundaries, tokenizer, prompt, params) -> str:
    """What the executor generates without Triton."""
    executor = Executor(TorchRunner(load_model(bundled_model), 200, 16), make_config("aligned"), boundaries, 2048, 4)
    handle = executor.submit(tokenizer(prompt)["input_ids"], params)
    executor.run_until_idle()
    return tokenizer.decode(handle.result().token_ids, skip_special_tokens=True)


def test_the_text_is_the_executor_s_own_in_one_piece_and_streamed(triton, bundled_model, boundaries, tokenizer):
    expected = own_text(bundled_model, boundaries, tokenizer, QUESTION, SamplingParams(1000, stop_token_ids=(1,)))
    answer = triton.generate(text_input=QUESTION, max_tokens=1000)
    assert answer["text_output"] == expected
    assert answer["finish_reason"] == "stop"
    events = triton.stream(text_input=QUESTION, max_tokens=1000)
    assert "".join(e["text_output"] for e in events) == expected
    assert len(events) > 20
    assert [e["finish_reason"] for e in events if e["finish_reason"]] == ["stop"]
    assert expected.endswith("156")


def test_sampling_parameters_reach_the_sampler(triton, bundled_model, boundaries, tokenizer):
    params = SamplingParams(40, temperature=3.0, top_k=20, top_p=0.95, seed=7, stop_token_ids=(1,))
    expected = own_text(bundled_model, boundaries, tokenizer, QUESTION, params)
    inputs = {"text_input": QUESTION, "max_tokens": 40, "temperature": 3.0, "top_k": 20, "top_p": 0.95}
    assert triton.generate(**inputs, seed=7)["text_output"] == expected
    assert triton.generate(**inputs, seed=8)["text_output"] != expected


def test_stop_words_bad_words_echo_and_counts(triton):
    plain = triton.generate(text_input=QUESTION, max_tokens=200)["text_output"]
    cut = triton.generate(text_input=QUESTION, max_tokens=200, stop_words=["so 193", "never"], return_perf_metrics=True)
    assert cut["text_output"] == plain.partition("so 193")[0]
    assert cut["finish_reason"] == "stop"
    assert cut["num_input_tokens"] == len(QUESTION)
    streamed = triton.stream(text_input=QUESTION, max_tokens=200, stop_words=["so 193"])
    assert "".join(e["text_output"] for e in streamed) == cut["text_output"]
    assert "5" not in triton.generate(text_input=QUESTION, max_tokens=30, bad_words=["5"])["text_output"]
    echoed = triton.generate(text_input=QUESTION, max_tokens=5, exclude_input_in_output=False)["text_output"]
    assert echoed == QUESTION + plain[: len(echoed) - len(QUESTION)]
    counted = triton.generate(text_input=QUESTION, max_tokens=300, return_perf_metrics=True)
    assert counted["num_output_tokens"] == 300
    assert counted["finish_reason"] == "length"
    assert counted["kv_cache_alloc_total_blocks"] == -(-(len(QUESTION) + 300) // 16)
    assert 0 < counted["memshare_retired_pages"] < counted["kv_cache_alloc_total_blocks"]
    assert counted["arrival_time_ns"] < counted["first_token_time_ns"] < counted["last_token_time_ns"]
    whole = triton.generate(text_input=QUESTION, max_tokens=300, return_perf_metrics=True, memshare_off=True)
    assert (whole["memshare_retired_pages"], whole["memshare_num_pauses"]) == (0, 0)
    assert whole["memshare_peak_pages"] > counted["memshare_peak_pages"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "Q" * 101, "max_tokens": 5}, "the prompt has 101 tokens, over the limit max_prompt_tokens 100"),
        ({"text_input": QUESTION, "max_tokens": 5000}, "the limit max_output_tokens 2047, got 5000"),
        ({"text_input": QUESTION, "max_tokens": 0}, "must be between 1 and the limit max_output_tokens"),
        ({"text_input": "", "max_tokens": 5}, "text_input must be one text that is not empty for each prompt"),
        (
            {"text_input": QUESTION, "max_tokens": 5, "beam_width": 2},
            "beam_width is not supported by this server and must be 1, got 2",
        ),
        ({"text_input": QUESTION, "max_tokens": 5, "temperature": -1.0}, "temperature must be between 0 and 100"),
        ({"text_input": QUESTION, "max_tokens": 5, "memshare_group": 1}, "memshare_group needs an engine"),
        ({"text_input": QUESTION, "max_tokens": 5, "memshare_min_kept": 0.5}, "memshare_min_kept needs an engine"),
        ({"text_input": QUESTION, "max_tokens": 2040}, "prompt and output must fit max_seq_len 2048"),
    ],
)
def test_limits_are_named_in_the_error(triton, inputs, message):
    with pytest.raises(urllib.error.HTTPError) as caught:
        triton.generate(**inputs)
    assert message in caught.value.read().decode()
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_two_hundred_streams_at_once_complete(triton, bundled_model, boundaries, tokenizer):
    expected = own_text(bundled_model, boundaries, tokenizer, QUESTION, SamplingParams(20, stop_token_ids=(1,)))
    with ThreadPoolExecutor(200) as clients:
        calls = [clients.submit(triton.stream, 120, text_input=QUESTION, max_tokens=20) for _ in range(200)]
        texts = ["".join(e["text_output"] for e in call.result()) for call in calls]
    assert texts == [expected] * 200
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_a_client_that_disconnects_frees_its_blocks(triton):
    response = triton.open("generate_stream", 30, text_input=LONG, max_tokens=1500, stream=True, end_id=0)
    assert response.readline().startswith(b"data:")
    triton.wait_until(lambda: triton.used_blocks() > 0)
    response.close()
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_http_client_sees_the_models_as_tensorrt_llm_s_clients_expect_them(triton):
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    with http.InferenceServerClient(f"127.0.0.1:{triton.http}") as client:
        assert client.is_model_ready("ensemble")
        assert client.is_model_ready("tensorrt_llm")
        inputs = {i["name"]: (i["datatype"], i["shape"]) for i in client.get_model_metadata("ensemble")["inputs"]}
        config = client.get_model_config("tensorrt_llm")
    assert inputs["text_input"] == ("BYTES", [-1, 1])
    assert inputs["max_tokens"] == ("INT32", [-1, 1])
    assert {"stream", "temperature", "top_k", "top_p", "seed", "stop_words", "bad_words", "end_id", "pad_id",
            "exclude_input_in_output", "return_perf_metrics"} <= set(inputs)  # fmt: skip
    assert config["instance_group"][0]["count"] == 1
    assert config["model_transaction_policy"]["decoupled"] is True
