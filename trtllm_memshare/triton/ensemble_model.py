"""Triton's model `ensemble`: text in, text out, as TensorRT-LLM's clients expect it.

A thin BLS model: tokenizes, calls `tensorrt_llm` decoupled, detokenizes, looks for stop words, and passes cancellation
on. It holds no executor, so it may have several instances.
"""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer, StopWords
from trtllm_memshare.triton.tensors import RequestTensors

_TOKEN_MODEL = "tensorrt_llm"
_PASSED_ON = {
    "temperature": ("temperature", np.float32),
    "top_k": ("runtime_top_k", np.int32),
    "top_p": ("runtime_top_p", np.float32),
    "seed": ("seed", np.uint64),
    "end_id": ("end_id", np.int32),
    "pad_id": ("pad_id", np.int32),
    "beam_width": ("beam_width", np.int32),
}
"""Inputs handed to the token model: its name for them, and their type."""

PERF_OUTPUTS = (
    "num_input_tokens", "num_output_tokens", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks", "memshare_shared_blocks", "arrival_time_ns", "first_token_time_ns",
    "last_token_time_ns",
)  # fmt: skip
"""Outputs that come with ``return_perf_metrics``."""


@dataclass(eq=False)
class _Call:
    """One request on its way. ``token_request_id``: what `tensorrt_llm` knows it by."""

    sender: Any
    tensors: RequestTensors
    token_request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    stopped: bool = False


