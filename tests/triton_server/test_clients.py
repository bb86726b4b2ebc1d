"""What NVIDIA's client scripts send, through tritonclient over gRPC, HTTP and asyncio, to a real server."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import urllib.error

import numpy as np
import pytest

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer

grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

QUESTION = "Q: 51 + 142 + 217 - 254 = ?\n"
OTHER = "Q: 1 + 1 = ?\n"
LONG = "Q: 980 + 9 - 640 - 337 - 11 - 1 = ?\n"
_DTYPES = {"O": "BYTES", "b": "BOOL", "f": "FP32", "i": "INT32", "u": "UINT64"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(4096)


@pytest.fixture(scope="module")
def client(triton):
    with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as found:
        yield found


def tensors(module, **arrays):
    """Inputs of a request: text as BYTES, whole numbers as INT32, others as FP32."""
    found = []
    for name, value in arrays.items():
        array = np.asarray(value)
        array = array.astype({"U": np.object_, "i": np.int32, "f": np.float32}.get(array.dtype.kind, array.dtype))
        tensor = module.InferInput(name, array.shape, _DTYPES[array.dtype.kind])
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def streamed(client, model, outputs=(), request_id="0", **arrays) -> list:
    """Every answer of one request over a gRPC stream; an error is raised."""
    results: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))
    wanted = [grpc.InferRequestedOutput(name) for name in outputs] or None
    client.async_stream_infer(model, tensors(grpc, **arrays), outputs=wanted, request_id=request_id)
    client.stop_stream()
    found = []
    while not results.empty():
        result, error = results.get()
        if error is not None:
            raise error
        found.append(result)
    return found


def text_of(results) -> str:
    return "".join(r.as_numpy("text_output")[0].decode() for r in results)


def test_the_text_client_s_request_gets_text_in_one_dimension(client, triton):
    # What the end-to-end gRPC client sends without options, and how it reads the answer.
    results = streamed(
        client, "ensemble", ["text_output"], text_input=[[QUESTION]], max_tokens=[[20]], stream=[[False]],
        beam_width=[[1]], temperature=[[1.0]],
    )  # fmt: skip
    assert [r.as_numpy("text_output").shape for r in results] == [(1,)]
    assert text_of(results) == triton.generate(text_input=QUESTION, max_tokens=20)["text_output"]


def test_the_inputs_of_llama_index_s_client(client, triton):
    # llama-index-llms-nvidia-triton 0.6.0, which asks for a stream each time and joins the pieces.
    inputs = [("text_input", [[QUESTION.encode()]], np.object_), ("max_tokens", [[40]], np.int32),
              ("top_k", [[1]], np.int32), ("top_p", [[0]], np.float32), ("temperature", [[1]], np.float32),
              ("length_penalty", [[1]], np.float32), ("repetition_penalty", [[1]], np.float32),
              ("random_seed", [[0]], np.uint64), ("beam_width", [[1]], np.int32),
              ("stream", [[True]], np.bool_)]  # fmt: skip
    answers = streamed(client, "ensemble", **{name: np.array(value, dtype) for name, value, dtype in inputs})
    text = "".join(piece.decode() for answer in answers for piece in answer.as_numpy("text_output"))
    assert text == triton.generate(text_input=QUESTION, max_tokens=40)["text_output"]


def test_optional_inputs_at_their_neutral_values_change_nothing(client, triton):
    plain = triton.generate(text_input=QUESTION, max_tokens=20)["text_output"]
    neutral = {
        "length_penalty": [[1.0]], "repetition_penalty": [[1.0]], "presence_penalty": [[0.0]],
        "frequency_penalty": [[0.0]], "min_tokens": [[0]], "num_return_sequences": [[1]], "bad_words": [[""]],
        "stop_words": [[""]], "embedding_bias_words": [[""]], "embedding_bias_weights": [[0.0]],
        "return_context_logits": [[False]], "return_generation_logits": [[False]], "num_draft_tokens": [[0]],
        "use_draft_logits": [[False]], "decoder_text_input": [[""]], "pad_id": [[0]],
        "guided_decoding_guide": [[""]], "top_k": [[1]],
    }  # fmt: skip
    outputs = ["text_output", "cum_log_probs", "context_logits", "generation_logits", "acceptance_rate"]
    inputs = {"text_input": [[QUESTION]], "max_tokens": [[20]], **neutral}
    assert text_of(streamed(client, "ensemble", outputs, **inputs)) == plain
    scalars = {name: value[0][0] for name, value in neutral.items() if name not in ("embedding_bias_weights",)}
    assert triton.generate(text_input=QUESTION, max_tokens=20, **scalars)["text_output"] == plain


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"beam_width": [[2]]}, "beam_width is not supported by this server and must be 1, got 2"),
        ({"return_context_logits": [[True]]}, "return_context_logits is not supported"),
        ({"guided_decoding_guide": [["{}"]]}, "guided_decoding_guide is not supported by this server and must be ''"),
        ({"embedding_bias_weights": [[0.5]]}, "embedding_bias_weights is not supported"),
        ({"top_p": [[1.5]]}, "top_p must be between 0 and 1, got 1.5"),
        ({"top_k": [[-1]]}, "top_k must be at least 0, got -1"),
        ({"repetition_penalty": [[0.0]]}, "repetition_penalty must be above 0"),
        ({"num_return_sequences": [[65]]}, "num_return_sequences must be between 1 and 64, got 65"),
        ({"stop_words": [["x"] * 1025]}, "stop_words may hold 1024 texts, got 1025"),
        ({"min_tokens": [[6]]}, "min_tokens must be between 0 and 5, got 6"),
        ({"end_id": [[4096]]}, "end_id must be between -1 and"),
    ],
)
def test_other_values_are_refused_by_the_caller_s_name(client, inputs, message):
    with pytest.raises(Exception, match=message):
        streamed(client, "ensemble", text_input=[[QUESTION]], max_tokens=[[5]], **inputs)


def test_a_field_that_is_no_input_is_refused_over_http(triton):
    with pytest.raises(urllib.error.HTTPError) as caught:
        triton.generate(text_input=QUESTION, max_tokens=5, repetition_penaltie=2.0)
    assert "repetition_penaltie is no input of this model (did you mean repetition_penalty?)" in (
        caught.value.read().decode()
    )


def test_a_batch_and_log_probs_come_in_tensorrt_llm_s_shapes(client, triton):
    ones = {"stream": [[False]] * 2, "return_log_probs": [[True]] * 2, "max_tokens": [[6], [7]]}
    names = ["text_output", "batch_index", "sequence_index", "cum_log_probs", "output_log_probs"]
    results = streamed(client, "ensemble", names, text_input=[[QUESTION], [OTHER]], **ones)
    by_prompt = {int(r.as_numpy("batch_index")[0, 0]): r for r in results}
    assert sorted(by_prompt) == [0, 1]
    assert by_prompt[0].as_numpy("sequence_index") is None
    for index, (prompt, length) in enumerate([(QUESTION, 6), (OTHER, 7)]):
        each = by_prompt[index].as_numpy("output_log_probs")
        assert each.shape == (1, 1, length)
        assert (each <= 0).all()
        np.testing.assert_allclose(by_prompt[index].as_numpy("cum_log_probs"), each.sum(-1), rtol=1e-4)
        alone = triton.generate(text_input=prompt, max_tokens=length)["text_output"]
        assert by_prompt[index].as_numpy("text_output")[0].decode() == alone


def test_each_response_of_a_stream_has_the_log_probs_of_all_tokens_so_far(client, tokenizer):
    # As TensorRT-LLM's; its token client reads them from every response and keeps the last.
    ids = tokenizer(QUESTION)["input_ids"]
    inputs = {"input_ids": [ids], "input_lengths": [[len(ids)]], "request_output_len": [[12]]}
    results = streamed(client, "tensorrt_llm", **inputs, streaming=[[True]], return_log_probs=[[True]])
    lengths = np.cumsum([int(r.as_numpy("sequence_length")[0, 0]) for r in results])
    each = [r.as_numpy("output_log_probs") for r in results]
    assert [e.shape for e in each] == [(1, 1, length) for length in lengths]
    assert lengths[-1] == 12
    for result, so_far in zip(results, each, strict=True):
        np.testing.assert_allclose(result.as_numpy("cum_log_probs"), so_far.sum(-1), rtol=1e-4)
        np.testing.assert_array_equal(so_far, each[-1][:, :, : so_far.shape[-1]])


def test_several_sequences_of_one_prompt_are_those_of_the_next_seeds(client, triton):
    sampled = {"temperature": [[3.0]], "top_k": [[20]], "top_p": [[0.95]]}
    results = streamed(
        client, "ensemble", text_input=[[QUESTION]], max_tokens=[[12]], num_return_sequences=[[3]], **sampled
    )
    found = {int(r.as_numpy("sequence_index")[0, 0]): r.as_numpy("text_output")[0].decode() for r in results}
    alone = {
        seed: triton.generate(text_input=QUESTION, max_tokens=12, temperature=3.0, top_k=20, top_p=0.95, seed=seed)
        for seed in range(3)
    }
    assert found == {seed: answer["text_output"] for seed, answer in alone.items()}
    assert len(set(found.values())) > 1


def test_the_steps_one_by_one_give_what_the_ensemble_gives(client, triton):
    # As TensorRT-LLM's end-to-end test calls them.
    words = {"BAD_WORDS_DICT": [[""]], "STOP_WORDS_DICT": [["so 193"]], "REQUEST_OUTPUT_LEN": [[200]]}
    before = client.infer("preprocessing", tensors(grpc, QUERY=[[QUESTION]], **words), request_id="1")
    names = {
        "input_ids": "INPUT_ID", "decoder_input_ids": "DECODER_INPUT_ID", "input_lengths": "REQUEST_INPUT_LEN",
        "request_output_len": "REQUEST_OUTPUT_LEN", "end_id": "OUT_END_ID", "pad_id": "OUT_PAD_ID",
        "bad_words_list": "BAD_WORDS_IDS", "stop_words_list": "STOP_WORDS_IDS",
    }  # fmt: skip
    (result,) = streamed(client, "tensorrt_llm", **{ours: before.as_numpy(name) for ours, name in names.items()})
    ids, lengths = result.as_numpy("output_ids"), result.as_numpy("sequence_length")
    assert ids.shape == (1, 1, lengths[0, 0])
    after = client.infer("postprocessing", tensors(grpc, TOKENS_BATCH=ids, SEQUENCE_LENGTH=lengths))
    text = after.as_numpy("OUTPUT")
    assert text.shape == (1,)
    expected = triton.generate(text_input=QUESTION, max_tokens=200, stop_words=["so 193"])["text_output"]
    assert text[0].decode() == expected + "so 193"  # token ids end with the stop word, text ends before it


def test_bls_is_the_ensemble_under_another_name(client, triton):
    expected = triton.generate(text_input=QUESTION, max_tokens=30)["text_output"]
    assert triton.generate(model="tensorrt_llm_bls", text_input=QUESTION, max_tokens=30)["text_output"] == expected
    events = triton.stream(model="tensorrt_llm_bls", text_input=QUESTION, max_tokens=30)
    assert "".join(e["text_output"] for e in events) == expected
    assert len(events) > 5


def test_without_decoupled_models_plain_infer_works(triton):
    expected = [triton.generate(text_input=p, max_tokens=9)["text_output"].encode() for p in (QUESTION, OTHER)]
    inputs = {"text_input": [[QUESTION], [OTHER]], "max_tokens": [[9], [9]], "num_return_sequences": [[2], [2]]}
    with http.InferenceServerClient(f"127.0.0.1:{triton.http}") as client:
        answer = client.infer("whole", tensors(http, **inputs, return_log_probs=[[True], [True]]))
        assert answer.as_numpy("text_output").tolist() == [expected[0]] * 2 + [expected[1]] * 2
        assert answer.as_numpy("cum_log_probs").shape == (2, 2)
        assert answer.as_numpy("output_log_probs").shape == (2, 2, 9)
        with pytest.raises(Exception, match="stream needs a repository built with --decoupled"):
            client.infer("whole", tensors(http, text_input=[[OTHER]], max_tokens=[[5]], stream=[[True]]))
        # NVIDIA's token client names its mode in a parameter, beside the inputs.
        client.infer("whole", tensors(http, text_input=[[OTHER]], max_tokens=[[5]]), parameters={"Streaming": False})
        with pytest.raises(Exception, match="top_kk is no input of this model"):
            client.infer("whole", tensors(http, text_input=[[OTHER]], max_tokens=[[5]]), parameters={"top_kk": 3})
    answer = triton.generate(model="whole", text_input=OTHER, max_tokens=9, return_num_output_tokens=True)
    assert (answer["text_output"].encode(), answer["num_output_tokens"]) == (expected[1], 9)


def test_asyncio_clients_share_the_batch(triton):
    async_http = pytest.importorskip("tritonclient.http.aio", reason="tritonclient[http] has no asyncio part")
    expected = triton.generate(text_input=QUESTION, max_tokens=20)["text_output"].encode()

    async def ask() -> list:
        async with async_http.InferenceServerClient(f"127.0.0.1:{triton.http}") as client:
            inputs = tensors(http, text_input=[[QUESTION]], max_tokens=[[20]])
            answers = await asyncio.gather(*(client.infer("whole", inputs) for _ in range(10)))
            return [answer.as_numpy("text_output")[0] for answer in answers]

    assert asyncio.run(ask()) == [expected] * 10


def test_grpc_streams_token_by_token_and_cancels(triton, tokenizer):
    results: queue.Queue = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        ids = tokenizer(QUESTION)["input_ids"]
        inputs = {"input_ids": [ids], "input_lengths": [[len(ids)]], "request_output_len": [[25]]}
        client.async_stream_infer("tensorrt_llm", tensors(grpc, **inputs, streaming=[[True]]), request_id="a")
        tokens, reason = [], ""
        while not reason:
            result, error = results.get(timeout=60)
            assert error is None
            piece = result.as_numpy("output_ids")
            assert piece.shape == (1, 1, result.as_numpy("sequence_length")[0, 0])
            tokens += piece.reshape(-1).tolist()
            reason = result.as_numpy("finish_reason")[0, 0].decode()
        text = triton.generate(text_input=QUESTION, max_tokens=25)["text_output"]
        assert (tokenizer.decode(tokens), reason) == (text, "length")
        inputs = tensors(grpc, text_input=[[LONG]], max_tokens=[[1500]], stream=[[True]], end_id=[[0]])
        client.async_stream_infer("ensemble", inputs, request_id="b")
        assert results.get(timeout=60)[1] is None
        triton.wait_until(lambda: triton.used_blocks() > 0)
        client.stop_stream(cancel_requests=True)
        triton.wait_until(lambda: triton.used_blocks() == 0)


def test_stop_ends_every_request_of_an_id_and_ids_may_repeat(triton, tokenizer):
    results: queue.Queue = queue.Queue()
    ids = tokenizer(LONG)["input_ids"]
    shared = {"input_ids": [ids], "input_lengths": [[len(ids)]], "request_output_len": [[1500]], "end_id": [[0]]}
    with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        for _ in range(2):  # NVIDIA's tools count from 0, so two clients collide
            client.async_stream_infer("tensorrt_llm", tensors(grpc, **shared, streaming=[[True]]), request_id="0")
        triton.wait_until(
            lambda: len([k for k, v in triton.metrics().items() if "generation_requests" in k and v == 2])
        )
        # As the token client's stop signal: empty ids, lengths of 0.
        signal = {"input_ids": [[0]], "input_lengths": [[0]], "request_output_len": [[0]], "stop": [[True]]}
        client.async_stream_infer("tensorrt_llm", tensors(grpc, **signal), request_id="0")
        reasons = []
        while len(reasons) < 2:
            result, error = results.get(timeout=60)
            assert error is None
            if (reason := result.as_numpy("finish_reason")) is not None and reason[0, 0]:
                reasons.append(reason[0, 0])
    assert reasons == [b"cancelled"] * 2
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_a_huge_prompt_holds_nobody_up_and_is_named(triton):
    with triton.open("generate_stream", 60, text_input=LONG, max_tokens=400, stream=True, end_id=0) as response:
        assert response.readline().startswith(b"data:")
        with pytest.raises(urllib.error.HTTPError) as caught:
            triton.generate(text_input="Q" * 2_000_000, max_tokens=5)
        assert "max_prompt_bytes, which is checked before tokenizing" in caught.value.read().decode()
        last = [json.loads(line[5:]) for line in response if line.startswith(b"data:")][-1]
    assert last["finish_reason"] == "length"
    assert triton.process.poll() is None


@pytest.mark.parametrize(
    "inputs",
    [
        {"temperature": 1e-39, "top_p": 0.9},
        {"bad_words": list("0123456789+-*/=<>abcdefghijklmnopqrstuvwxyz:?. \n"), "temperature": 1.0, "top_k": 5},
        {"frequency_penalty": 100.0, "presence_penalty": -100.0, "repetition_penalty": 100.0},
        {"min_tokens": 20},
    ],
)
def test_no_value_stops_the_executor_for_everyone(triton, inputs):
    answer = triton.generate(text_input=QUESTION, max_tokens=20, **inputs)
    assert answer["finish_reason"] in ("length", "stop")
    assert triton.generate(text_input=OTHER, max_tokens=3)["finish_reason"] == "length"


def test_token_ids_out_of_range_are_refused(client, tokenizer):
    ids = tokenizer(OTHER)["input_ids"]
    inputs = {"input_ids": [ids], "input_lengths": [[len(ids)]], "request_output_len": [[5]]}
    with pytest.raises(Exception, match=r"bad_words_list must lie in the vocabulary 0\.\.\d+, got 99999") as caught:
        streamed(client, "tensorrt_llm", **inputs, bad_words_list=[[[99999], [1]]])
    every = list(range(int(re.search(r"0\.\.(\d+)", str(caught.value))[1]) + 1))
    with pytest.raises(Exception, match="bad_words_list must leave at least one token of the vocabulary, got all"):
        streamed(client, "tensorrt_llm", **inputs, bad_words_list=[[every, [i + 1 for i in every]]])
