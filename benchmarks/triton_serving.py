"""What Triton costs over the executor alone.

Two servers over the same engine: Triton (the CPU build inside nvidia-pytriton unless another is found), and an executor
in a process of its own behind a Unix socket, without Triton and without text. This process is the load for both, with
the same number of clients; its CPU time is reported. The two take turns, and the one that begins changes each round:
time to first token of single requests (streamed), then requests per second of a full load (not streamed). Text in and
out is part of Triton's side. The last line is JSON.

    OMP_NUM_THREADS=1 python -m benchmarks.triton_serving

With `--aiperf` each round streams the full load as well: the same clients on both sides, and AIPerf on Triton.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from benchmarks.triton_load.aiperf import find_aiperf
    from benchmarks.triton_load.cost import Alone, Round, Triton, run_round, summary
    from benchmarks.triton_load.executor_alone import ExecutorAlone
    from benchmarks.triton_load.server import TritonServer
    from benchmarks.triton_load.streamed import Streams, streamed_lines, streamed_summary
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.dataset import read_dataset
    from trtllm_memshare.evaluation.document import make_report, publish
    from trtllm_memshare.runners.engines import load_engine
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/tiny_reasoner"))
    parser.add_argument("--dataset", type=Path, default=Path("benchmarks/data/evaluation.jsonl"))
    parser.add_argument("--num-requests", type=int, default=96, help="of a full load (default: %(default)d)")
    parser.add_argument("--clients", type=int, default=64, help="at a time (default: %(default)d)")
    parser.add_argument("--first-tokens", type=int, default=40, help="single requests per round (default: %(default)d)")
    parser.add_argument("--repeat", type=int, default=4, help="rounds; medians count (default: %(default)d)")
    parser.add_argument("--max-minutes", type=float, default=5.0, help="no round begins later (default: %(default)g)")
    parser.add_argument("--aiperf", action="store_true", help="stream too, AIPerf beside our clients (make aiperf)")
    parser.add_argument("--note", default="", help="said in the report, such as what else the machine did")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    items = read_dataset(options.dataset, tokenizer, options.num_requests)
    texts = [tokenizer.decode(item.input_ids) for item in items]
    streams = Streams(items, texts, options.clients, find_aiperf(), engine.model_dir) if options.aiperf else None
    blocks = engine.build.max_batch_size * -(-engine.build.max_seq_len // engine.build.tokens_per_block)
    rounds: dict[str, list[Round]] = {"executor": [], "triton": []}
    streamed = []
    deadline = time.monotonic() + 60 * options.max_minutes
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        server = TritonServer(options.engine_dir, Path(folder), ("--no-spare",), kv_cache_blocks=blocks)
        ends.callback(server.stop)
        executor = ExecutorAlone(options.engine_dir, Path(folder), blocks)
        ends.callback(executor.stop)
        sides: dict[str, Alone | Triton] = {"executor": Alone(executor), "triton": Triton(server)}
        for side in sides.values():  # warm
            asyncio.run(run_round(side, items[:8], texts[:8], 8, 5))
        for number in range(options.repeat):
            if number and time.monotonic() > deadline:
                break
            for name in sorted(sides, reverse=bool(number % 2)):
                found = asyncio.run(run_round(sides[name], items, texts, options.clients, options.first_tokens))
                rounds[name].append(found)
                print(f"{name}: first token {found.ttft_ms:.2f} ms, {found.req_s:.2f} req/s", file=sys.stderr)
            if streams is not None:
                streamed.append(streams.run(sides, server.url, Path(folder) / f"aiperf_{number}", number))
                print(f"streamed: {streamed[-1]}", file=sys.stderr)
    report = make_report(
        {"server": server.origin, "threads": os.environ.get("OMP_NUM_THREADS"), "note": options.note,
         "clients": options.clients, "num_requests": len(items), **summary(rounds["executor"], rounds["triton"]),
         **({"streamed": streamed_summary(streamed)} if streamed else {})}
    )  # fmt: skip
    alone, triton = report["executor"], report["triton"]
    print(f"{len(rounds['triton'])} rounds")
    print(f"time to first token: {alone['ttft_ms']:.2f} ms alone, {report['ttft_added_ms']:+.2f} ms by Triton")
    print(
        f"requests per second, {options.clients} clients: {alone['req_s']:.2f} alone, {triton['req_s']:.2f} through "
        f"Triton ({report['throughput_ratio']:.0%}); CPU time of the server for a request: "
        f"{alone['server_cpu_ms']:.0f} and {triton['server_cpu_ms']:.0f} ms; the load took {alone['client_cores']:.2f} "
        f"and {triton['client_cores']:.2f} of {report['machine']['cores']} cores"
    )
    print("\n".join(streamed_lines(report["streamed"])) if streamed else "not streamed (add --aiperf)")
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
