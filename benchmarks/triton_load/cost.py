"""The same requests for a Triton server and for an executor alone: time to first token, rate, and CPU time of both."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import psutil

from benchmarks.triton_load.executor_alone import ExecutorAlone
from benchmarks.triton_load.server import TritonServer, cpu_seconds
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.triton.client import ServiceClient

Ask = Callable[[DatasetItem, str, int, bool], Awaitable[float]]
"""One request: its item, its text, tokens to write, whether to stream. Returns the seconds to its first output."""


@dataclass(frozen=True)
class Round:
    """One side in one round.

    Attributes:
      ttft_ms: median of single requests, streamed.
      req_s: rate with many clients, not streamed.
      server_cpu_ms: CPU time of the server for one of those requests.
      client_cores: what the load took meanwhile, in cores.
    """

    ttft_ms: float
    req_s: float
    server_cpu_ms: float
    client_cores: float


class Triton:
    """The Triton side; text goes in and comes out."""

    def __init__(self, server: TritonServer) -> None:
        self.cpu_s = server.cpu_s
        self._url = f"{server.url}/v2/models/ensemble"

    async def __aenter__(self) -> Ask:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._ask

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _ask(self, item: DatasetItem, text: str, num_tokens: int, streams: bool) -> float:
        inputs = {"text_input": text, "max_tokens": num_tokens, "stream": streams}
        endpoint = "generate_stream" if streams else "generate"
        started = time.perf_counter()
        async with self._session.post(f"{self._url}/{endpoint}", json=inputs) as response:
            await response.content.readline()
            seconds = time.perf_counter() - started
            await response.read()
            if response.status != 200:
                raise UserError(f"a request failed with {response.status} (the server's log says why)")
        return seconds


class Alone:
    """The executor's side; token ids go in and come out."""

    def __init__(self, executor: ExecutorAlone) -> None:
        self.cpu_s = executor.cpu_s
        self._path = executor.path

    async def __aenter__(self) -> Ask:
        self._client = ServiceClient(self._path)
        return self._ask

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def _ask(self, item: DatasetItem, text: str, num_tokens: int, streams: bool) -> float:
        started, seconds = time.perf_counter(), 0.0
        inputs = {"input_ids": item.input_ids, "request_output_len": num_tokens, "streaming": streams}
        call = await self._client.submit(inputs)
        async for _ in call.events():
            seconds = seconds or time.perf_counter() - started
        return seconds


async def run_round(
    side: Triton | Alone, items: list[DatasetItem], texts: list[str], clients: int, singles: int
) -> Round:
    """``singles`` requests one by one, then all items with so many clients at a time."""
    async with side as ask:
        first = [await ask(items[i % len(items)], texts[i % len(items)], 1, True) for i in range(singles)]
        places, me = asyncio.Semaphore(clients), psutil.Process()

        async def one(item: DatasetItem, text: str) -> None:
            async with places:
                await ask(item, text, item.output_tokens, False)

        began, own, served = time.perf_counter(), cpu_seconds(me), side.cpu_s()
        await asyncio.gather(*(one(item, text) for item, text in zip(items, texts, strict=True)))
        seconds = time.perf_counter() - began
        return Round(
            statistics.median(first) * 1e3,
            len(items) / seconds,
            (side.cpu_s() - served) / len(items) * 1e3,
            (cpu_seconds(me) - own) / seconds,
        )


def summary(alone: list[Round], triton: list[Round]) -> dict[str, Any]:
    """Medians over the rounds; what Triton adds is taken from each pair of rounds, since the machine drifts."""
    pairs = list(zip(alone, triton, strict=True))
    medians = {
        name: {key: statistics.median(asdict(r)[key] for r in rounds) for key in asdict(rounds[0])}
        for name, rounds in (("executor", alone), ("triton", triton))
    }
    return {
        **medians,
        "ttft_added_ms": statistics.median(t.ttft_ms - a.ttft_ms for a, t in pairs),
        "throughput_ratio": statistics.median(t.req_s / a.req_s for a, t in pairs),
        "cpu_ratio": statistics.median(t.server_cpu_ms / a.server_cpu_ms for a, t in pairs),
        "rounds": [{"executor": asdict(a), "triton": asdict(t)} for a, t in pairs],
    }
