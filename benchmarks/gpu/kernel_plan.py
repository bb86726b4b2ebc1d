"""Counted instructions and bytes of a search, and the times that they make; see ``benchmarks/kernel_plan.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.sass_count import KernelCount, count_kernel, disassemble
from trtllm_memshare.evaluation.document import make_report
from trtllm_memshare.search.config import MAX_PAIRS, make_config
from trtllm_memshare.search.kernel_compiler import compile_source
from trtllm_memshare.search.kernel_source import ELEMENT_TYPES, KernelVariant, kernel_source, num_layer_groups

LAYERS, KV_HEADS, HEAD_DIM, TOKENS = 28, 4, 128, 32
"""Of DeepSeek-R1-Distill-Qwen-7B, and of its blocks."""
WEIGHTS_READ = 2 * (7_615_616_512 - 152_064 * 3_584)
"""Bytes of bf16 weights that a decode step reads: all but the embedding, of which it reads rows."""
PAIRS = (1, 8, 64, 512, 4096)
STEPS = ((64, 2048), (64, 8192), (128, 576))
"""Batch size and tokens of each request, of the decode steps that are planned."""

_MEMORY_SHARE = 1.0  # of a copy's bandwidth: what 512 pairs take on an H200, which only read
_ISSUE_SHARE = 0.75
_REGISTERS, _REGISTERS_OF_THREAD = 65536, 128  # of a multiprocessor; what a thread may take, so no fewer blocks fit
_LATENCY_S = 0.8e-6  # of a load from DRAM
_LAUNCH_S = 3.1e-6  # what a kernel that does nothing takes between two events on an H200


@dataclass(frozen=True)
class Device:
    """``copy_bytes_s``: read and written by a device-to-device copy. ``clock_hz``: sustained."""

    multiprocessors: int
    copy_bytes_s: float
    clock_hz: float


DEVICES = {"H100": Device(132, 3.0e12, 1.755e9), "H200": Device(132, 4.29e12, 1.755e9)}
"""SXM boards. The copies are what torch reaches on such a card; that of an H200 is of gpu_h200_part1.json."""


def count(dtype: str, folder: Path | None = None) -> tuple[KernelVariant, KernelCount]:
    """The variant of a dtype, and what its machine code holds; ``folder``: with kernels of another checkout."""
    variant = KernelVariant(dtype, LAYERS, KV_HEADS, TOKENS, HEAD_DIM, HEAD_DIM)
    code = compile_source(kernel_source(folder=folder), "block_distance", variant.macros, "sm_90").code
    return variant, count_kernel(disassemble(code))


def plan_search(variant: KernelVariant, counted: KernelCount, pairs: int, device: Device) -> dict[str, float]:
    """Microseconds of one search by what could bound it, and what is expected; its share of a copy's bandwidth."""
    element_bytes = ELEMENT_TYPES[variant.dtype].element_bytes
    read = pairs * 2 * LAYERS * 2 * KV_HEADS * TOKENS * HEAD_DIM * element_bytes
    resident = device.multiprocessors * (_REGISTERS // (_REGISTERS_OF_THREAD * variant.num_threads))
    groups = num_layer_groups(pairs, LAYERS, resident)
    warps = pairs * variant.num_threads // 32
    # Sums over a warp and the rest of a layer: 20 shuffles and as many additions, some addresses.
    instructions = warps * (groups * counted.before_loop + LAYERS * (KV_HEADS * counted.loop + 60))
    memory = read / device.copy_bytes_s / _MEMORY_SHARE
    issue = instructions / (device.multiprocessors * 4 * device.clock_hz) / _ISSUE_SHARE
    turns = math.ceil(pairs * groups / resident) * math.ceil(LAYERS / groups) * KV_HEADS
    chain = (turns - 1) * _LATENCY_S
    before_data = _LAUNCH_S + counted.dependent_loads * _LATENCY_S
    expected = before_data + max(memory, issue, chain)
    return {"before_data_us": before_data * 1e6, "memory_us": memory * 1e6, "issue_us": issue * 1e6,
            "chain_us": chain * 1e6, "expected_us": expected * 1e6,
            "share_of_copy_bandwidth": memory * _MEMORY_SHARE / expected}  # fmt: skip


def plan_step(batch: int, tokens: int, device: Device, search_us: float) -> dict[str, Any]:
    """Milliseconds of a decode step in bf16 by what it reads, without a search, and what searches add to it."""
    cache = batch * tokens * LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    step = (WEIGHTS_READ + cache) / device.copy_bytes_s
    half = (WEIGHTS_READ + cache / 2) / device.copy_bytes_s
    interval = make_config("aligned").search_interval
    return {"batch": batch, "tokens": tokens, "weights_gb": WEIGHTS_READ / 1e9, "cache_gb": cache / 1e9,
            "step_ms": step * 1e3, "half_the_pages_null_ms": half * 1e3,
            "search_each_step": search_us * 1e-6 / step,
            "search_each_interval": search_us * 1e-6 / interval / step}  # fmt: skip


def measured(reports: list[Path]) -> list[dict[str, Any]]:
    """Rows of the suite's reports beside the plan: device, dtype, pairs, measured and planned microseconds."""
    rows = []
    for path in reports:
        report = json.loads(path.read_text())
        device = next((d for name, d in DEVICES.items() if name in report["device"]), None)
        for step in report["steps"]:
            figures = step.get("report", {})
            if device is None or figures.get("tokens_per_block") != TOKENS or "rows" not in figures:
                continue
            own = Device(device.multiprocessors, figures["copy_gb_s"] * 1e9, device.clock_hz)
            for row in figures["rows"]:
                if "kernel_us" in row:
                    planned = plan_search(*count(row["dtype"]), row["pairs"], own)["expected_us"]
                    rows.append({"device": report["device"], "dtype": row["dtype"], "pairs": row["pairs"],
                                 "kernel_us": row["kernel_us"], "planned_us": planned})  # fmt: skip
    return rows


def make_plan(dtypes: Sequence[str], reports: list[Path], before: Path | None) -> dict[str, Any]:
    """The whole plan as a report.

    Args:
      dtypes: element types; the first one's search is added to the steps.
      reports: of the suite, to hold the plan against.
      before: folder with kernels of an older checkout, to count beside these.
    """
    counted = {dtype: count(dtype) for dtype in dtypes}
    search = [
        {"card": card, "dtype": dtype, "pairs": pairs, **plan_search(*counted[dtype], pairs, device)}
        for card, device in DEVICES.items()
        for dtype in dtypes
        for pairs in PAIRS
        if pairs <= MAX_PAIRS
    ]
    steps = []
    for card, device in DEVICES.items():
        full = plan_search(*counted[dtypes[0]], make_config("aligned").max_pairs, device)["expected_us"]
        steps += [{"card": card, **plan_step(batch, tokens, device, full)} for batch, tokens in STEPS]
    return make_report({
        "kernel": f"sm_90, {LAYERS} layers, {KV_HEADS} KV heads of {HEAD_DIM}, {TOKENS}-token blocks",
        "devices": {card: asdict(device) for card, device in DEVICES.items()},
        "counted": {dtype: asdict(found) for dtype, (_, found) in counted.items()},
        "counted_before": {} if before is None else {d: asdict(count(d, before)[1]) for d in dtypes},
        "search": search, "step": steps, "measured": measured(reports),
    })  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The plan in lines; ``measured`` where there is something."""
    lines = [f"{'instructions':<22} {'before loop':>11} {'a head':>6} {'loads in a row':>14} {'barriers':>8}"]
    rows = [*report["counted"].items(), *((f"{n}, before", c) for n, c in report["counted_before"].items())]
    for dtype, c in rows:
        lines.append(f"{dtype:<22} {c['before_loop']:>11} {c['loop']:>6} {c['dependent_loads']:>14} "
                     f"{c['barriers_before_data']:>8}")  # fmt: skip
    names = ("before_data", "memory", "issue", "chain", "expected")
    titles = " ".join(f"{name.removesuffix('_data') + ' us':>11}" for name in names)
    lines.append(f"\n{'card':<5} {'dtype':<14} {'pairs':>5} {titles} {'of copy':>8}")
    for r in report["search"]:
        times = " ".join(f"{r[f'{name}_us']:>11.1f}" for name in names)
        share = r["share_of_copy_bandwidth"]
        lines.append(f"{r['card']:<5} {r['dtype']:<14} {r['pairs']:>5} {times} {share:>8.1%}")
    lines.append(f"\n{'card':<5} {'batch':>5} {'tokens':>6} {'step ms':>8} {'half null':>9} {'search each step':>16} "
                 f"{'each interval':>13}")  # fmt: skip
    for r in report["step"]:
        lines.append(f"{r['card']:<5} {r['batch']:>5} {r['tokens']:>6} {r['step_ms']:>8.2f} "
                     f"{r['half_the_pages_null_ms']:>9.2f} {r['search_each_step']:>16.2%} "
                     f"{r['search_each_interval']:>13.2%}")  # fmt: skip
    lines += [f"{r['device']}: {r['dtype']} {r['pairs']} pairs: measured {r['kernel_us']:.1f} us, planned "
              f"{r['planned_us']:.1f}" for r in report["measured"]] or ["\nmeasured: nothing yet"]  # fmt: skip
    return "\n".join(lines)
