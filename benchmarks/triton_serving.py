"""What Triton costs over the executor alone.

Two servers over the same engine: Triton (the CPU build inside nvidia-pytriton unless another is found), and an executor
in a process of its own behind a Unix socket, without Triton and without text. This process is the load for both, with
the same number of clients; its CPU time is reported. Several rounds, the two in turn: time to first token of single
requests (streamed), and requests per second of a full load (not streamed). Text in and out is part of Triton's side.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from benchmarks.triton_processes import ExecutorProcess, Server
from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.dataset import DatasetItem, read_dataset
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.triton.client import ServiceClient


class Load:
    """The same requests for both servers.

    Args:
      server, executor: what is loaded.
      items, prompts: requests as token ids and as text.
      concurrency: clients at a time.
    """

    def __init__(
        self, server: Server, executor: ExecutorProcess, items: list[DatasetItem], prompts: list[str], concurrency: int
    ) -> None:
        self._server, self._executor, self._items, self._prompts = server, executor, items, prompts
        self._concurrency = concurrency

    def first_token_ms(self, name: str, count: int) -> float:
        """Median milliseconds from request to first output, of single requests."""
        if name == "executor":
            return statistics.median(asyncio.run(self._executor_first_tokens(count)))
        times = []
        for index in range(count):
            prompt, started = self._prompts[index % len(self._prompts)], time.perf_counter()
            with self._server.request("generate_stream", text_input=prompt, max_tokens=1, stream=True) as response:
                response.readline()
                times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)

    def requests_per_second(self, name: str) -> tuple[float, float]:
        """Rate under full load, and the CPU time of this process over wall time."""
        own = psutil.Process()
        started, cpu = time.perf_counter(), sum(own.cpu_times()[:2])
        if name == "executor":
            asyncio.run(self._executor_load())
        else:
            with ThreadPoolExecutor(self._concurrency) as clients:
                list(clients.map(self._ask_triton, range(len(self._items))))
        seconds = time.perf_counter() - started
        return len(self._items) / seconds, (sum(own.cpu_times()[:2]) - cpu) / seconds

    def _ask_triton(self, index: int) -> None:
        inputs: dict[str, Any] = {"text_input": self._prompts[index], "max_tokens": self._items[index].output_tokens}
        with self._server.request("generate", **inputs) as response:
            response.read()

    async def _executor_first_tokens(self, count: int) -> list[float]:
        client, times = ServiceClient(self._executor.path), []
        for index in range(count):
            ids, started = self._items[index % len(self._items)].input_ids, time.perf_counter()
            call = await client.submit({"input_ids": ids, "request_output_len": 1, "streaming": True})
            async for _ in call.events():
                times.append((time.perf_counter() - started) * 1e3)
        await client.close()
        return times

    async def _executor_load(self) -> None:
        client, places = ServiceClient(self._executor.path), asyncio.Semaphore(self._concurrency)

        async def ask(item: DatasetItem) -> None:
            async with places:
                call = await client.submit({"input_ids": item.input_ids, "request_output_len": item.output_tokens})
                async for _ in call.events():
                    pass

        await asyncio.gather(*(ask(item) for item in self._items))
        await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/evaluation.jsonl"))
    parser.add_argument("--num-requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--first-tokens", type=int, default=40, help="single requests per round")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians count")
    parser.add_argument("--note", default="", help="said in the report, such as what else the machine did")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    items = read_dataset(options.dataset, tokenizer, options.num_requests)
    prompts = [tokenizer.decode(item.input_ids) for item in items]
    blocks = engine.build.max_batch_size * -(-engine.build.max_seq_len // engine.build.tokens_per_block)
    ttft: dict[str, list[float]] = {"executor": [], "triton": []}
    rates: dict[str, list[float]] = {"executor": [], "triton": []}
    cpu: dict[str, list[float]] = {"executor": [], "triton": []}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.engine_dir, Path(folder), kv_cache_blocks=blocks)
        executor = ExecutorProcess(options.engine_dir, Path(folder), blocks)
        load = Load(server, executor, items, prompts, options.concurrency)
        try:
            for name in ttft:
                load.first_token_ms(name, 5)  # warm
            for _ in range(options.repeat):
                for name in ttft:
                    ttft[name].append(load.first_token_ms(name, options.first_tokens))
                    rate, cores = load.requests_per_second(name)
                    rates[name].append(rate)
                    cpu[name].append(cores)
                    print(f"{name}: first token {ttft[name][-1]:.2f} ms, {rate:.2f} req/s", file=sys.stderr)
        finally:
            executor.stop()
            server.stop()
    report = make_report(
        {
            "server": server.origin,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "note": options.note,
            "concurrency": options.concurrency,
            "num_requests": len(items),
            "ttft_ms": {name: statistics.median(values) for name, values in ttft.items()},
            "ttft_added_ms": statistics.median(t - e for t, e in zip(ttft["triton"], ttft["executor"], strict=True)),
            "req_s": {name: statistics.median(values) for name, values in rates.items()},
            "req_s_rounds": rates,
            "throughput_ratio": statistics.median(
                t / e for t, e in zip(rates["triton"], rates["executor"], strict=True)
            ),
            "client_cpu_cores": {name: statistics.median(values) for name, values in cpu.items()},
        }
    )
    alone, added = report["ttft_ms"]["executor"], report["ttft_added_ms"]
    print(f"time to first token: {alone:.2f} ms alone, {added:+.2f} ms by Triton")
    print(
        f"requests per second at {options.concurrency}: {report['req_s']['executor']:.2f} alone, "
        f"{report['req_s']['triton']:.2f} through Triton ({report['throughput_ratio']:.0%}); the load took "
        f"{report['client_cpu_cores']['executor']:.2f} and {report['client_cpu_cores']['triton']:.2f} of "
        f"{report['machine']['cores']} cores"
    )
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
