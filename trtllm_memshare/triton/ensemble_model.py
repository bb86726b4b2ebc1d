"""Triton's model `ensemble`: text in, text out, as TensorRT-LLM's clients expect it.

It calls the executor in the process of `tensorrt_llm` over a Unix socket and not through BLS: with many requests at a
time decoupled BLS calls bring Triton's stub down (see ``loop``), and each token would pass through the server twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from transformers import AutoTokenizer

from trtllm_memshare.triton.client import ServiceClient
from trtllm_memshare.triton.events import TokenEvent
from trtllm_memshare.triton.model_base import ServingModel
from trtllm_memshare.triton.model_configs import parameters_of
from trtllm_memshare.triton.request_metrics import OutcomeCounter
from trtllm_memshare.triton.runtime import socket_path
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.text_service import TextLimits, TextService, parse_text_request


class EnsembleModel(ServingModel):
    """What Triton's ``TritonPythonModel`` does, with its utilities handed in; see ``ServingModel``."""

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        super().__init__(pb_utils, args, "text")
        parameters = self.parameters
        self._exclude_input = parameters["exclude_input_in_output"] == "true"
        names = ("max_prompt_tokens", "max_prompt_bytes", "max_requests")
        self._limits = TextLimits(*(int(parameters[name]) for name in names))
        self._outcomes = OutcomeCounter(self.registry)
        tokenizer = AutoTokenizer.from_pretrained(parameters["tokenizer_dir"], local_files_only=True)
        self._service = TextService(tokenizer, self._limits, ServiceClient(socket_path()).submit, self._outcomes)
        self.start()

    @classmethod
    def prepare(cls, args: dict[str, str]) -> None:
        """Loads the tokenizer, for all that this imports."""
        AutoTokenizer.from_pretrained(parameters_of(args)["tokenizer_dir"], local_files_only=True)

    def outcomes(self) -> OutcomeCounter:
        return self._outcomes

    async def answer(self, tensors: RequestTensors, label: str) -> AsyncGenerator[TokenEvent, None]:
        try:
            request = parse_text_request(tensors, self._limits, self._exclude_input)
        except Exception as error:
            self._outcomes.count_error(error)
            raise
        async for event in self._service.answer(request):
            yield event

    def stop(self, label: str) -> None:
        """Text requests are ended by cancelling them; `stop` is an input of `tensorrt_llm` alone."""
