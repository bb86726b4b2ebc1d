"""What Triton costs over the executor alone, and whether a deployment leaks under mixed load.

Starts a server over the engine (the CPU build inside nvidia-pytriton unless another is found), then measures in turn,
several rounds: time to first token of single requests, and requests per second of a full load without streaming, both
through `ensemble` over HTTP and through an executor in this process, on the same requests. With --soak-minutes, mixed
load follows (streams, single answers, clients that leave early) while memory, file handles and threads of the server's
processes are sampled. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from trtllm_memshare.errors import UserError, run_command_line
from trtllm_memshare.evaluation.dataset import DatasetItem, read_dataset
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository
from trtllm_memshare.triton.server import Ports, find_server
from trtllm_memshare.triton.token_model import make_executor

_START_TIMEOUT_S = 120
_SAMPLE_S = 10


class Server:
    """A Triton server of this run."""

    def __init__(self, engine_dir: Path, folder: Path, blocks: int) -> None:
        write_repository(RepositoryOptions(engine_dir, folder / "repository", kv_cache_blocks=blocks))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self._ports = Ports(*(s.getsockname()[1] for s in sockets))
        for s in sockets:
            s.close()
        command = [sys.executable, "-m", "trtllm_memshare.triton.launch", str(folder / "repository")]
        command += [f"--{name}-port={getattr(self._ports, name)}" for name in ("http", "grpc", "metrics")]
        with (folder / "triton.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.origin = find_server().origin
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"Triton did not start, see {folder / 'triton.log'} (its last lines say why)")
            time.sleep(0.2)

    def request(self, endpoint: str, **inputs: Any) -> Any:
        """The open response of an endpoint of ``ensemble``."""
        url = f"http://127.0.0.1:{self._ports.http}/v2/models/ensemble/{endpoint}"
        return urllib.request.urlopen(urllib.request.Request(url, json.dumps(inputs).encode()), timeout=300)

    def used_blocks(self) -> float:
        """KV blocks in use, from the metrics endpoint."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._ports.metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if 'kv_cache_block_type="used"' in line)

    def processes(self) -> dict[str, psutil.Process]:
        """The server and the two model processes that work for every request, by name."""
        found = dict[str, psutil.Process]()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.name() == "tritonserver":
                found["tritonserver"] = child
            for model in ("ensemble", "tensorrt_llm"):
                if f"/{model}/1/model.py" in " ".join(child.cmdline()):
                    found[model] = child
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports.http}/v2/health/ready", timeout=5):
                return self.used_blocks() == 0
        except OSError:
            return False


def first_token_ms(server: Server | None, executor: Executor, item: DatasetItem, prompt: str) -> float:
    """Milliseconds from request to first text, through Triton or the executor alone."""
    started = time.perf_counter()
    if server is None:
        next(iter(executor.submit(item.input_ids, SamplingParams(1))))
        return (time.perf_counter() - started) * 1e3
    with server.request("generate_stream", text_input=prompt, max_tokens=1, stream=True) as response:
        response.readline()
        return (time.perf_counter() - started) * 1e3


def full_load(
    server: Server | None,
    executor: Executor,
    items: list[DatasetItem],
    prompts: list[str],
    stop: tuple[int, ...],
    concurrency: int,
) -> tuple[float, float]:
    """Requests per second with ``concurrency`` outstanding, and the CPU time of this process over wall time."""
    own, started, cpu = psutil.Process(), time.perf_counter(), sum(psutil.Process().cpu_times()[:2])

    def ask(index: int) -> None:
        if server is None:
            params = SamplingParams(items[index].output_tokens, stop_token_ids=stop)
            executor.submit(items[index].input_ids, params).result()
        else:
            with server.request(
                "generate", text_input=prompts[index], max_tokens=items[index].output_tokens
            ) as response:
                response.read()

    with ThreadPoolExecutor(concurrency) as clients:
        list(clients.map(ask, range(len(items))))
    seconds = time.perf_counter() - started
    return len(items) / seconds, (sum(own.cpu_times()[:2]) - cpu) / seconds


