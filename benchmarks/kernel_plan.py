"""What the search and a decode step should take on H100 and H200, from counted bytes and instructions; needs no GPU.

Compiles the kernel of the 7B model with NVRTC for sm_90, counts its machine instructions, and works out

    before    the launch, and loads in a row up to the first data: the rows' numbers, then the rows
    memory    bytes of the rows over the bandwidth of a copy
    issue     warp instructions over what the schedulers issue
    chain     loads that a block waits for one after the other, head by head, for all blocks that take turns

A search takes what stands before and then the largest of the others, memory and issue at the share of its peak that
kernels like it reach. While one block waits, the loads of others are under way, so that the chain counts only where too
few blocks are at work to fill the memory's queue. --compare holds the plan against reports of ``gpu_suite.sh``: what an
H200 took is in benchmarks/results/; of a card without a report there the plan is all there is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from benchmarks.gpu.kernel_plan import make_plan, table
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import publish
    from trtllm_memshare.search.kernel_source import ELEMENT_TYPES
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float8_e4m3fn", "int8"], choices=ELEMENT_TYPES)
    known = sorted(Path("benchmarks/results").glob("gpu_*_part*.json"))
    parser.add_argument("--compare", nargs="*", type=Path, default=known,
                        help="reports of gpu_suite.sh (default: benchmarks/results/gpu_*_part*.json)")  # fmt: skip
    parser.add_argument("--before", type=Path, help="folder with kernels of an older checkout, to count beside these")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    report = make_plan(options.dtypes, options.compare, options.before)
    print(table(report))
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
