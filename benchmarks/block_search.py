"""Time of stage 2 against the memory-bandwidth floor and against the PyTorch reference, at the shapes of real models.

On a CUDA device: the kernel by CUDA events, median over sets of pairs that together exceed the L2 cache; the floor is
the bytes of the rows over the bandwidth of a device copy measured in the same run. The reference runs eager and
compiled, in slices where its intermediates would not fit. Without a GPU only the reference is timed, at small pair
counts, against a copy in main memory: that says nothing of the kernel. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.report.document import make_report, publish
from trtllm_memshare.search.block_distance import block_distance
from trtllm_memshare.search.cuda_block_distance import CudaBlockDistance

_REFERENCE_SLICE = 64  # pairs the reference takes at once
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_SET_BYTES = 256 << 20  # all sets of pairs together read at least this much: several times an L2 cache


@dataclass(frozen=True)
class ModelShape:
    """What one block of a model's KV pool holds."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float


SHAPES = {
    "DeepSeek-R1-Distill-Qwen-7B": ModelShape(28, 4, 128, 1e4),
    "DeepSeek-R1-Distill-Llama-8B": ModelShape(32, 8, 128, 5e5),
    "DeepSeek-R1-Distill-Qwen-32B": ModelShape(64, 8, 128, 1e6),
    "QwQ-32B": ModelShape(64, 8, 128, 1e6),
}


@dataclass(frozen=True)
class Pairs:
    """Device tensors of one search; see ``block_distance``."""

    new_rows: torch.Tensor
    old_rows: torch.Tensor
    position_delta: torch.Tensor


def make_pairs(count: int, num_blocks: int, size: int, device: str, generator: torch.Generator) -> Pairs:
    """Whole new blocks against shifted runs that cross two older blocks, as shares at any shift are."""
    order = torch.randperm(num_blocks - 1, generator=generator).repeat(2 * count // (num_blocks - 1) + 1)
    shift = torch.randint(0, size, (count, 1), generator=generator)
    slots = torch.arange(size)
    new = order[:count, None] * size + slots
    old = order[count : 2 * count, None] * size + shift + slots
    delta = torch.randint(64, 8192, (count, 1), generator=generator).expand(count, size)
    return Pairs(*(t.to(torch.int32).contiguous().to(device) for t in (new, old, delta)))


def median_ms(run: Callable[[int], None], repeat: int, device: str) -> tuple[float, float]:
    """Median and largest of ``repeat`` calls, after two to warm up, by CUDA events on a GPU."""
    times = []
    for index in range(-2, repeat):
        if device == "cuda":
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            run(index % repeat)
            ended.record()
            ended.synchronize()
            taken = started.elapsed_time(ended)
        else:
            clock = time.perf_counter()
            run(index % repeat)
            taken = (time.perf_counter() - clock) * 1e3
        if index >= 0:
            times.append(taken)
    return statistics.median(times), max(times)


def copy_bandwidth(device: str, repeat: int) -> float:
    """Bytes per second read and written by a plain copy."""
    source = torch.empty(_COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def copy(_: int) -> None:
        target.copy_(source)

    median, _ = median_ms(copy, repeat, device)
    return 2 * source.numel() / median * 1e3


def measure(name: str, dtype: torch.dtype, counts: list[int], size: int, device: str, repeat: int) -> list[dict]:
    """One row per number of pairs for one model."""
    shape, rows = SHAPES[name], []
    block_bytes = shape.num_layers * 2 * shape.num_kv_heads * size * shape.head_dim * dtype.itemsize
    room = torch.cuda.mem_get_info()[0] * 0.5 if device == "cuda" else 2 << 30
    num_blocks = int(min(room // block_bytes, 2 * max(counts) + 2, 2**31 // size - 1))
    dims = (num_blocks, shape.num_layers, 2, shape.num_kv_heads, size, shape.head_dim)
    pool = torch.empty(dims, dtype=dtype, device=device)
    for block in pool.split(64):
        block.copy_(torch.randn(block.shape, device=device))
    half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    inv_freq = (1.0 / shape.rope_theta**half).float()
    search = CudaBlockDistance(pool, inv_freq, max(counts)) if device == "cuda" else None
    compiled = torch.compile(block_distance, dynamic=False) if device == "cuda" else None
    generator = torch.Generator().manual_seed(0)
    bandwidth = copy_bandwidth(device, repeat)
    for count in counts:
        read_bytes = count * 2 * block_bytes
        sets = [make_pairs(count, num_blocks, size, device, generator) for _ in range(_SET_BYTES // read_bytes + 2)]
        row: dict[str, Any] = {
            "model": name, "dtype": str(dtype).removeprefix("torch."), "pairs": count, "read_mb": read_bytes / 1e6,
            "copy_gb_s": bandwidth / 1e9, "floor_us": read_bytes / bandwidth * 1e6,
        }  # fmt: skip
        if search is not None:
            out = torch.empty((count, shape.num_layers, 4), device=device)

            def kernel(index: int, sets: list[Pairs] = sets, out: torch.Tensor = out) -> None:
                pairs = sets[index % len(sets)]
                search.launch(pairs.new_rows, pairs.old_rows, pairs.position_delta, out)

            row["kernel_us"], row["kernel_max_us"] = (t * 1e3 for t in median_ms(kernel, repeat, device))
            row["share_of_copy_bandwidth"] = row["floor_us"] / row["kernel_us"]
        for label, function in (("reference", block_distance), ("compiled", compiled)):
            if function is None:
                continue

            def reference(index: int, sets: list[Pairs] = sets, function: Callable = function) -> None:
                pairs = sets[index % len(sets)]
                for start in range(0, len(pairs.new_rows), _REFERENCE_SLICE):
                    part = slice(start, start + _REFERENCE_SLICE)
                    function(pool, pairs.new_rows[part], pairs.old_rows[part], pairs.position_delta[part], inv_freq)

            row[f"{label}_us"] = median_ms(reference, min(repeat, 5), device)[0] * 1e3
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row; '-' for what did not run."""
    columns = ("model", "dtype", "pairs", "read_mb", "floor_us", "kernel_us", "share_of_copy_bandwidth",
               "reference_us", "compiled_us")  # fmt: skip
    cells = [list(columns)]
    for row in rows:
        cells.append([f"{row[c]:.2f}" if isinstance(row.get(c), float) else str(row.get(c, "-")) for c in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float8_e4m3fn"], metavar="DTYPE")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=20, help="timed calls; the median counts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device: {device}; {'kernel and reference' if device == 'cuda' else 'reference only, no GPU'}")
    rows = []
    for name in options.models:
        for dtype in options.dtypes:
            rows += measure(
                name, getattr(torch, dtype), options.pairs, options.tokens_per_block, device, options.repeat
            )
    print(table(rows))
    report = make_report(
        {
            "device": device,
            "tokens_per_block": options.tokens_per_block,
            "rows": rows,
        }
    )
    publish(report, options.output_json)


if __name__ == "__main__":
    run_command_line(main)