def soak(server: Server, prompts: list[str], minutes: float, concurrency: int) -> dict[str, Any]:
    """Mixed load for a while; what the processes held at the start, on the way and at the end."""
    deadline, count = time.monotonic() + 60 * minutes, dict.fromkeys(("answers", "streams", "left", "errors"), 0)
    lock = threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < deadline:
            kind = rng.choices(("answers", "streams", "left"), (4, 4, 2))[0]
            inputs = {"text_input": rng.choice(prompts), "max_tokens": rng.choice((20, 100, 400, 1500))}
            try:
                if kind == "answers":
                    server.request("generate", **inputs).read()
                else:
                    with server.request("generate_stream", stream=True, **inputs) as response:
                        for index, _ in enumerate(response):
                            if kind == "left" and index > 10:
                                break
            except OSError:
                kind = "errors"
            with lock:
                count[kind] += 1

    samples = []
    with ThreadPoolExecutor(concurrency) as clients:
        done = [clients.submit(client, seed) for seed in range(concurrency)]
        while time.monotonic() < deadline:
            time.sleep(min(_SAMPLE_S, max(0.0, deadline - time.monotonic())))
            samples.append(
                {
                    name: {
                        "rss_mb": round(p.memory_info().rss / 2**20, 1),
                        "fds": p.num_fds(),
                        "threads": p.num_threads(),
                    }
                    for name, p in server.processes().items()
                }
            )
        for future in done:
            future.result()
    give_up = time.monotonic() + 30
    while server.used_blocks() and time.monotonic() < give_up:
        time.sleep(0.2)
    return {"minutes": minutes, "requests": count, "leaked_blocks": server.used_blocks(), "samples": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/evaluation.jsonl"))
    parser.add_argument("--num-requests", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--first-tokens", type=int, default=40, help="single requests per round")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians count")
    parser.add_argument("--soak-minutes", type=float, default=0.0)
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    items = read_dataset(options.dataset, tokenizer, options.num_requests)
    prompts = [tokenizer.decode(item.input_ids) for item in items]
    blocks = engine.build.max_batch_size * -(-engine.build.max_seq_len // engine.build.tokens_per_block)
    executor, _ = make_executor(engine, blocks, "MAX_UTILIZATION")
    ttft: dict[str, list[float]] = {"executor": [], "triton": []}
    rates: dict[str, list[float]] = {"executor": [], "triton": []}
    client_cpu: list[float] = []
    with tempfile.TemporaryDirectory() as folder, executor:
        server = Server(options.engine_dir, Path(folder), blocks)
        try:
            for _ in range(options.repeat):
                for name, through in (("executor", None), ("triton", server)):
                    singles = [
                        first_token_ms(through, executor, items[i % len(items)], prompts[i % len(items)])
                        for i in range(options.first_tokens + 2)
                    ]
                    ttft[name].append(statistics.median(singles[2:]))
                    rate, cpu = full_load(through, executor, items, prompts, engine.stop_token_ids, options.concurrency)
                    rates[name].append(rate)
                    if through is not None:
                        client_cpu.append(cpu)
                    print(f"{name}: first token {ttft[name][-1]:.2f} ms, {rate:.2f} req/s", file=sys.stderr)
            soaked = soak(server, prompts, options.soak_minutes, 32) if options.soak_minutes else None
        finally:
            server.stop()
    report = make_report(
        {
            "server": server.origin,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "concurrency": options.concurrency,
            "num_requests": len(items),
            "ttft_ms": {name: statistics.median(values) for name, values in ttft.items()},
            "req_s": {name: statistics.median(values) for name, values in rates.items()},
            "req_s_rounds": rates,
            "throughput_ratio": statistics.median(
                t / e for t, e in zip(rates["triton"], rates["executor"], strict=True)
            ),
            "client_cpu_cores": statistics.median(client_cpu),
            "soak": soaked,
        }
    )
    added = report["ttft_ms"]["triton"] - report["ttft_ms"]["executor"]
    print(f"time to first token: {report['ttft_ms']['executor']:.2f} ms alone, {added:+.2f} ms through Triton")
    print(
        f"requests per second at {options.concurrency}: {report['req_s']['executor']:.2f} alone, "
        f"{report['req_s']['triton']:.2f} through Triton ({report['throughput_ratio']:.0%}); the load client took "
        f"{report['client_cpu_cores']:.2f} of {report['machine']['cores']} cores"
    )
    if soaked:
        first, last = soaked["samples"][len(soaked["samples"]) // 5], soaked["samples"][-1]
        for name in last:
            change = ", ".join(f"{k} {first[name][k]} -> {last[name][k]}" for k in last[name])
            print(f"soak, {name}: {change}")
        print(f"soak: {soaked['requests']}, {soaked['leaked_blocks']:.0f} blocks leaked")
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
