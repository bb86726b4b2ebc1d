"""Triton's model `ensemble`: text in, text out, as TensorRT-LLM's clients expect it.

Tokenizes, has the executor in the process of `tensorrt_llm` generate, detokenizes, looks for stop words, and passes
cancellation on. It calls the executor over a Unix socket and not through BLS: with many requests at a time decoupled
BLS calls bring Triton's stub down (see ``loop``), and each token would pass through the server twice.
"""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.client import ServiceClient, ServiceLostError
from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer, StopWords
from trtllm_memshare.triton.loop import LoopThread
from trtllm_memshare.triton.reply import Reply
from trtllm_memshare.triton.service import QueueFullError, socket_path
from trtllm_memshare.triton.tensors import RequestTensors, perf_tensors

_PASSED_ON = {
    "temperature": "temperature",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "seed": "seed",
    "memshare_group": "memshare_group",
    "end_id": "end_id",
    "beam_width": "beam_width",
}
"""Inputs handed to the executor, and its names for them."""


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
        self._poll_s = int(parameters["cancellation_check_period_ms"]) / 1e3
        self._loop = LoopThread("memshare-ensemble")
        self._client = ServiceClient(socket_path())
        self._reloading = False

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to the loop and returns."""
        for request in requests:
            reply = Reply(self._pb, request.get_response_sender())
            self._loop.start(self._answer(RequestTensors.of(request), reply))

    def finalize(self) -> None:
        """Lets requests in flight end."""
        self._loop.stop()

    async def _answer(self, tensors: RequestTensors, reply: Reply) -> None:
        generating = asyncio.ensure_future(self._generate(tensors, reply))
        try:
            # Asked on this thread and between responses, never beside one.
            while not (await asyncio.wait({generating}, timeout=self._poll_s))[0]:
                if reply.is_cancelled():
                    generating.cancel()
            await generating
        except asyncio.CancelledError:
            reply.fail("the client has cancelled the request", self._pb.TritonError.CANCELLED)
        except QueueFullError as error:
            reply.fail(str(error), self._pb.TritonError.UNAVAILABLE)
        except UserError as error:
            reply.fail(str(error))
        except ServiceLostError as error:
            reply.fail(str(error), self._pb.TritonError.UNAVAILABLE)
            if not self._reloading:
                self._reloading = True
                threading.Thread(target=self._reload_token_model, daemon=True).start()
        except Exception as error:
            reply.fail(f"ensemble failed: {type(error).__name__}: {error}", self._pb.TritonError.INTERNAL)

    async def _generate(self, tensors: RequestTensors, reply: Reply) -> None:
        prompts, words = tensors.texts("text_input"), tensors.texts("stop_words")
        if len(prompts) != 1:
            raise UserError(f"text_input must be one text that is not empty, got {len(prompts)} (send one per request)")
        streams = tensors.flag("stream", False)
        detokenizer, stop_words = IncrementalDetokenizer(self._tokenizer), StopWords(words)
        text = "" if tensors.flag("exclude_input_in_output", self._exclude_input) else prompts[0]
        call = await self._client.submit(self._inputs(tensors, prompts[0], streams or bool(words)))
        async with aclosing(call.events()) as events:
            async for event in events:
                last, found = bool(event.finish_reason), stop_words.found
                text += stop_words.push(detokenizer.push(event.token_ids, last), last)
                if last:
                    reason = "stop" if stop_words.found else event.finish_reason
                    reply.end(self._response(text, reason, event.perf))
                elif stop_words.found and not found:
                    call.cancel()
                elif streams and text:
                    reply.send(self._response(text, "", {}))
                    text = ""

    def _inputs(self, tensors: RequestTensors, prompt: str, streaming: bool) -> dict[str, Any]:
        """Inputs of the token level, as lists and numbers."""
        ids = self._tokenizer(prompt)["input_ids"]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "input_lengths": len(ids),
            "request_output_len": tensors.number("max_tokens", 0, 0, 2**31 - 1),
            "streaming": streaming,
            "exclude_input_in_output": True,
            "return_perf_metrics": tensors.flag("return_perf_metrics", False),
        }
        for name, theirs in _PASSED_ON.items():
            if name in tensors:
                default = 0.0 if name in ("temperature", "top_p") else 0
                inputs[theirs] = tensors.number(name, default, -(2**31), 2**63 - 1)
        if bad_words := tensors.texts("bad_words"):
            sequences = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in bad_words]
            ids = [token for sequence in sequences for token in sequence]
            ends = np.cumsum([len(sequence) for sequence in sequences]).tolist()
            inputs["bad_words_list"] = [ids, ends + [-1] * (len(ids) - len(ends))]
        return inputs

    def _response(self, text: str, reason: str, perf: dict[str, int]) -> Any:
        tensor = self._pb.Tensor
        outputs = [
            tensor("text_output", np.array([[text]], np.object_)),
            tensor("finish_reason", np.array([[reason]], np.object_)),
            *perf_tensors(tensor, perf),
        ]
        return self._pb.InferenceResponse(output_tensors=outputs)

    def _reload_token_model(self) -> None:
        """Triton 2.51 does not start a decoupled model's process anew after it died, so it is loaded again."""
        self._pb.Logger.log_warn("the process of tensorrt_llm was lost: loading the model again")
        try:
            self._pb.unload_model(model_name="tensorrt_llm")
            self._pb.load_model(model_name="tensorrt_llm")
        except Exception as error:
            self._pb.Logger.log_error(f"tensorrt_llm could not be loaded again: {error}")
        finally:
            self._reloading = False
