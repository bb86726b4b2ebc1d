"""The pictures of the study of pages."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend has to be chosen first
import numpy as np

from trtllm_memshare.evaluation.page_study import PRESETS
from trtllm_memshare.evaluation.page_table import BASE, Recall, Row, Setting, compare, recall, select
from trtllm_memshare.report.plots import COLOURS
from trtllm_memshare.report.real_model import LABELS

_MARKERS = "o^"  # of the colours' first and second round
_MANY_TEXTS = 50
"""Arms with fewer have hollow points."""


def plot_loss_and_recall(rows: list[Row], recall_rows: list[Row], path: Path) -> None:
    """Writes a PNG: what each arm costs the next word (across) and what it still knows (up)."""
    known: dict[str, Recall] = {r.arm: r for r in recall(recall_rows)}
    figure, axis = plt.subplots(figsize=(11, 5.6), layout="constrained")
    # Presets hold nothing to a budget: what gives up next to nothing costs nothing.
    for i, arm in enumerate(arm for arm in LABELS if arm in known and arm not in PRESETS):
        c, r = compare(rows, arm), known[arm]
        if c is None:
            continue
        share = r.right / r.asked
        axis.errorbar(
            c.difference,
            share,
            xerr=c.difference_error if arm != BASE else None,
            yerr=np.array([[share - r.low], [r.high - share]]),
            fmt=_MARKERS[i // len(COLOURS)] if arm != BASE else "s",
            color=COLOURS[i % len(COLOURS)],
            markerfacecolor=None if c.texts >= _MANY_TEXTS else "white",
            capsize=3,
            label=f"{LABELS[arm].replace('`', '')} ({c.texts} texts)",
        )
    axis.set(
        xlabel="change of the loss beside random pages, nats a token (bars: standard error, by problem)",
        ylabel="facts stated once that are recalled (95 %)",
        ylim=(0.35, 1.02),
        title="Half of the generated pages given up: the next word and what was said",
    )
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curve(rows: list[Row], path: Path, model: str) -> None:
    """Writes a PNG: change of the loss against the share kept, one line an arm, of the longest texts of ``model``."""
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    lengths: list[int] = sorted({r["tokens"] for r in rows})
    texts = set[str]()
    for i, arm in enumerate(dict.fromkeys(r["arm"] for r in rows if r["arm"] != "full")):
        points: list[tuple[float, float]] = [(1.0, 0.0)]
        for kept in sorted({r["min_kept"] for r in rows if r["arm"] == arm}):
            found = select(rows, arm, Setting(kept, 16, lengths[-1]))
            if found:  # else this share was tried on shorter texts alone
                points.append((kept, float(np.mean([r["loss_change"] for r in found.values()]))))
            texts |= found.keys()
        points.sort()
        axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[i], label=LABELS[arm].replace("`", ""))
    axis.set(
        xlabel="share of the generated pages kept",
        ylabel="nats a token above the full cache",
        title=f"{model} on {len(texts)} reasoning texts of {lengths[-1]:,} tokens",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