class EnsembleModel:
    """What Triton's ``TritonPythonModel`` does, with its utilities handed in.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      args: as ``initialize`` gets them.
    """

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        self._pb = pb_utils
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self._tokenizer = AutoTokenizer.from_pretrained(parameters["tokenizer_dir"], local_files_only=True)
        self._exclude_input = parameters["exclude_input_in_output"] == "true"
        self._calls: set[_Call] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._callers = ThreadPoolExecutor(int(parameters["max_requests"]) + 1, "memshare-ensemble")
        self._poll_s = int(parameters["cancellation_check_period_ms"]) / 1e3
        self._watcher = threading.Thread(target=self._look_for_cancelled, daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to a thread of its own and returns."""
        for request in requests:
            call = _Call(request.get_response_sender(), RequestTensors.of(request))
            with self._lock:
                self._calls.add(call)
            self._callers.submit(self._serve, call)

    def finalize(self) -> None:
        """Lets requests in flight end."""
        self._callers.shutdown()
        self._closing.set()
        self._watcher.join()

    def _serve(self, call: _Call) -> None:
        try:
            self._generate(call)
        except UserError as error:
            self._send_error(call, self._pb.TritonError(str(error), self._pb.TritonError.INVALID_ARG))
        except Exception as error:
            self._stop(call)
            message = f"ensemble failed: {type(error).__name__}: {error}"
            self._send_error(call, self._pb.TritonError(message, self._pb.TritonError.INTERNAL))
        finally:
            with self._lock:
                self._calls.discard(call)

    def _generate(self, call: _Call) -> None:
        tensors = call.tensors
        prompts = tensors.texts("text_input")
        if len(prompts) != 1:
            raise UserError(f"text_input must be one text that is not empty, got {len(prompts)} (send one per request)")
        streams = tensors.flag("stream", False)
        detokenizer, stop_words = IncrementalDetokenizer(self._tokenizer), StopWords(tensors.texts("stop_words"))
        echo = "" if tensors.flag("exclude_input_in_output", self._exclude_input) else prompts[0]
        text, perf = [echo], []
        reason = ""
        request = self._token_request(call, prompts[0], streams or bool(tensors.texts("stop_words")))
        for response in request.exec(decoupled=True):
            if response.has_error():
                self._send_error(call, response.error())
                return
            outputs = {t.name(): t for t in response.output_tensors()}
            if "output_ids" not in outputs:
                continue  # the empty response that ends a stream
            reason = _text_of(outputs["finish_reason"])
            ids = outputs["output_ids"].as_numpy().reshape(-1).tolist()
            text.append(stop_words.push(detokenizer.push(ids, last=bool(reason)), last=bool(reason)))
            perf = [outputs[name] for name in PERF_OUTPUTS if name in outputs]
            if stop_words.found and not call.stopped:
                self._stop(call)
            if streams and not reason and (piece := "".join(text)):
                call.sender.send(self._response(piece, "", []))
                text = []
        reason = "stop" if stop_words.found else reason
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        call.sender.send(self._response("".join(text), reason, perf), flags=final)

    def _token_request(self, call: _Call, prompt: str, streaming: bool) -> Any:
        tensors = call.tensors
        ids = self._tokenizer(prompt)["input_ids"]
        arrays = {
            "input_ids": np.array([ids], np.int32),
            "input_lengths": np.array([[len(ids)]], np.int32),
            "request_output_len": np.array([[tensors.number("max_tokens", 0, 0, 2**31 - 1)]], np.int32),
            "streaming": np.array([[streaming]], np.bool_),
            "exclude_input_in_output": np.array([[True]], np.bool_),
            "return_perf_metrics": np.array([[tensors.flag("return_perf_metrics", False)]], np.bool_),
        }
        for name, (theirs, dtype) in _PASSED_ON.items():
            if name in tensors:
                default = 0.0 if dtype is np.float32 else 0
                arrays[theirs] = np.array([[tensors.number(name, default, -(2**31), 2**63 - 1)]], dtype)
        if bad_words := tensors.texts("bad_words"):
            arrays["bad_words_list"] = self._word_list(bad_words)
        names = ["output_ids", "sequence_length", "finish_reason", *PERF_OUTPUTS]
        return self._infer(call.token_request_id, arrays, names)

    def _infer(self, request_id: str, arrays: dict[str, np.ndarray], outputs: list[str]) -> Any:
        return self._pb.InferenceRequest(
            model_name=_TOKEN_MODEL,
            request_id=request_id,
            requested_output_names=outputs,
            inputs=[self._pb.Tensor(name, array) for name, array in arrays.items()],
        )

    def _word_list(self, words: list[str]) -> np.ndarray:
        """TensorRT-LLM's form, int32 ``[1, 2, n]``: ids, and behind them the ends of the sequences, padded with -1."""
        sequences = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        ids = [token for sequence in sequences for token in sequence]
        ends = np.cumsum([len(sequence) for sequence in sequences]).tolist()
        return np.array([[ids, ends + [-1] * (len(ids) - len(ends))]], np.int32)

    def _response(self, text: str, reason: str, perf: list[Any]) -> Any:
        tensor = self._pb.Tensor
        outputs = [
            tensor("text_output", np.array([[text]], np.object_)),
            tensor("finish_reason", np.array([[reason]], np.object_)),
        ]
        outputs += [tensor(t.name(), t.as_numpy()) for t in perf]
        return self._pb.InferenceResponse(output_tensors=outputs)

    def _send_error(self, call: _Call, error: Any) -> None:
        try:
            call.sender.send(
                self._pb.InferenceResponse(error=error), flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
        except Exception as failure:
            self._pb.Logger.log_warn(f"could not answer with '{error.message()}': {failure}")

    def _stop(self, call: _Call) -> None:
        """Asks `tensorrt_llm` to end the request, the way its own clients do: same id, ``stop`` set."""
        call.stopped = True
        arrays = {
            "input_ids": np.zeros((1, 1), np.int32),
            "input_lengths": np.ones((1, 1), np.int32),
            "request_output_len": np.ones((1, 1), np.int32),
            "stop": np.array([[True]], np.bool_),
        }
        for _ in self._infer(call.token_request_id, arrays, ["output_ids"]).exec(decoupled=True):
            pass

    def _look_for_cancelled(self) -> None:
        while not self._closing.wait(self._poll_s):
            with self._lock:
                calls = [call for call in self._calls if not call.stopped]
            for call in calls:
                if call.sender.is_cancelled():
                    self._stop(call)


def _text_of(tensor: Any) -> str:
    value = tensor.as_numpy().reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value)
