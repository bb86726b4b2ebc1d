"""The two models on a real Triton server, through real clients."""

from __future__ import annotations

import json
import queue
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from triton_server.conftest import start_triton, stop_triton

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.metrics import GAUGES

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
    assert 0 < counted["memshare_shared_blocks"] < counted["kv_cache_alloc_total_blocks"]
    assert counted["arrival_time_ns"] < counted["first_token_time_ns"] < counted["last_token_time_ns"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "Q" * 101, "max_tokens": 5}, "the prompt has 101 tokens, over the limit max_prompt_tokens 100"),
        ({"text_input": QUESTION, "max_tokens": 5000}, "the limit max_output_tokens 2047, got 5000"),
        ({"text_input": QUESTION, "max_tokens": 0}, "must be between 1 and the limit max_output_tokens"),
        ({"text_input": "", "max_tokens": 5}, "text_input must be one text that is not empty"),
        ({"text_input": QUESTION, "max_tokens": 5, "beam_width": 2}, "beam_width must be between 1 and 1, got 2"),
        ({"text_input": QUESTION, "max_tokens": 5, "temperature": -1.0}, "temperature must be between 0 and 100"),
        ({"text_input": QUESTION, "max_tokens": 5, "memshare_group": 1}, "memshare_group needs an engine"),
        ({"text_input": QUESTION, "max_tokens": 2040}, "prompt and output must fit max_seq_len 2048"),
    ],
)
def test_limits_are_named_in_the_error(triton, inputs, message):
    with pytest.raises(urllib.error.HTTPError) as caught:
        triton.generate(**inputs)
    assert message in caught.value.read().decode()
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_two_hundred_streams_at_once_complete(triton, bundled_model, boundaries, tokenizer):
    expected = own_text(bundled_model, boundaries, tokenizer, QUESTION, SamplingParams(60, stop_token_ids=(1,)))
    with ThreadPoolExecutor(200) as clients:
        calls = [clients.submit(triton.stream, 120, text_input=QUESTION, max_tokens=60) for _ in range(200)]
        texts = ["".join(e["text_output"] for e in call.result()) for call in calls]
    assert texts == [expected] * 200
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_a_client_that_disconnects_frees_its_blocks(triton):
    response = triton.open("generate_stream", 30, text_input=LONG, max_tokens=1500, stream=True, end_id=0)
    assert response.readline().startswith(b"data:")
    triton.wait_until(lambda: triton.used_blocks() > 0)
    response.close()
    triton.wait_until(lambda: triton.used_blocks() == 0)


def grpc_inputs(grpc, **inputs):
    types = {"text_input": "BYTES", "stream": "BOOL", "streaming": "BOOL"}
    found = []
    for name, value in inputs.items():
        kind = types.get(name, "INT32")
        dtype = {"BYTES": np.object_, "BOOL": np.bool_, "INT32": np.int32}[kind]
        array = np.array(value if isinstance(value, list) else [[value]], dtype)
        tensor = grpc.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def test_grpc_streams_token_by_token_and_cancels(triton, tokenizer):
    grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    results: queue.Queue = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        ids = tokenizer(QUESTION)["input_ids"]
        inputs = {"input_ids": [ids], "input_lengths": len(ids), "request_output_len": 25, "streaming": True}
        client.async_stream_infer("tensorrt_llm", grpc_inputs(grpc, **inputs), request_id="a")
        tokens, reason = [], ""
        while not reason:
            result, error = results.get(timeout=30)
            assert error is None
            piece = result.as_numpy("output_ids")
            assert piece.shape == (1, 1, result.as_numpy("sequence_length")[0, 0])
            tokens += piece.reshape(-1).tolist()
            reason = result.as_numpy("finish_reason")[0, 0].decode()
        text = triton.generate(text_input=QUESTION, max_tokens=25)["text_output"]
        assert (tokenizer.decode(tokens), reason) == (text, "length")
        inputs = grpc_inputs(grpc, text_input=LONG.encode(), max_tokens=1500, stream=True, end_id=0)
        client.async_stream_infer("ensemble", inputs, request_id="b")
        assert results.get(timeout=30)[1] is None
        triton.wait_until(lambda: triton.used_blocks() > 0)
        client.stop_stream(cancel_requests=True)
        triton.wait_until(lambda: triton.used_blocks() == 0)


