"""Pools and floors at size: the schedule of every arm over real traces, without a model.

What requests wait for, how many are in flight, who is paused and how many steps it all takes follow from lengths, pools
and floors alone; the text decides which pages repeat. So the scheduler, the cache and pressure run as they are, the
model is left out, and steps are given the times of a bandwidth model (**modelled, not measured**). Loss and measured
times are ``inflight_batching.py --replay``'s.

Two loads. ``drain``: requests of unequal length, cut from the traces, all there from the start, until the last has
ended. ``stream``: whole traces up to ``--max-tokens``, of which ``--in-flight`` are outstanding at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

try:
    from transformers import AutoTokenizer

    from benchmarks.studies.pressure.modelless import serve
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import make_report, write_report
    from trtllm_memshare.evaluation.real_texts import cut_traces, whole_traces
    from trtllm_memshare.search.steps import BoundaryTokens
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_FLOORS = ("1", "0.75", "0.62", "0.53", "0.5", "0.5,lookahead_tokens=16", "0.5,lookahead_tokens=512", "0.25")
_UNPAUSED = ("pressure-guaranteed:min_kept=0.5", "pressure-guaranteed:min_kept=0.25")
_ARMS = ("full", "full-guaranteed", *(f"pressure:min_kept={kept}" for kept in _FLOORS), *_UNPAUSED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True, help="whose tokenizer cuts the traces")
    parser.add_argument("--load", choices=("drain", "stream"), default="drain")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=24, help="stream: outstanding at once")
    parser.add_argument("--max-tokens", type=int, default=1536, help="of a request, problem and written text")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths or of the order")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0], help="of the peak demand")
    parser.add_argument("--arms", nargs="+", default=_ARMS, metavar="VARIANT")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    boundaries = BoundaryTokens.from_tokenizer(tokenizer, len(tokenizer))
    choose = cut_traces if options.load == "drain" else whole_traces
    texts = choose(tokenizer, options.num_requests, options.max_tokens, options.seed)
    in_flight = len(texts) if options.load == "drain" else options.in_flight
    # What the requests would hold if nobody ever waited for memory.
    enough = in_flight * (options.max_tokens // 16 + 2)
    demand = serve("full", texts, boundaries, enough, in_flight)["peak_blocks"]
    given = " ".join(
        f"--{name} {getattr(options, name.replace('-', '_'))}"
        for name in ("load", "num-requests", "in-flight", "max-tokens", "seed")
    )
    given += f" --shares {' '.join(map(str, options.shares))} --arms {' '.join(options.arms)}"
    command = f"python -m benchmarks.studies.pressure.schedule --model-dir models/smollm2 {given}"
    rows = []
    for share in options.shares:
        for name in options.arms:
            row = serve(name, texts, boundaries, round(share * demand), in_flight)
            rows.append({"pool_share": share, **row})
            print(json.dumps(rows[-1]), flush=True)
            report = {"load": options.load, "num_requests": len(texts), "in_flight": in_flight}
            if options.output_json is not None:
                about = {**report, "max_tokens": options.max_tokens, "demand_blocks": demand, "rows": rows}
                write_report(make_report(about, command), options.output_json)


if __name__ == "__main__":
    run_command_line(main)
