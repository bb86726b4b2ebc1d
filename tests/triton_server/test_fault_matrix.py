"""The fault matrix through Triton: every input of both models at the extremes of its type, over gRPC and HTTP.

In each row, which is one input, two other requests run. They must end with their own text; each cell must end with an
answer or with a sentence, within a bound; afterwards both probes are green and all blocks are back. Every run takes a
sample of the rows, `make nightly` takes all.
"""

from __future__ import annotations

import json
import queue
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from nightly import NIGHTLY

from trtllm_memshare.triton.inputs import INPUTS, Input
from trtllm_memshare.triton.probe import why_not_alive, why_not_ready

grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")

BOUND_S = 60
HTTP_BYTES = 2_000_000
"""Triton 2.51 itself ends with a segmentation fault on bodies of some megabytes (CVE-2025-23310, CVE-2025-23311, mended
in 25.07), before any model sees them; over gRPC such requests are refused by name."""
QUESTION = "Q: 51 + 142 + 217 - 254 = ?\n"
OTHERS = {"text_input": QUESTION, "max_tokens": 40}
DTYPES = {
    "INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32, "FP16": np.float16, "BOOL": np.bool_,
    "STRING": np.object_,
}  # fmt: skip
FLOATS = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-39, 1e-7, 6e4, 3e38)
TEXTS = (b"", b"\0", b"\xff\xfe", b"a" * 100_000, "\ud7ff\U0001f9ee".encode() * 100, b"{" * 1000)
ROWS = [(level, known) for level in ("text", "token") for known in INPUTS if getattr(known, level)]
SAMPLE = ROWS if NIGHTLY else ROWS[::12]


def extremes(dtype: str) -> tuple:
    """Values of one element."""
    if dtype == "STRING":
        return TEXTS
    if dtype == "BOOL":
        return (True, False)
    if dtype.startswith("FP"):
        return tuple(v for v in FLOATS if dtype == "FP32" or not abs(v) > 6e4 or np.isinf(v))
    low, high = np.iinfo(DTYPES[dtype]).min, np.iinfo(DTYPES[dtype]).max
    return tuple(dict.fromkeys((int(low), max(int(low), -1), 0, 1, 2**31 - 1, int(high))))


def arrays(known: Input) -> list[np.ndarray]:
    """The extremes in the shape that the input has, and for lists also an empty and a long one."""
    dtype, sizes = DTYPES[known.dtype], (1,) if -1 not in known.dims else (0, 1, 300)
    shapes = [(1, *(size if d == -1 else d for d in known.dims)) for size in sizes]
    return [
        np.full(shape, value, dtype)
        for shape in shapes
        for value in (extremes(known.dtype)[:1] if 0 in shape else extremes(known.dtype))
    ]


def base(level: str) -> dict[str, np.ndarray]:
    """A request that works."""
    if level == "text":
        return {
            "text_input": np.array([[QUESTION.encode()]], np.object_),
            "max_tokens": np.array([[8]], np.int32),
            "stream": np.array([[True]]),
        }
    return {
        "input_ids": np.array([[5, 6, 7]], np.int32),
        "input_lengths": np.array([[3]], np.int32),
        "request_output_len": np.array([[8]], np.int32),
        "streaming": np.array([[True]]),
    }


def ask(address: str, level: str, inputs: dict[str, np.ndarray]) -> str:
    """How a request ended: ``answer``, or the error's text. A request without an end fails by its timeout."""
    results: queue.Queue = queue.Queue()
    tensors = []
    for name, array in inputs.items():
        tensor = grpc.InferInput(name, array.shape, "BYTES" if array.dtype == np.object_ else _name(array))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: results.put(error), stream_timeout=BOUND_S)
        model = "ensemble" if level == "text" else "tensorrt_llm"
        client.async_stream_infer(model, tensors, enable_empty_final_response=True)
        client.stop_stream()  # waits for the end
    errors = [error for error in list(results.queue) if error is not None]
    assert results.qsize(), "neither an answer nor an error"
    return errors[0].message() if errors else "answer"


def ask_over_http(triton, level: str, inputs: dict[str, np.ndarray]) -> str:
    """The same through the generate endpoint; NaN and infinities go as ``NaN`` and ``Infinity``, which JSON has not."""
    values = {}
    for name, array in inputs.items():
        listed = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in array.ravel().tolist()]
        values[name] = listed[0] if len(listed) == 1 else listed
    model = "ensemble" if level == "text" else "tensorrt_llm"
    if len(json.dumps(values)) > HTTP_BYTES:
        return "not asked"
    try:
        with triton.open("generate_stream", BOUND_S, model, **values) as response:
            lines = response.readlines()
    except urllib.error.HTTPError as error:
        lines = error.readlines()
    events = [json.loads(line.removeprefix(b"data:")) for line in lines if line.strip()]
    assert events or "stop" in inputs, "neither an answer nor an error"  # a request that is cancelled streams nothing
    return next((event["error"] for event in events if "error" in event), "answer")


def _name(array: np.ndarray) -> str:
    return next(name for name, dtype in DTYPES.items() if array.dtype == dtype)


@pytest.fixture(scope="module")
def undisturbed(triton) -> str:
    return triton.generate(**OTHERS)["text_output"]


@pytest.mark.parametrize(("level", "known"), SAMPLE, ids=[f"{level}-{getattr(k, level)}" for level, k in SAMPLE])
def test_an_input_at_its_extremes_harms_nobody(triton, undisturbed, level, known):
    name, address = getattr(known, level), f"127.0.0.1:{triton.grpc}"
    with ThreadPoolExecutor(2) as others:
        calls = [others.submit(triton.generate, BOUND_S, **OTHERS) for _ in range(2)]
        for array in arrays(known):
            inputs = {**base(level), name: array}
            for end in (ask(address, level, inputs), ask_over_http(triton, level, inputs)):
                assert "Deadline" not in end, f"{array!r} had no end within {BOUND_S} s"
                assert "Traceback" not in end, end
                assert "the request failed" not in end, f"{array!r} was not foreseen: {end}"
        assert [call.result()["text_output"] for call in calls] == [undisturbed] * 2
    server = f"http://127.0.0.1:{triton.http}"
    assert why_not_ready(server, 10) == ""
    assert why_not_alive(server, f"http://127.0.0.1:{triton.metrics_port}/metrics", BOUND_S, 10) == ""
    triton.wait_until(lambda: triton.used_blocks() == 0)


def test_the_matrix_has_three_hundred_cells():
    assert sum(len(arrays(known)) for _, known in ROWS) >= 300
