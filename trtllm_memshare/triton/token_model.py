"""Triton's model `tensorrt_llm`: token ids in, token ids out, over the one executor of the deployment.

Each python model instance is a process of its own, so this one owns the executor (instance count 1). ``execute`` hands
requests to an asyncio loop and returns; `ensemble` reaches the same executor over a Unix socket.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.triton.loop import LoopThread
from trtllm_memshare.triton.metrics import TritonMetrics, gauge_values
from trtllm_memshare.triton.reply import Reply
from trtllm_memshare.triton.service import ExecutorService, QueueFullError, SocketServer, TokenEvent, socket_path
from trtllm_memshare.triton.tensors import RequestTensors, perf_tensors
from trtllm_memshare.triton.token_requests import Limits


class TokenModel:
    """What Triton's ``TritonPythonModel`` does, with its utilities handed in.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      args: as ``initialize`` gets them.
    """

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        self._pb = pb_utils
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        engine = load_engine(Path(parameters["engine_dir"]))
        build = engine.build
        blocks = int(parameters["max_tokens_in_paged_kv_cache"]) // build.tokens_per_block
        self._executor, description = make_executor(engine, blocks, parameters["batch_scheduler_policy"])
        limits = Limits(
            min(int(parameters["max_prompt_tokens"]), build.max_seq_len - 1),
            min(int(parameters["max_output_tokens"]), build.max_seq_len - 1),
            int(parameters["max_queue_size"]) + build.max_batch_size,
            engine.vocab_size,
        )
        pb_utils.Logger.log_info(f"{engine.engine_dir}: {blocks} KV blocks, {description}; {limits}")
        self._max_batch_size, self._bytes_per_block = build.max_batch_size, engine.bytes_per_block
        self._metrics = TritonMetrics(pb_utils, {"model": args["model_name"], "version": args["model_version"]})
        self._service = ExecutorService(
            self._executor,
            limits,
            engine.stop_token_ids,
            build.tokens_per_block,
            parameters["exclude_input_in_output"] == "true",
        )
        self._replies: dict[object, Reply] = {}
        self._executor.__enter__()
        self._loop = LoopThread("memshare-triton")
        self._socket = SocketServer(self._service, socket_path())
        self._loop.run(self._socket.start())
        self._closing = asyncio.Event()
        for key, look in (
            ("cancellation_check_period_ms", self._look_for_cancelled),
            ("stats_check_period_ms", self._update_metrics),
        ):
            self._loop.start(self._every(int(parameters[key]) / 1e3, look))

    def execute(self, requests: list[Any]) -> None:
        """Hands each request to the loop and returns before any token is there."""
        for request in requests:
            reply, tensors = Reply(self._pb, request.get_response_sender()), RequestTensors.of(request)
            # Without an id of its own a request cannot be stopped by another one.
            self._loop.start(self._answer(request.request_id() or object(), tensors, reply))

    def finalize(self) -> None:
        """Lets requests in flight end, then frees everything."""
        self._loop.run(self._socket.stop())
        self._executor.__exit__()
        self._loop.loop.call_soon_threadsafe(self._closing.set)
        self._loop.stop()
        self._metrics.close()

    async def _answer(self, key: object, tensors: RequestTensors, reply: Reply) -> None:
        try:
            if tensors.flag("stop", False):
                self._service.cancel(key)
                reply.end()
                return
            self._replies[key] = reply
            async with aclosing(self._service.generate(key, tensors)) as events:
                async for event in events:
                    (reply.end if event.finish_reason else reply.send)(self._response(event))
        except QueueFullError as error:
            reply.fail(str(error), self._pb.TritonError.UNAVAILABLE)
        except UserError as error:
            reply.fail(str(error))
        except Exception as error:
            reply.fail(f"the request failed: {type(error).__name__}: {error}", self._pb.TritonError.INTERNAL)
        finally:
            self._replies.pop(key, None)

    def _response(self, event: TokenEvent) -> Any:
        tensor = self._pb.Tensor
        outputs = [
            tensor("output_ids", np.array([[event.token_ids]], np.int32)),
            tensor("sequence_length", np.array([[len(event.token_ids)]], np.int32)),
            tensor("finish_reason", np.array([[event.finish_reason]], np.object_)),
            *perf_tensors(tensor, event.perf),
        ]
        return self._pb.InferenceResponse(output_tensors=outputs)

    def _look_for_cancelled(self) -> None:
        for key, reply in list(self._replies.items()):
            if reply.is_cancelled():
                self._service.cancel(key)

    def _update_metrics(self) -> None:
        status = self._executor.status()
        self._metrics.update(gauge_values(status, self._max_batch_size, self._bytes_per_block), status.refused)

    async def _every(self, period: float, look: Any) -> None:
        while not self._closing.is_set():
            look()
            try:
                await asyncio.wait_for(self._closing.wait(), period)
            except asyncio.TimeoutError:
                continue


def make_executor(engine: Engine, num_blocks: int, policy: str) -> tuple[Executor, str]:
    """An executor over an engine directory and what it runs on: a GPU if there is one.

    Raises:
      UserError: a pool too small for the engine's longest request.
    """
    size, longest = engine.build.tokens_per_block, engine.build.max_seq_len
    if num_blocks < -(-longest // size):
        raise UserError(
            f"the KV pool must hold one request of max_seq_len {longest}: {-(-longest // size)} blocks, got "
            f"{num_blocks} (raise --kv-cache-blocks)"
        )
    runner = open_runner(engine, num_blocks)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir, local_files_only=True)
    executor = Executor(
        runner,
        engine.memshare,
        BoundaryTokens.from_tokenizer(tokenizer, engine.vocab_size),
        longest,
        engine.build.max_batch_size,
        engine.build.max_num_tokens,
        policy,
    )
    return executor, f"{runner.decode_description}, block distances: {runner.search.description}"
