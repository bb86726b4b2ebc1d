"""Triton's model `tensorrt_llm`: token ids in, token ids out, over the one executor of the deployment.

Each python model instance is a process of its own, so this one owns the executor (instance count 1); `ensemble` reaches
the same executor over a Unix socket.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.triton.events import TokenEvent
from trtllm_memshare.triton.metrics import ExecutorCollector
from trtllm_memshare.triton.model_base import ServingModel
from trtllm_memshare.triton.model_configs import parameters_of
from trtllm_memshare.triton.pool_size import check_one_fits
from trtllm_memshare.triton.repository import memory_share_of
from trtllm_memshare.triton.request_metrics import RequestMetrics
from trtllm_memshare.triton.runtime import socket_path
from trtllm_memshare.triton.service import ExecutorService
from trtllm_memshare.triton.socket_server import SocketServer
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.token_requests import Limits

_ANSWER_S = 1.0  # between an executor's failure and the end of its process, for the errors to get out


class TokenModel(ServingModel):
    """What Triton's ``TritonPythonModel`` does, with its utilities handed in; see ``ServingModel``."""

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        super().__init__(pb_utils, args, "token")
        parameters = self.parameters
        engine = load_engine(Path(parameters["engine_dir"]))
        build = engine.build
        blocks = int(parameters["max_tokens_in_paged_kv_cache"]) // build.tokens_per_block
        self._executor, description = make_executor(
            engine, blocks, parameters["batch_scheduler_policy"], memory_share_of(parameters)
        )
        limits = Limits(
            min(int(parameters["max_prompt_tokens"]), build.max_seq_len - 1),
            min(int(parameters["max_output_tokens"]), build.max_seq_len - 1),
            int(parameters["max_requests"]),
            engine.vocab_size,
        )
        pb_utils.Logger.log_info(f"{engine.engine_dir}: {description}; {limits}")
        self._outcomes = RequestMetrics(self.registry)
        self.registry.register(ExecutorCollector(self._executor.status, build.max_batch_size, engine.bytes_per_block))
        self._service = ExecutorService(
            self._executor,
            limits,
            engine.stop_token_ids,
            build.tokens_per_block,
            parameters["exclude_input_in_output"] == "true",
            self._outcomes,
        )
        self._executor.__enter__()
        self._socket = SocketServer(self._service, socket_path())
        self.loop.run(self._socket.start())
        self._is_ending = False
        self._last_step = -1
        self.start()

    @classmethod
    def prepare(cls, args: dict[str, str]) -> None:
        """Reads the engine's files, for all that this imports; no weights."""
        load_engine(Path(parameters_of(args)["engine_dir"]))

    def outcomes(self) -> RequestMetrics:
        return self._outcomes

    def answer(self, tensors: RequestTensors, label: str) -> AsyncGenerator[TokenEvent, None]:
        return self._service.answer(tensors, label)

    def stop(self, label: str) -> None:
        self._service.stop(label)

    def is_moving(self) -> bool:
        status = self._executor.status()
        moved = status.num_steps != self._last_step or not status.num_active + status.num_waiting
        self._last_step = status.num_steps
        return moved

    def look(self) -> None:
        """An executor that cannot go on takes its process with it: the launcher then starts the server anew."""
        if not (self._executor.is_alive or self._is_ending):
            self._is_ending = True
            self.pb.Logger.log_error("the executor has failed, or its step does not end: its process ends")
            threading.Timer(_ANSWER_S, os._exit, (1,)).start()

    def finalize(self) -> None:
        """Lets requests in flight end, then frees everything."""
        self.loop.run(self._socket.stop())
        self._executor.__exit__()
        super().finalize()


def make_executor(
    engine: Engine, num_blocks: int, policy: str, free_memory_share: float | None = None
) -> tuple[Executor, str]:
    """An executor over an engine directory and what it runs on: a GPU if there is one.

    Args:
      num_blocks: of the pool. ``free_memory_share``: see ``blocks_that_fit``.

    Raises:
      UserError: a pool too small for the engine's longest request.
    """
    check_one_fits(engine, num_blocks)
    runner = open_runner(engine, num_blocks, free_memory_share=free_memory_share)
    if runner.num_blocks < num_blocks:
        check_one_fits(engine, runner.num_blocks, free_memory_share)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir, local_files_only=True)
    executor = Executor(
        runner,
        engine.memshare,
        BoundaryTokens.from_tokenizer(tokenizer, engine.vocab_size),
        engine.build.max_seq_len,
        engine.build.max_batch_size,
        engine.build.max_num_tokens,
        policy,
    )
    return (
        executor,
        f"{runner.num_blocks} KV blocks, {runner.decode_description}, block distances: {runner.search.description}",
    )