def test_a_second_request_with_stop_set_ends_the_first(triton, tokenizer):
    grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    results: queue.Queue = queue.Queue()
    ids = tokenizer(LONG)["input_ids"]
    shared = {"input_ids": [ids], "input_lengths": len(ids), "request_output_len": 1500, "end_id": 0}
    with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        client.async_stream_infer("tensorrt_llm", grpc_inputs(grpc, **shared, streaming=True), request_id="c")
        assert results.get(timeout=30)[1] is None
        stop = grpc.InferInput("stop", [1, 1], "BOOL")
        stop.set_data_from_numpy(np.array([[True]]))
        client.async_stream_infer("tensorrt_llm", [*grpc_inputs(grpc, **shared), stop], request_id="c")
        reason = b""
        while not reason:
            result, error = results.get(timeout=30)
            assert error is None
            reason = result.as_numpy("finish_reason")[0, 0]
        assert reason == b"cancelled"
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


def test_metrics_have_tensorrt_llm_s_names(triton):
    triton.generate(text_input=QUESTION, max_tokens=300)
    triton.wait_until(lambda: triton.used_blocks() == 0)
    metrics = triton.metrics()
    for name, (_, label, values) in GAUGES.items():
        for value in values:
            assert any(k.startswith(f"{name}{{") and f'{label}="{value}"' in k for k in metrics), (name, value)

    def value(part: str) -> float:
        return next(v for k, v in metrics.items() if part in k)

    assert value('kv_cache_block_type="max"') == 2000
    assert value('kv_cache_block_type="free"') == 2000
    assert value('kv_cache_block_type="tokens_per"') == 16
    assert value("memshare_blocks") > 0
    assert value("memshare_saved_bytes") == value("memshare_blocks") * 32768


def test_a_killed_model_process_gives_an_error_and_comes_back(served_engine, tmp_path):
    server = start_triton(tmp_path, served_engine, kv_cache_blocks=500)
    try:
        with ThreadPoolExecutor(1) as clients:
            call = clients.submit(server.stream, 60, text_input=LONG, max_tokens=1500, end_id=0)
            server.wait_until(lambda: server.used_blocks() > 0)
            server.model_process("tensorrt_llm").kill()
            events = call.result()
        assert "tensorrt_llm went away while it worked on this request" in str(events[-1])

        errors = []

        def works() -> bool:
            try:
                return server.generate(text_input=QUESTION, max_tokens=5)["text_output"].startswith("<think>")
            except urllib.error.HTTPError as error:
                errors.append(error.read().decode())
                return False

        server.wait_until(works, 90)
        assert all("the model tensorrt_llm cannot be reached" in error for error in errors)
    finally:
        stop_triton(server)


def test_shutdown_under_load_drains_and_a_full_queue_is_named(served_engine, tmp_path):
    server = start_triton(tmp_path, served_engine, kv_cache_blocks=500, max_queue_size=0)

    def last_event() -> dict:
        try:
            return server.stream(120, text_input=QUESTION, max_tokens=400)[-1]
        except urllib.error.HTTPError as error:
            return json.loads(error.read().decode().removeprefix("data:"))

    with ThreadPoolExecutor(80) as clients:
        calls = [clients.submit(last_event) for _ in range(80)]
        server.wait_until(lambda: server.used_blocks() > 100)
        server.process.terminate()
        ends = [call.result() for call in calls]
    assert server.process.wait(60) == 0, server.log.read_text(errors="replace")[-3000:]
    refused = [e["error"] for e in ends if "error" in e]
    assert refused
    assert all("the queue is full: 64 requests are in the system" in e for e in refused)
    assert sum(e.get("finish_reason") == "stop" for e in ends) == 80 - len(refused)
