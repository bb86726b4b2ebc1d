"""Tables and the picture of `benchmarks/studies/real_text`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from trtllm_memshare.evaluation.machine import one_line

_MARKS = {
    "paper": "s", "aligned": "o", "lexical": "D", "drop-duplicate": "v", "random": "x", "streaming": "^",
    "snapkv": "<", "rkv": ">",
}  # fmt: skip
_COLOURS = {
    "paper": "#E69F00",
    "aligned": "#0072B2",
    "lexical": "#56B4E9",
    "drop-duplicate": "#009E73",
    "random": "#D55E00",
    "streaming": "#CC79A7",
    "snapkv": "#F0E442",
    "rkv": "#666666",
}


def reach_table(report: dict[str, Any]) -> str:
    """Share of generated blocks within reach of stage 1, in percent, by setting and tokens per block."""
    sizes = report["tokens_per_block"]
    titles = [
        "stage 1",
        *(f"{s.removeprefix('r1_')} {size}" for s in report["num_traces"] for size in sizes),
        "us",
        "16k",
    ]
    rows = [titles]
    for row in report["rows"]:
        cells = [f"{100 * row['ratio'][source][str(size)]:.2f}" for source in report["num_traces"] for size in sizes]
        rows.append([row["settings"], *cells, f"{row['us_per_token']:.1f}", f"{row['us_per_token_16k']:.1f}"])
    note = (
        "share of the blocks filled by generation, %, by source and tokens per block, if stage 2 accepted everything\n"
        "us: processor time per token of stage 1 and remaps at 16 tokens per block, median over traces; 16k: of those "
        "with at least 16,000 tokens"
    )
    return f"{align(rows)}\n\n{note}\n{one_line(report['machine'])}"


def fidelity_table(report: dict[str, Any]) -> str:
    """One row per arm: share, memory, perplexity, divergence."""
    rows = [["arm", "settings", "shared %", "memory %", "perplexity", "above full %", "s.e.", "KL, 1e-3 nats"]]
    for arm in report["arms"]:
        changes = arm["loss_change_by_text"]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
        rows.append(
            [
                arm["variant"],
                arm["overrides"] or "-",
                f"{100 * arm['shared_ratio']:.2f}",
                f"{100 * arm['memory_ratio']:.1f}",
                f"{arm['perplexity']:.4f}",
                f"{100 * arm['perplexity_increase']:+.3f}",
                f"{100 * error:.3f}",
                f"{1e3 * arm['mean_divergence']:.3f}",
            ]
        )
    note = (
        "shared: blocks freed / blocks filled by generation; memory: block-steps against the full cache\n"
        "s.e.: standard error, over texts, of the mean change of the loss, 0.01 nats (about 1 % of perplexity)\n"
        f"{report['num_scripts']} texts of {report['num_problems']} problems that training never saw, "
        f"{report['num_tokens']} tokens, {report['tokens_per_block']} tokens per block"
    )
    return f"{align(rows, left=2)}\n\n{note}\n{one_line(report['machine'])}"


def paired_row(report: dict[str, Any], tokens_per_block: int) -> str:
    """`aligned` less each control at runs of 4, paired by text: mean and standard error in 0.01 nats."""
    cells = []
    for control in ("drop-duplicate", "random", "streaming"):
        pairs = _paired(report, control)
        cells.append(f"{statistics.mean(pairs):+.2f} ({_standard_error(pairs):.2f})")
    return f"| {tokens_per_block} | {' | '.join(cells)} |"


def standard_errors_ahead(report: dict[str, Any], control: str) -> float:
    """By how many of its standard errors `aligned` is ahead of a control at runs of 4."""
    pairs = _paired(report, control)
    return -statistics.mean(pairs) / _standard_error(pairs)


def texts_ahead(report: dict[str, Any], control: str) -> str:
    """On how many texts it is, ``9 of 10``."""
    pairs = _paired(report, control)
    return f"{sum(difference < 0 for difference in pairs)} of {len(pairs)}"


def _paired(report: dict[str, Any], control: str) -> list[float]:
    """Change of the loss of `aligned` less the control's, one for each text, in 0.01 nats."""
    arms = [arm for arm in report["arms"] if arm["overrides"].startswith("shingle_tokens=4")]
    changes = {arm["variant"]: arm["loss_change_by_text"] for arm in arms}
    return [100 * (a - c) for a, c in zip(changes["aligned"], changes[control], strict=True)]


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def kept_validation_loss(log: dict[str, Any]) -> float:
    """Of the step whose weights were kept, nats a token."""
    return next(entry["validation_loss"] for entry in log["log"] if entry["step"] == log["kept_step"])


def copying_table(report: dict[str, Any]) -> str:
    """One row per run: the loss on a second copy of 128 tokens along it, and at its end on other lengths."""
    rows = [["step", *(str(entry["step"]) for entry in report["runs"][0]["log"]), "of 16", "of 512"]]
    for run in report["runs"]:
        last = run["log"][-1]
        losses = [*(entry["128"] for entry in run["log"]), last["16"], last["512"]]
        rows.append([run["variant"], *(f"{loss:.2f}" for loss in losses)])
    note = "nats per token on the second copy of 128 random tokens, at the end of 16 and of 512 as well"
    return f"{align(rows)}\n\n{note}\n{one_line(report['machine'])}"


def align(rows: list[list[str]], left: int = 1) -> str:
    """Plain-text table with a rule under its first row; the first ``left`` columns are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def plot_fidelity(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG: perplexity above the full cache against memory saved, one mark for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for axis, key, scale, title in (
        (axes[0], "perplexity_increase", 100, "perplexity above the full cache, %"),
        (axes[1], "mean_divergence", 1e3, "KL from the full cache, 0.001 nats per token"),
    ):
        for name, mark in _MARKS.items():
            arms = sorted(
                (100 * (1 - a["memory_ratio"]), scale * a[key]) for a in report["arms"] if a["variant"] == name
            )
            if arms:
                axis.plot(*zip(*arms, strict=True), mark, color=_COLOURS[name], linestyle="none", label=name)
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_xlabel("KV memory saved (block-steps), %")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].axhline(1, color="#666666", linestyle=":", label="goal: 1 %")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"Real text: {report['num_problems']} unseen problems, {report['num_tokens']} tokens, teacher-forced"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
