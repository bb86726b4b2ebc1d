"""What the models that answer over time share: Triton's side of a request, from its tensors to its last response."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry

from trtllm_memshare.errors import UserError
from trtllm_memshare.triton.events import QueueFullError, ServiceLostError, TokenEvent
from trtllm_memshare.triton.inputs import check_neutral, check_parameters
from trtllm_memshare.triton.loop import LoopThread
from trtllm_memshare.triton.model_configs import parameters_of
from trtllm_memshare.triton.outputs import joined, merged, output_tensors
from trtllm_memshare.triton.reply import Reply
from trtllm_memshare.triton.request_metrics import OutcomeCounter
from trtllm_memshare.triton.runtime import give_sign_of_life
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.triton_log import TritonLog
from trtllm_memshare.triton.triton_metrics import TritonMirror

_LIFE_S = 1.0  # between signs of life


class ServingModel(ABC):
    """A model whose requests run on an asyncio loop; ``execute`` returns before any token is there.

    Decoupled or not is the configuration's. Decoupled, each response holds one sequence, with ``batch_index`` and
    ``sequence_index`` where there are several, as TensorRT-LLM sends them. Otherwise one response holds all.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      args: as ``initialize`` gets them.
      level: ``text`` or ``token``: whose names the inputs have.
    """

    def __init__(self, pb_utils: Any, args: dict[str, str], level: str) -> None:
        self.pb, self._level = pb_utils, level
        self._log = TritonLog(pb_utils.Logger)
        config = json.loads(args["model_config"])
        self.parameters = parameters_of(args)
        self._decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        self._poll_s = int(self.parameters["cancellation_check_period_ms"]) / 1e3
        self._stats_s = int(self.parameters["stats_check_period_ms"]) / 1e3
        self._name = str(args["model_name"])
        self.registry = CollectorRegistry()
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._mirror = TritonMirror(pb_utils, self.registry, labels)
        self.loop = LoopThread(f"memshare-{args['model_name']}")
        self._closing = asyncio.Event()

    @classmethod
    @abstractmethod
    def prepare(cls, args: dict[str, str]) -> None:
        """What a spare server does before its turn, see ``wait_for_turn``."""

    @abstractmethod
    def outcomes(self) -> OutcomeCounter:
        """Where requests are counted that are refused here."""

    @abstractmethod
    def answer(self, tensors: RequestTensors, label: str) -> AsyncGenerator[TokenEvent, None]:
        """Events of one prompt."""

    @abstractmethod
    def stop(self, label: str) -> None:
        """Ends the requests that have this id."""

    def look(self) -> None:  # noqa: B027 - most models have nothing to look at
        """Called once in a statistics period."""

    def is_moving(self) -> bool:
        """Whether there was a step since the last call, or nothing to do; called once in ``_LIFE_S``."""
        return True

    def start(self) -> None:
        """For the end of a subclass's ``__init__``: begins to show metrics and signs of life."""
        self.loop.start(self._watch())
        give_sign_of_life(self._name)  # before the server is ready: one that never comes is noticed too
        self.loop.start(self._live())

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to the loop."""
        for request in requests:
            reply = Reply(self.pb, request.get_response_sender())
            parameters = list(json.loads(request.parameters() or "{}"))
            self.loop.start(self._handle(request.request_id(), RequestTensors.of(request), parameters, reply))

    def finalize(self) -> None:
        """Lets requests in flight end."""
        self.loop.loop.call_soon_threadsafe(self._closing.set)
        self.loop.stop()
        self._mirror.close()
        self._log.close()

    async def _handle(self, label: str, tensors: RequestTensors, parameters: list[str], reply: Reply) -> None:
        serving = asyncio.ensure_future(self._serve(label, tensors, parameters, reply))
        codes = self.pb.TritonError
        try:
            # Asked on this thread and between responses, never beside one.
            while not (await asyncio.wait({serving}, timeout=self._poll_s))[0]:
                if reply.is_cancelled():
                    serving.cancel()
            await serving
        except asyncio.CancelledError:
            reply.fail("the client has cancelled the request", codes.CANCELLED)
        except (QueueFullError, ServiceLostError) as error:
            reply.fail(str(error), codes.UNAVAILABLE)
        except UserError as error:
            reply.fail(str(error))
        except Exception as error:
            reply.fail(f"the request failed: {type(error).__name__}: {error}", codes.INTERNAL)

    async def _serve(self, label: str, tensors: RequestTensors, parameters: list[str], reply: Reply) -> None:
        if self._level == "token" and tensors.flag("stop", False):
            self.stop(label)
            reply.end(None if self._decoupled else self.pb.InferenceResponse([]))
            return
        try:
            rows = self._rows(tensors, parameters)
            log_probs = any(row.flag("return_log_probs", False) for row in rows)
        except UserError as error:
            self.outcomes().count_error(error)
            raise
        several = [row.number("num_return_sequences", 1, -(2**31), 2**31) > 1 for row in rows]
        prompts = [self.answer(row, label) for row in rows]
        held: list[dict[int, list[TokenEvent]]] = [{} for _ in rows]
        so_far = defaultdict[tuple[int, int], list[float]](list)
        async with aclosing(merged(prompts)) as events:
            async for row, event, is_last in events:
                if self._decoupled:
                    # TensorRT-LLM streams new tokens, but the log-probabilities of all so far.
                    so_far[row, event.sequence_index] += event.log_probs
                    outputs = output_tensors(
                        self.pb.Tensor,
                        [[replace(event, log_probs=so_far[row, event.sequence_index])]],
                        log_probs,
                        row if len(rows) > 1 else None,
                        event.sequence_index if several[row] else None,
                    )
                    (reply.end if is_last else reply.send)(self.pb.InferenceResponse(output_tensors=outputs))
                else:
                    held[row].setdefault(event.sequence_index, []).append(event)
        if not self._decoupled:
            answers = [[joined(found[index]) for index in sorted(found)] for found in held]
            reply.end(self.pb.InferenceResponse(output_tensors=output_tensors(self.pb.Tensor, answers, log_probs)))

    def _rows(self, tensors: RequestTensors, parameters: list[str]) -> list[RequestTensors]:
        """One set of inputs for each prompt, checked as far as a batch can be."""
        check_parameters(parameters, self._level)
        check_neutral(tensors.arrays, self._level)
        rows = tensors.rows("text_input" if self._level == "text" else "input_ids")
        streams = "stream" if self._level == "text" else "streaming"
        if not self._decoupled and any(row.flag(streams, False) for row in rows):
            raise UserError(
                f"{streams} needs a repository built with --decoupled, and this one was built with --no-decoupled"
            )
        if not self._decoupled and len({row.scalar("num_return_sequences") for row in rows}) > 1:
            raise UserError("num_return_sequences must be the same for all prompts of a batch")
        return rows

    async def _watch(self) -> None:
        while not await self._is_closing(within_s=self._stats_s):
            self.look()
            self._mirror.update()

    async def _live(self) -> None:
        while not await self._is_closing(within_s=_LIFE_S):
            if self.is_moving():
                give_sign_of_life(self._name)

    async def _is_closing(self, within_s: float) -> bool:
        try:
            await asyncio.wait_for(self._closing.wait(), within_s)
        except asyncio.TimeoutError:
            return False
        return True
