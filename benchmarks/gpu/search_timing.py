"""Timing of stage 2: pools and pairs of a model's shape, the kernel, the reference, and a row for each case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trtllm_memshare.evaluation.device_timing import copy_bandwidth, kernel_time_ms, time_calls
from trtllm_memshare.evaluation.document import make_report
from trtllm_memshare.search.block_distance import block_distance
from trtllm_memshare.search.cuda_block_distance import CudaBlockDistance
from trtllm_memshare.search.kernel_source import ENTRY_POINT

_REFERENCE_SLICE = 64  # pairs the reference takes at once
_REFERENCE_REPEAT = 5
_SET_BYTES = 256 << 20  # all sets of pairs together read at least this much: several times an L2 cache
_COMPARED_PAIRS = 8
FORMS = ("eager", "compiled")
"""Of the reference."""


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
    """Whole new blocks against shifted runs that cross two older blocks, as shares at any shift are.

    A pair has three blocks of its own while the pool has so many, so that a search reads nothing twice.
    """
    places = num_blocks // 3
    own = torch.randperm(places, generator=generator).repeat(-(-count // places))[:count, None] * 3 * size
    shift = torch.randint(0, size, (count, 1), generator=generator)
    slots = torch.arange(size)
    new = own + slots
    old = own + size + shift + slots
    delta = torch.randint(64, 8192, (count, 1), generator=generator).expand(count, size)
    return Pairs(*(t.to(torch.int32).contiguous().to(device) for t in (new, old, delta)))


class Pool:
    """A pool of random values of one shape and dtype, as large as half of the memory or the pairs call for."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, max_pairs: int, size: int, device: str) -> None:
        self.block_bytes = shape.num_layers * 2 * shape.num_kv_heads * size * shape.head_dim * dtype.itemsize
        room = torch.cuda.mem_get_info()[0] * 0.5 if device == "cuda" else 2 << 30
        self.num_blocks = int(min(room // self.block_bytes, 3 * max_pairs, 2**31 // size - 1))
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
    given = torch.empty((3, count, pool.values.shape[4]), dtype=torch.int32, device="cuda")

    def copy_in(index: int) -> None:
        """Rows and positions have just been copied in, as they have while serving."""
        torch.stack(sets[index % len(sets)].part(0, count), out=given)

    def kernel(index: int) -> None:
        search.launch(given[0], given[1], given[2], out)

    timing = time_calls(kernel, repeat, "cuda", copy_in)
    row["kernel_us"], row["kernel_max_us"] = timing.median_ms * 1e3, timing.max_ms * 1e3
    row["kernel_launch_us"] = timing.launch_ms * 1e3
    row["share_of_copy_bandwidth"] = row["floor_us"] / row["kernel_us"]
    try:
        row["profiled_us"] = kernel_time_ms(kernel, repeat, ENTRY_POINT, copy_in) * 1e3
        row["profiled_share"] = row["floor_us"] / row["profiled_us"]
    except Exception as error:  # a machine whose counters are closed: the other figures still count
        row["no_profiled_us"] = describe(error)


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


class SearchTiming:
    """All rows of one run.

    Args:
      models: names in ``SHAPES``; those of one shape are one row.
      dtypes: names of torch.
      pairs: pairs of a search.
      tokens_per_block: tokens.
      repeat: timed calls; the median counts.
      device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        models: Sequence[str],
        dtypes: Sequence[str],
        pairs: Sequence[int],
        tokens_per_block: int,
        repeat: int,
        device: str,
    ) -> None:
        self._pairs, self._size, self._repeat, self._device = pairs, tokens_per_block, repeat, device
        self._names: dict[ModelShape, list[str]] = {}
        for name in models:
            self._names.setdefault(SHAPES[name], []).append(name)
        self._cases = [(shape, getattr(torch, dtype)) for dtype in dtypes for shape in self._names]
        self._bandwidth = copy_bandwidth(device, repeat)
        self._rows: dict[tuple[ModelShape, torch.dtype], list[dict[str, Any]]] = {}
        self._head = make_report(
            {"device": device, "tokens_per_block": tokens_per_block, "copy_gb_s": self._bandwidth / 1e9}
        )

    @property
    def report(self) -> dict[str, Any]:
        """What there is so far."""
        return {**self._head, "rows": [row for case in self._rows.values() for row in case]}

    def time_kernel(self) -> Iterator[None]:
        """Lays out the rows and, on a GPU, times the kernel at all of them; yields after each."""
        for shape, dtype in self._cases:
            pool = self._pool(shape, dtype)
            rows = self._rows[shape, dtype] = [
                {"model": ", ".join(self._names[shape]), "dtype": str(dtype).removeprefix("torch."), "pairs": count,
                 "read_mb": count * 2 * pool.block_bytes / 1e6,
                 "floor_us": count * 2 * pool.block_bytes / self._bandwidth * 1e6}
                for count in self._pairs
            ]  # fmt: skip
            if self._device != "cuda":
                continue
            search = CudaBlockDistance(pool.values, pool.inv_freq, max(self._pairs))
            try:
                rows[0]["kernel_relative_error"] = kernel_error(pool, search)
            except Exception as error:  # the reference's, which torch may not have for every dtype
                rows[0]["no_kernel_relative_error"] = describe(error)
            for row in rows:
                kernel_times(row, pool, search, self._repeat)
                yield

    def time_references(self, budget_s: float, forms: Sequence[str]) -> Iterator[None]:
        """Times forms of the reference at the rows that ``time_kernel`` laid out; yields after each row.

        Args:
          budget_s: seconds after which no form starts; a row says why it has none.
        """
        started = time.monotonic()
        for shape, dtype in self._cases if forms else []:
            pool = self._pool(shape, dtype)
            yield from references(
                self._rows[shape, dtype], pool, self._repeat, lambda: time.monotonic() - started > budget_s, forms
            )

    def _pool(self, shape: ModelShape, dtype: torch.dtype) -> Pool:
        if self._device == "cuda":
            torch.cuda.empty_cache()
        return Pool(shape, dtype, max(self._pairs), self._size, self._device)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row; '-' for what did not run."""
    columns = ("model", "dtype", "pairs", "read_mb", "floor_us", "kernel_us", "share_of_copy_bandwidth",
               "reference_us", "compiled_us")  # fmt: skip
    cells = [list(columns)]
    for row in rows:
        cells.append([f"{row[c]:.2f}" if isinstance(row.get(c), float) else str(row.get(c, "-")) for c in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
