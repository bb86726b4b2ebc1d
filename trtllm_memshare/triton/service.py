"""The executor behind the model `tensorrt_llm`: takes requests from Triton and from `ensemble`, answers as tokens come.

All of it runs on one asyncio loop; the executor computes in a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_memshare.errors import UserError
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import RequestHandle, RequestResult
from trtllm_memshare.triton.loop import TokenStream
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.token_requests import Limits, parse_token_request

MAX_MESSAGE_BYTES = 64 << 20


def socket_path() -> Path:
    """Where the two models of one server meet: named after the server, the parent of both of their processes."""
    return Path(tempfile.gettempdir()) / f"memshare-{os.getuid()}" / f"executor-{os.getppid()}.sock"


class QueueFullError(UserError):
    """The deployment's limit of requests in the system is reached."""


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of a request; the last event has a finish reason. ``perf``: counts and times, at the end if asked."""

    token_ids: list[int]
    finish_reason: str = ""
    perf: dict[str, int] = field(default_factory=dict)


class ExecutorService:
    """Runs requests within the limits of the deployment.

    Args:
      executor: running.
      limits: of the deployment.
      stop_token_ids: the model's.
      tokens_per_block: of the pool.
      exclude_input: see ``parse_token_request``.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        stop_token_ids: tuple[int, ...],
        tokens_per_block: int,
        exclude_input: bool,
    ) -> None:
        self._executor, self._limits = executor, limits
        self._stop_token_ids, self._tokens_per_block, self._exclude_input = (
            stop_token_ids, tokens_per_block, exclude_input)  # fmt: skip
        self._active: dict[object, RequestHandle] = {}

    async def generate(self, key: object, tensors: RequestTensors) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request. Leaving early cancels it.

        Args:
          key: what ``cancel`` will know it by.
          tensors: inputs of the model `tensorrt_llm`.

        Raises:
          QueueFullError: too many requests are in the system.
          UserError: see ``parse_token_request`` and ``Executor.submit``.
          RuntimeError: the executor stopped.
        """
        arrived = time.time_ns()
        limit = self._limits.max_requests
        if len(self._active) >= limit:
            raise QueueFullError(
                f"the queue is full: {limit} requests are in the system, the limit of max_queue_size plus the engine's "
                f"batch size (try again later)"
            )
        request = parse_token_request(tensors, self._limits, self._stop_token_ids, self._exclude_input)
        if request.group is not None and self._executor.config.scope != "group":
            raise UserError(
                f"memshare_group needs an engine whose memshare.json has scope group, got scope "
                f"{self._executor.config.scope} (build the engine with that setting, or leave memshare_group out)"
            )
        stream = TokenStream(request.streaming)
        handle = self._executor.submit(request.input_ids, request.params, request.group, stream.listener)
        self._active[key] = handle
        held = list(request.input_ids) if request.echo_input else []
        try:
            async for tokens in stream.batches(handle):
                held += tokens
                if request.streaming and not handle.future.done():
                    yield TokenEvent(held)
                    held = []
            result = handle.result()
            yield TokenEvent(held, result.finish_reason, self._perf(result, arrived) if request.perf_metrics else {})
        finally:
            self._active.pop(key, None)
            if not handle.future.done():
                handle.cancel()

    def cancel(self, key: object) -> None:
        """Ends a request at its next step; unknown keys are ignored."""
        if (handle := self._active.get(key)) is not None:
            handle.cancel()

    def _perf(self, result: RequestResult, arrived: int) -> dict[str, int]:
        """Counts, and times in nanoseconds since the epoch, under TensorRT-LLM's names."""
        stats = result.stats
        allocated = -(-(stats.num_prompt_tokens + stats.num_output_tokens) // self._tokens_per_block)
        return {
            "num_input_tokens": stats.num_prompt_tokens,
            "num_output_tokens": stats.num_output_tokens,
            "kv_cache_alloc_new_blocks": allocated,
            "kv_cache_reused_blocks": 0,
            "kv_cache_alloc_total_blocks": allocated,
            "memshare_shared_blocks": stats.sharing.retired_blocks,
            "arrival_time_ns": arrived,
            "first_token_time_ns": arrived + int(stats.ttft_s * 1e9),
            "last_token_time_ns": arrived + int(stats.latency_s * 1e9),
        }


class SocketServer:
    """Serves an ``ExecutorService`` on a Unix socket, one JSON object a line.

    A client sends ``{"id": 1, "inputs": {...}}`` or ``{"id": 1, "cancel": true}`` and gets ``{"id": 1, "token_ids":
    [...], "finish_reason": "", "perf": {}}`` or ``{"id": 1, "error": "...", "queue_full": false, "user": true}``. When
    it goes away its requests are cancelled.

    Args:
      service: what answers.
      path: of the socket; its folder is made accessible to this user only.
    """

    def __init__(self, service: ExecutorService, path: Path) -> None:
        self._service, self._path = service, path
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens; a socket that an earlier process left behind is replaced."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_MESSAGE_BYTES)

    async def stop(self) -> None:
        """Stops listening; connections end with their clients."""
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                message = json.loads(line)
                key = (id(writer), message["id"])
                if message.get("cancel"):
                    self._service.cancel(key)
                    continue
                task = asyncio.create_task(self._answer(key, message, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (asyncio.CancelledError, ConnectionError):
            pass  # this process stops, or the client's was killed
        finally:
            for task in tasks:
                task.cancel()
            writer.close()

    async def _answer(self, key: tuple[int, int], message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        def send(**fields: Any) -> None:
            writer.write(json.dumps({"id": key[1], **fields}).encode() + b"\n")

        inputs = RequestTensors({name: np.asarray(value) for name, value in message["inputs"].items()})
        try:
            async with aclosing(self._service.generate(key, inputs)) as events:
                async for event in events:
                    send(token_ids=event.token_ids, finish_reason=event.finish_reason, perf=event.perf)
                    await writer.drain()
        except UserError as error:
            send(error=str(error), queue_full=isinstance(error, QueueFullError), user=True)
        except (RuntimeError, ValueError) as error:
            send(error=f"{type(error).__name__}: {error}", queue_full=False, user=False)
