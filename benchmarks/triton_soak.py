"""Mixed load on a Triton server while its processes are killed, and what is left afterwards.

Clients ask for whole answers and streams, and some leave early. At even intervals one process after another gets
SIGKILL: the model processes and the server itself. Counted: how every request ended, how long the server took to be
ready again, and what the launcher and the machine hold at the start, on the way and at the end (memory, file handles,
threads, shared memory). The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from benchmarks.triton_processes import Server
from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.dataset import read_dataset
from trtllm_memshare.evaluation.document import make_report, publish
from trtllm_memshare.runners.engines import load_engine

_VICTIMS = ("tensorrt_llm", "ensemble", "tritonserver", "preprocessing")
_SAMPLE_S = 5
_SETTLE_S = 60


def ask(server: Server, rng: random.Random, prompts: list[str]) -> str:
    """One request of a random kind. Returns how it ended."""
    kind = rng.choices(("whole", "stream", "leaves"), (4, 4, 2))[0]
    inputs: dict[str, Any] = {"text_input": rng.choice(prompts), "max_tokens": rng.choice((20, 100, 400, 1500))}
    try:
        if kind == "whole":
            with server.request("generate", **inputs) as response:
                return "answered" if b'"finish_reason"' in response.read() else "unclear"
        last = b""
        with server.request("generate_stream", stream=True, **inputs) as response:
            for index, line in enumerate(response):
                last = line if line.strip() else last
                if kind == "leaves" and index > 10:
                    return "client left"
        if b'"error"' in last:
            return "told why"
        return "answered" if b'"finish_reason":"length"' in last or b'"finish_reason":"stop"' in last else "closed"
    except urllib.error.HTTPError as error:
        error.read()
        return "told why"
    except (OSError, HTTPException):
        time.sleep(0.5)  # the server is down: a client that asks again at once only burns the machine
        return "closed"


def held(server: Server) -> dict[str, dict[str, float]]:
    """What each process holds now, and the machine's shared memory."""
    found: dict[str, dict[str, float]] = {}
    for name, process in server.processes().items():
        try:
            found[name] = {
                "rss_mb": round(process.memory_info().rss / 2**20, 1),
                "fds": process.num_fds(),
                "threads": process.num_threads(),
            }
        except psutil.Error:
            continue
    shared = [p.stat().st_size for p in Path("/dev/shm").glob("memshare-*") if p.exists()]
    found["shared memory"] = {"files": len(shared)}
    return found


def soak(server: Server, prompts: list[str], minutes: float, clients: int, crashes: int) -> dict[str, Any]:
    """Runs the load and the crashes; see the module."""
    began = time.monotonic()
    deadline = began + 60 * minutes
    ends, lock = Counter[str](), threading.Lock()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < deadline:
            end = ask(server, rng, prompts)
            with lock:
                ends[end] += 1

    samples, recoveries = [held(server)], []
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, seed) for seed in range(clients)]
        victims = itertools.islice(itertools.cycle(_VICTIMS), crashes)
        for number, victim in enumerate(victims, 1):
            while time.monotonic() < began + number * 60 * minutes / (crashes + 1):
                time.sleep(_SAMPLE_S)
                samples.append(held(server))
            killed_at = time.monotonic()
            server.processes()[victim].kill()
            while server.is_ready() and time.monotonic() < killed_at + _SETTLE_S:
                time.sleep(0.05)
            red_after_s = time.monotonic() - killed_at
            server.wait_until_ready()
            seconds = time.monotonic() - killed_at
            recoveries.append(
                {"killed": victim, "red_after_s": round(red_after_s, 2), "ready_after_s": round(seconds, 2)}
            )
            print(f"killed {victim}: ready again after {seconds:.1f} s", flush=True)
        while time.monotonic() < deadline:
            time.sleep(_SAMPLE_S)
            samples.append(held(server))
        for future in running:
            future.result()
    give_up = time.monotonic() + _SETTLE_S
    while server.used_blocks() and time.monotonic() < give_up:
        time.sleep(0.2)
    samples.append(held(server))
    return {
        "minutes": minutes, "clients": clients, "requests": dict(ends), "recoveries": recoveries,
        "restarts_counted": server.metric("memshare_server_restarts"), "leaked_blocks": server.used_blocks(),
        "samples": samples,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/evaluation.jsonl"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--crashes", type=int, default=4)
    parser.add_argument("--note", default="", help="said in the report, such as what else the machine did")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    prompts = [tokenizer.decode(item.input_ids) for item in read_dataset(options.dataset, tokenizer, 64)]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.engine_dir, Path(folder), kv_cache_blocks=2000, max_queue_size=options.clients)
        first_start_s = server.start_s
        try:
            found = soak(server, prompts, options.minutes, options.clients, options.crashes)
        finally:
            server.stop()
    left = [p.name for p in Path("/dev/shm").glob("memshare-*")]
    report = make_report(
        {"server": server.origin, "note": options.note, "first_start_s": round(first_start_s, 2), **found,
         "shared_memory_left": len(left)}
    )  # fmt: skip
    blocks = report["leaked_blocks"]
    print(f"soak: {report['requests']}; leaked: {blocks:.0f} blocks, {len(left)} files of shared memory")
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
