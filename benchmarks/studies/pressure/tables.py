"""Tables and figures of `docs/pressure.md` and `docs/pressure_figures.md` from the committed results."""

from __future__ import annotations

from typing import Any

import numpy as np

from trtllm_memshare.evaluation.random_model import SHAPES
from trtllm_memshare.evaluation.statistics import sign_flip, standard_error
from trtllm_memshare.evaluation.step_model import GpuModel


def schedule_table(report: dict[str, Any]) -> str:
    """One row for each pool and arm; requests/s against the better full cache of the same pool, by each clock."""
    clocks = [clock for clock in ("modelled_gpu", "modelled_gpu_null_read") if clock in report["rows"][0]]
    heads = ["pool", "arm", "steps", "in flight", "requests/s", "null pages read"][: 4 + len(clocks)]
    heads += ["p50 / p99, s", "first token, s", "paused", "recomputed tokens", "given up"]
    lines = [f"| {' | '.join(heads)} |", "| ---: | --- |" + " ---: |" * (len(heads) - 2)]
    for row in sorted(report["rows"], key=lambda row: row["pool_share"]):
        gpu = row["modelled_gpu"]
        gains = " | ".join(f"{_against_full(report, row, clock):.2f}" for clock in clocks)
        lines.append(
            f"| {row['pool_share']:g} | `{row['variant']}` | {row['num_steps']:,} | {row['mean_in_flight']:.1f} | "
            f"{gains} | {gpu['p50_latency_s']:.0f} / {gpu['p99_latency_s']:.0f} | "
            f"{gpu['mean_first_token_s']:.1f} | {row['paused_requests']} | {row['recomputed_tokens']:,.0f} | "
            f"{row['shared_block_fraction']:.0%} |"
        )
    return "\n".join(lines).replace("% |", " % |")


KV_LAYERS_AND_HEADS = {
    "DeepSeek-R1-Distill-Qwen-7B": (28, 4),
    "Qwen3-30B-A3B": (48, 4),
    "DeepSeek-R1-Distill-Llama-8B": (32, 8),
    "Qwen3-8B": (36, 8),
    "DeepSeek-R1-Distill-Qwen-32B, QwQ-32B, Qwen3-32B": (64, 8),
}
"""Layers and heads of keys, each of 128 elements, by the models' ``config.json``."""


def sizing_table(report: dict[str, Any], mean_tokens: int = 4096, pools_gib: tuple[int, ...] = (10, 40)) -> str:
    """Requests in flight that hold ``mean_tokens`` on average, in 16-bit caches: the full cache, then by floor.

    How many more run at a floor is counted: from the schedule in the shortest pool, where something always waits.
    """
    shortest = min(row["pool_share"] for row in report["rows"])
    in_flight = {row["variant"]: row["mean_in_flight"] for row in report["rows"] if row["pool_share"] == shortest}
    gains = [in_flight[arm] / in_flight["full"] for arm in ("full", *(f"pressure:min_kept={k}" for k in (0.75, 0.5)))]
    heads = ["model", "KiB a token"] + [head for gib in pools_gib for head in (f"{gib} GiB, all kept", "3/4", "1/2")]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for model, (num_layers, num_heads) in KV_LAYERS_AND_HEADS.items():
        token_bytes = num_layers * num_heads * 2 * 128 * 2
        full = [gib * 2**30 / (token_bytes * mean_tokens) for gib in pools_gib]
        cells = [f"{token_bytes // 1024}"] + [f"{int(requests * gain)}" for requests in full for gain in gains]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _against_full(report: dict[str, Any], row: dict[str, Any], clock: str) -> float:
    """Requests/s over those of the better full cache of the same pool."""
    full = max(
        other[clock]["request_throughput_req_s"]
        for other in report["rows"]
        if other["pool_share"] == row["pool_share"] and other["variant"] in ("full", "full-guaranteed")
    )
    return float(row[clock]["request_throughput_req_s"] / full)


def measured_gain(report: dict[str, Any], arm: str = "pressure:min_kept=0.5") -> float:
    """Requests/s of an arm over those of the full cache, by the clock of the run."""
    rows = {row["variant"]: row["request_throughput_req_s"] for row in report["variants"]}
    return float(rows[arm] / rows["full"])


def modelled_gain(report: dict[str, Any], arm: str = "pressure:min_kept=0.5", extra_ms: float = 0.0) -> float:
    """The same by the modelled clock; ``extra_ms``: if every step took so much longer than the model says."""
    num_requests = report["num_requests"] if "rows" in report else report["dataset"]["num_requests"]
    seconds = {
        row["variant"]: 1 / row["modelled_gpu"]["request_throughput_req_s"]
        + row["num_steps"] * extra_ms / 1e3 / num_requests
        for row in report["rows" if "rows" in report else "variants"]
    }
    return seconds["full"] / seconds[arm]


def modelled_step_ms(report: dict[str, Any], step: str = "replay_7b") -> float:
    """What the modelled clock gives for the mean step of a GPU suite's replay without sharing."""
    run = next(s["report"] for s in report["steps"] if s["step"] == step)
    shape, clock = SHAPES[run["model_shape"]], GpuModel()
    head_dim = shape.hidden_size // shape.num_heads
    per_token = shape.num_layers * 2 * shape.num_kv_heads * head_dim * 2  # K and V, bf16
    held = run["variants"]["off"]["mean_used_blocks"] * run["tokens_per_block"] * per_token
    return 1e3 * clock.step_seconds(run["batch_size"], held / clock.pool_bytes)


def loss_difference(
    report: dict[str, Any], what: str, arm: str, base: str = "pressure:min_kept=0.5,need=random"
) -> float:
    """Of two arms that replayed the same texts: ``mean`` of the difference of their losses in nats a token over the
    texts, its standard ``error``, or ``p`` of a sign-flip test; over problems, where the report has those of the texts.
    """
    losses = {row["variant"]: np.array(row["loss_by_request"]) for row in report["variants"]}
    differences = losses[arm] - losses[base]
    if (problems := report.get("problem_by_request")) is not None:
        differences = np.bincount(problems, differences) / np.bincount(problems)
    if what == "p":
        return sign_flip(differences)
    return float(differences.mean()) if what == "mean" else standard_error(differences)
