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
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtllm_memshare.errors import run_command_line
from trtllm_memshare.evaluation.device_timing import copy_bandwidth, time_calls
from trtllm_memshare.evaluation.document import make_report, publish, write_report
from trtllm_memshare.search.block_distance import block_distance
from trtllm_memshare.search.cuda_block_distance import CudaBlockDistance

_REFERENCE_SLICE = 64  # pairs the reference takes at once
_REFERENCE_REPEAT = 5
_SET_BYTES = 256 << 20  # all sets of pairs together read at least this much: several times an L2 cache
_COMPARED_PAIRS = 8
FORMS = ("eager", "compiled")
"""Of the reference."""
_MAX_RELATIVE_ERROR = 1e-4  # of float32 sums in two orders; a wrong row or angle is off by about 1


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

    def part(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.new_rows[start:stop], self.old_rows[start:stop], self.position_delta[start:stop]


def make_pairs(count: int, num_blocks: int, size: int, device: str, generator: torch.Generator) -> Pairs:
    """Whole new blocks against shifted runs that cross two older blocks, as shares at any shift are."""
    order = torch.randperm(num_blocks - 1, generator=generator).repeat(2 * count // (num_blocks - 1) + 1)
    shift = torch.randint(0, size, (count, 1), generator=generator)
    slots = torch.arange(size)
    new = order[:count, None] * size + slots
    old = order[count : 2 * count, None] * size + shift + slots
    delta = torch.randint(64, 8192, (count, 1), generator=generator).expand(count, size)
    return Pairs(*(t.to(torch.int32).contiguous().to(device) for t in (new, old, delta)))


class Pool:
    """A pool of random values of one shape and dtype, as large as half of the memory or the pairs call for."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, max_pairs: int, size: int, device: str) -> None:
        self.block_bytes = shape.num_layers * 2 * shape.num_kv_heads * size * shape.head_dim * dtype.itemsize
        room = torch.cuda.mem_get_info()[0] * 0.5 if device == "cuda" else 2 << 30
        self.num_blocks = int(min(room // self.block_bytes, 2 * max_pairs + 2, 2**31 // size - 1))
        dims = (self.num_blocks, shape.num_layers, 2, shape.num_kv_heads, size, shape.head_dim)
        self.values = torch.empty(dims, dtype=dtype, device=device)
        for block in self.values.split(32):
            # Integers need a scale: as they are, most would be 0.
            block.copy_(torch.randn(block.shape, device=device) * (1 if dtype.is_floating_point else 20))
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self.inv_freq = (1.0 / shape.rope_theta**half).float()
        self._size, self._device, self._generator = size, device, torch.Generator().manual_seed(0)

    def sets(self, count: int) -> list[Pairs]:
        """Sets of ``count`` pairs to take in turn."""
        turns = _SET_BYTES // (count * 2 * self.block_bytes) + 2
        return [make_pairs(count, self.num_blocks, self._size, self._device, self._generator) for _ in range(turns)]


def kernel_times(row: dict[str, Any], pool: Pool, search: CudaBlockDistance, repeat: int) -> None:
    """Adds the kernel's time to a row, in place."""
    count, num_layers = row["pairs"], pool.values.shape[1]
    sets, out = pool.sets(count), torch.empty((count, num_layers, 4), device="cuda")

    def kernel(index: int) -> None:
        search.launch(*sets[index % len(sets)].part(0, count), out)

    timing = time_calls(kernel, repeat, "cuda")
    row["kernel_us"], row["kernel_max_us"] = timing.median_ms * 1e3, timing.max_ms * 1e3
    row["kernel_launch_us"] = timing.launch_ms * 1e3
    row["share_of_copy_bandwidth"] = row["floor_us"] / row["kernel_us"]


def kernel_error(pool: Pool, search: CudaBlockDistance) -> float:
    """Largest difference between a sum of the kernel and one of the reference, relative to |K_new|^2 or |V_new|^2."""
    pairs = pool.sets(_COMPARED_PAIRS)[0].part(0, _COMPARED_PAIRS)
    out = torch.empty((_COMPARED_PAIRS, pool.values.shape[1], 4), device="cuda")
    search.launch(*pairs, out)
    expected = block_distance(pool.values, *pairs, pool.inv_freq).double()
    return float(((out - expected).abs() / expected[..., [1, 1, 3, 3]]).max())


def reference_times(row: dict[str, Any], label: str, function: Callable, pool: Pool, repeat: int) -> None:
    """Adds the time of one form of the reference to a row, in place, or why there is none."""
    sets = pool.sets(row["pairs"])

    def reference(index: int) -> None:
        pairs = sets[index % len(sets)]
        for start in range(0, row["pairs"], _REFERENCE_SLICE):
            function(pool.values, *pairs.part(start, start + _REFERENCE_SLICE), pool.inv_freq)

    try:
        row[f"{label}_us"] = time_calls(reference, repeat, pool.values.device.type).median_ms * 1e3
    except Exception as error:  # no compiler, no memory: the other rows still count
        row[f"no_{label}"] = describe(error)


def describe(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def references(
    rows: list[dict[str, Any]], pool: Pool, repeat: int, out_of_time: Callable[[], bool], forms: Sequence[str] = FORMS
) -> Iterator[None]:
    """Adds forms of the reference to the rows of one pool, those of most pairs first; yields after each row.

    64 pairs and more run one compiled form in slices, fewer one form each. Compiled forms are counted for each function
    over all shapes and from the ninth on run eagerly without a word: hence the reset, and ``fullgraph``, which raises.
    """
    torch._dynamo.reset()
    compiled = torch.compile(block_distance, dynamic=False, fullgraph=True)
    for row in sorted(rows, key=lambda r: -r["pairs"]):
        for form, label, function in (("eager", "reference", block_distance), ("compiled", "compiled", compiled)):
            if form not in forms or (form == "compiled" and pool.values.device.type != "cuda"):
                continue
            if out_of_time():
                row[f"no_{label}"] = "no time left (--reference-budget-s)"
            else:
                reference_times(row, label, function, pool, min(repeat, _REFERENCE_REPEAT))
        yield


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
    names: dict[ModelShape, list[str]] = {}
    for name in options.models:
        names.setdefault(SHAPES[name], []).append(name)
    cases = [(shape, getattr(torch, dtype)) for dtype in options.dtypes for shape in names]
    size, repeat = options.tokens_per_block, options.repeat
    bandwidth = copy_bandwidth(device, repeat)
    rows: dict[tuple[ModelShape, torch.dtype], list[dict[str, Any]]] = {}
    report = make_report({"device": device, "tokens_per_block": size, "copy_gb_s": bandwidth / 1e9, "rows": []})

    def save() -> None:
        report["rows"] = [row for case in rows.values() for row in case]
        if options.output_json is not None:
            write_report(report, options.output_json)

    def make_pool(shape: ModelShape, dtype: torch.dtype) -> Pool:
        if device == "cuda":
            torch.cuda.empty_cache()
        return Pool(shape, dtype, max(options.pairs), size, device)

    for shape, dtype in cases:
        pool = make_pool(shape, dtype)
        rows[shape, dtype] = [
            {"model": ", ".join(names[shape]), "dtype": str(dtype).removeprefix("torch."), "pairs": count,
             "read_mb": count * 2 * pool.block_bytes / 1e6, "floor_us": count * 2 * pool.block_bytes / bandwidth * 1e6}
            for count in options.pairs
        ]  # fmt: skip
        if device == "cuda":
            search = CudaBlockDistance(pool.values, pool.inv_freq, max(options.pairs))
            first = rows[shape, dtype][0]
            try:
                first["kernel_relative_error"] = kernel_error(pool, search)
            except Exception as error:  # the reference's, which torch may not have for every dtype
                first["no_kernel_relative_error"] = describe(error)
            for row in rows[shape, dtype]:
                kernel_times(row, pool, search, repeat)
                save()
            del search
        del pool
    started = time.monotonic()

    def out_of_time() -> bool:
        return time.monotonic() - started > options.reference_budget_s

    for shape, dtype in cases if "none" not in options.references else []:
        pool = make_pool(shape, dtype)
        for _ in references(rows[shape, dtype], pool, repeat, out_of_time, options.references):
            save()
        del pool
    save()
    print(table(report["rows"]))
    errors = [row["kernel_relative_error"] for row in report["rows"] if "kernel_relative_error" in row]
    if errors:
        print(f"largest error of a sum against the reference, relative to the newer side's norm: {max(errors):.1e}")
    publish(report, options.output_json)
    if errors and not max(errors) < _MAX_RELATIVE_ERROR:
        raise SystemExit(f"error: the kernel's sums must be within {_MAX_RELATIVE_ERROR} of the reference's, see above")


if __name__ == "__main__":
    run_command_line(main)
