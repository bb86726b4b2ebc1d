"""Mixed load on a Triton server while its processes are killed, and what is left afterwards.

Clients ask for whole answers and streams, and some leave early. At even intervals one process after another gets
SIGKILL: the model processes and the server itself. Every request must end with its answer, with an error that says why,
or with a connection that closes because its server died; the server must be ready again within ten seconds; nothing may
be left or grow. What did not hold is listed under `faults`, and the exit code is then 1. The last line is JSON.

    python -m benchmarks.triton_soak --minutes 5 --crashes 8
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

try:
    import psutil
    from transformers import AutoTokenizer

    from benchmarks.triton_load.clients import Clients
    from benchmarks.triton_load.crashes import Soak, growth
    from benchmarks.triton_load.server import TritonServer, cpu_seconds
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
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=300, help="default: %(default)d")
    parser.add_argument("--crashes", type=int, default=20, help="kills, at even intervals (default: %(default)d)")
    parser.add_argument("--note", default="", help="said in the report, such as what else the machine did")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    engine = load_engine(options.engine_dir)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_dir)
    prompts = [tokenizer.decode(item.input_ids) for item in read_dataset(options.dataset, tokenizer, 64)]
    with tempfile.TemporaryDirectory() as folder:
        server = TritonServer(options.engine_dir, Path(folder), kv_cache_blocks=2000, max_queue_size=options.clients)
        clients = Clients(server.url, prompts, options.clients)
        began, idle, busy = time.monotonic(), psutil.cpu_times().idle, cpu_seconds(psutil.Process())
        try:
            found = asyncio.run(Soak(server, clients, options.minutes, options.crashes).run())
            seconds = time.monotonic() - began
            idle, busy = psutil.cpu_times().idle - idle, cpu_seconds(psutil.Process()) - busy
        finally:
            code = server.stop()
        left = server.shared_memory()
    if code or left:
        found["faults"].append(f"the launcher ended with {code}, shared memory left: {left}")
    report = make_report(
        {"server": server.origin, "note": options.note, "minutes": options.minutes, "clients": options.clients,
         "client_cores": round(busy / seconds, 2), "idle_cores": round(idle / seconds, 2),
         "growth": growth(found["samples"]), **found}
    )  # fmt: skip
    ready = [r["ready_after_s"] for r in found["recoveries"]] or [0.0]
    print(f"{options.clients} clients, {options.minutes:g} minutes: {found['requests']}")
    print(f"{len(found['recoveries'])} kills: ready after {statistics.median(ready):.1f} s, at most {max(ready):.1f} s")
    print("\n".join(["faults:", *found["faults"]]) if found["faults"] else "no faults")
    publish(report, options.output_json)
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    run_command_line(main)
