"""Time of stage 2 against the memory-bandwidth floor and against the PyTorch reference, at the shapes of real models.

On a CUDA device: first the kernel at every shape, median over sets of pairs that together exceed the L2 cache, then the
reference, eager and compiled, in slices where its intermediates would not fit, until its time is used up; a row says
why it has no reference. Everything is timed by events on a busy stream (``device_timing``), so that no launch counts.
The floor is the bytes of the rows over the bandwidth of a device copy measured in the same run; the kernel's sums are
held against the reference once for each shape and dtype. Models of one shape are one row. Without a GPU only the
reference is timed, at small pair counts, against a copy in main memory: that says nothing of the kernel. The report is
written after each row; the last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch

    from benchmarks.gpu.search_timing import FORMS, SHAPES, SearchTiming, table
    from trtllm_memshare.errors import run_command_line
    from trtllm_memshare.evaluation.document import publish, write_report
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")

_MAX_RELATIVE_ERROR = 1e-4  # of float32 sums in two orders; a wrong row or angle is off by about 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float8_e4m3fn", "int8"], metavar="DTYPE")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=20, help="timed calls; the median counts")
    parser.add_argument("--reference-budget-s", type=float, default=150, help="seconds after which no reference starts")
    parser.add_argument("--references", nargs="+", choices=(*FORMS, "none"), default=list(FORMS), metavar="FORM",
                        help="forms of the PyTorch reference to time: eager, compiled (on a GPU), or none")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device: {device}; {'kernel and reference' if device == 'cuda' else 'reference only, no GPU'}", flush=True)
    timing = SearchTiming(
        options.models, options.dtypes, options.pairs, options.tokens_per_block, options.repeat, device
    )

    def save() -> None:
        if options.output_json is not None:
            write_report(timing.report, options.output_json)

    for _ in timing.time_kernel():
        save()
    forms = [form for form in options.references if form != "none"]
    for _ in timing.time_references(options.reference_budget_s, forms):
        save()
    report = timing.report
    print(table(report["rows"]))
    errors = [row["kernel_relative_error"] for row in report["rows"] if "kernel_relative_error" in row]
    if errors:
        print(f"largest error of a sum against the reference, relative to the newer side's norm: {max(errors):.1e}")
    publish(report, options.output_json)
    if errors and not max(errors) < _MAX_RELATIVE_ERROR:
        raise SystemExit(f"error: the kernel's sums must be within {_MAX_RELATIVE_ERROR} of the reference's, see above")


if __name__ == "__main__":
    run_command_line(main)
