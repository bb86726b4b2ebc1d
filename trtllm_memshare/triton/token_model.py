"""Triton's model `tensorrt_llm`: token ids in, token ids out, over the one executor of the deployment.

Each python model instance is a process of its own, so this one owns the executor (instance count 1). ``execute``
submits and returns; responses go out from a few threads as tokens arrive.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_memshare.engine.engine_dir import Engine, load_engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import RequestHandle, RequestResult
from trtllm_memshare.triton.metrics import TritonMetrics, gauge_values
from trtllm_memshare.triton.tensors import RequestTensors
from trtllm_memshare.triton.token_requests import Limits, TokenRequest, parse_token_request


class TokenModel:
    """What Triton's ``TritonPythonModel`` does, with its utilities handed in.

    Args:
      pb_utils: Triton's ``triton_python_backend_utils``.
      args: as ``initialize`` gets them.
    """

    def __init__(self, pb_utils: Any, args: dict[str, str]) -> None:
        self._pb = pb_utils
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        engine = load_engine(Path(parameters["engine_dir"]))
        self._stop_token_ids = engine.stop_token_ids
        self._exclude_input = parameters["exclude_input_in_output"] == "true"
        self._poll_s = int(parameters["cancellation_check_period_ms"]) / 1e3
        self._stats_s = int(parameters["stats_check_period_ms"]) / 1e3
        blocks = int(parameters["max_tokens_in_paged_kv_cache"]) // engine.build.tokens_per_block
        self._executor, description = make_executor(engine, blocks, parameters["batch_scheduler_policy"])
        self._limits = Limits(
            min(int(parameters["max_prompt_tokens"]), engine.build.max_seq_len - 1),
            min(int(parameters["max_output_tokens"]), engine.build.max_seq_len - 1),
            int(parameters["max_queue_size"]) + engine.build.max_batch_size,
            engine.vocab_size,
        )
        pb_utils.Logger.log_info(f"{engine.engine_dir}: {blocks} KV blocks, {description}; {self._limits}")
        self._max_batch_size, self._bytes_per_block = engine.build.max_batch_size, engine.bytes_per_block
        self._tokens_per_block = engine.build.tokens_per_block
        self._active: dict[RequestHandle, tuple[str, Any]] = {}  # request id, response sender
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._metrics = TritonMetrics(pb_utils, {"model": args["model_name"], "version": args["model_version"]})
        # One thread waits for each request; idle ones cost nothing but a stack.
        self._responders = ThreadPoolExecutor(self._limits.max_requests, "memshare-respond")
        self._watchers = [
            threading.Thread(target=self._every, args=(period, action), daemon=True)
            for period, action in ((self._poll_s, self._look_for_cancelled), (self._stats_s, self._update_metrics))
        ]
        self._executor.__enter__()
        for watcher in self._watchers:
            watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Submits each request, or answers it with the error; returns before any token is there."""
        for request in requests:
            sender, arrived = request.get_response_sender(), time.time_ns()
            try:
                tensors = RequestTensors.of(request)
                if tensors.flag("stop", False):
                    self._cancel(request.request_id())
                    sender.send(flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                    continue
                if len(self._active) >= self._limits.max_requests:
                    self._send_error(
                        sender,
                        f"the queue is full: {self._limits.max_requests} requests are in the system, the limit of "
                        f"max_queue_size plus the engine's batch size (try again later)",
                        self._pb.TritonError.UNAVAILABLE,
                    )
                    continue
                parsed = parse_token_request(tensors, self._limits, self._stop_token_ids, self._exclude_input)
                handle = self._executor.submit(parsed.input_ids, parsed.params)
            except UserError as error:
                self._send_error(sender, str(error), self._pb.TritonError.INVALID_ARG)
                continue
            with self._lock:
                self._active[handle] = request.request_id(), sender
            self._responders.submit(self._respond, handle, parsed, sender, arrived)

    def finalize(self) -> None:
        """Lets requests in flight end, then frees everything."""
        self._executor.__exit__()
        self._responders.shutdown()
        self._closing.set()
        for watcher in self._watchers:
            watcher.join()
        self._metrics.close()

    def _respond(self, handle: RequestHandle, parsed: TokenRequest, sender: Any, arrived: int) -> None:
        """Sends what a request generates, in one piece or as it comes, and the final flag."""
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            pending = list(parsed.input_ids) if parsed.echo_input else []
            if parsed.streaming:
                for tokens in handle.batches():
                    sender.send(self._response(pending + tokens, ""))
                    pending = []
            result = handle.result()
            ids = pending if parsed.streaming else pending + result.token_ids
            more = self._perf_metrics(result, arrived) if parsed.perf_metrics else []
            sender.send(self._response(ids, result.finish_reason, more), flags=final)
        except Exception as error:
            handle.cancel()
            self._send_error(sender, f"request {handle.request_id} failed: {error}", self._pb.TritonError.INTERNAL)
        finally:
            with self._lock:
                self._active.pop(handle, None)

    def _response(self, token_ids: list[int], finish_reason: str, more: Sequence[Any] = ()) -> Any:
        tensor = self._pb.Tensor
        outputs = [
            tensor("output_ids", np.array([[token_ids]], np.int32)),
            tensor("sequence_length", np.array([[len(token_ids)]], np.int32)),
            tensor("finish_reason", np.array([[finish_reason]], np.object_)),
        ]
        return self._pb.InferenceResponse(output_tensors=[*outputs, *more])

    def _perf_metrics(self, result: RequestResult, arrived: int) -> list[Any]:
        """Counts and times of a finished request. ``arrived``: nanoseconds since the epoch."""
        stats = result.stats
        allocated = -(-(stats.num_prompt_tokens + stats.num_output_tokens) // self._tokens_per_block)
        counts = {
            "num_input_tokens": stats.num_prompt_tokens,
            "num_output_tokens": stats.num_output_tokens,
            "kv_cache_alloc_new_blocks": allocated,
            "kv_cache_reused_blocks": 0,
            "kv_cache_alloc_total_blocks": allocated,
            "memshare_shared_blocks": stats.sharing.retired_blocks,
        }
        times = {
            "arrival_time_ns": arrived,
            "first_token_time_ns": arrived + int(stats.ttft_s * 1e9),
            "last_token_time_ns": arrived + int(stats.latency_s * 1e9),
        }
        tensor = self._pb.Tensor
        return [tensor(name, np.array([[value]], np.int32)) for name, value in counts.items()] + [
            tensor(name, np.array([[value]], np.int64)) for name, value in times.items()
        ]

    def _send_error(self, sender: Any, message: str, code: int) -> None:
        """Answers with an error; a client that has gone away is not worth another one."""
        error = self._pb.TritonError(message, code)
        try:
            sender.send(self._pb.InferenceResponse(error=error), flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as failure:
            self._pb.Logger.log_warn(f"could not send '{message}': {failure}")

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            for handle, (known, _) in self._active.items():
                if known == request_id and request_id:
                    handle.cancel()

    def _look_for_cancelled(self) -> None:
        with self._lock:
            active = list(self._active.items())
        for handle, (_, sender) in active:
            if sender.is_cancelled():
                handle.cancel()

    def _update_metrics(self) -> None:
        status = self._executor.status()
        self._metrics.update(gauge_values(status, self._max_batch_size, self._bytes_per_block), status.refused)

    def _every(self, period: float, action: Any) -> None:
        while not self._closing.wait(period):
            action()


def make_executor(engine: Engine, num_blocks: int, policy: str) -> tuple[Executor, str]:
    """An executor over an engine directory and what it runs on: a GPU if there is one.

    Raises:
      UserError: a pool too small for the engine's longest request.
    """
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, longest = engine.build.tokens_per_block, engine.build.max_seq_len
    if num_blocks < -(-longest // size):
        raise UserError(
            f"the KV pool must hold one request of max_seq_len {longest}: {-(-longest // size)} blocks, got "
            f"{num_blocks} (raise --kv-cache-blocks)"
        )
    runner = TorchRunner(load_model(engine.model_dir, device), num_blocks, size, getattr(torch, engine.kv_dtype))
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
