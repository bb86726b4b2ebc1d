"""The picture of a benchmark report: throughput, and memory and requests in flight over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend has to be chosen first

# Okabe and Ito's palette: told apart by colour-blind readers, and by lightness in print.
COLOURS = (
    "#000000",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#56B4E9",
    "#CC79A7",
    "#D55E00",
    "#7A7A7A",
    "#B8A800",
    "#5B3A8E",
    "#8C510A",
    "#1B7837",
    "#A50026",
)
_FIRST_LINES = ("full", "aligned")  # drawn thick and on top: what everything else is held against
_SMALL: dict[str, Any] = {"textcoords": "offset points", "color": "#444444", "fontsize": 9}
_CONTROLS = ("random", "streaming", "snapkv", "rkv", "shadow")  # drawn dashed: nothing that anyone would serve with


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG with three panels, one colour per variant.

    Args:
      report: as `benchmarks/inflight_batching.py` writes it.
      path: file to write.
    """
    variants = report["variants"]
    colours = {v["variant"]: COLOURS[i % len(COLOURS)] for i, v in enumerate(variants)}
    figure, (bars, blocks, flight) = plt.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    figure.suptitle(
        f"{report['engine']['engine_dir']}: {report['dataset']['num_requests']} requests, KV pool "
        f"{report['kv_cache_blocks']} blocks of {report['engine']['tokens_per_block']} tokens, "
        f"{report['scheduler_policy']}"
    )
    _draw_throughput(bars, variants, colours)
    for axis, key, label in (
        (blocks, "used_blocks", "KV blocks in use"),
        (flight, "requests_in_flight", "requests in flight"),
    ):
        for variant in variants:
            name, line = variant["variant"], variant["timeline"]
            first, style = name in _FIRST_LINES, "--" if name in _CONTROLS else "-"
            axis.plot(
                line["time_s"],
                line[key],
                color=colours[name],
                linewidth=2.4 if first else 1.1,
                linestyle=style,
                zorder=3 if first else 2,
                label=name,
            )
        axis.set_xlabel("time in s")
        axis.set_title(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    pool = report["kv_cache_blocks"]
    blocks.axhline(pool, color="#666666", linestyle=":", linewidth=1.2)
    blocks.annotate("pool", (1, pool), xycoords=("axes fraction", "data"), xytext=(-4, 3), **_SMALL, ha="right")
    blocks.set_ylim(top=pool * 1.08)  # room for the label above the line
    flight.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_throughput(axis: Any, variants: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Requests per second as bars, with right answers per second inside them where there are answers."""
    names = [v["variant"] for v in variants]
    rates = [v["request_throughput_req_s"] for v in variants]
    right = [v["correct_answers_per_s"] for v in variants]
    has_answers, rows = None not in right, range(len(names))
    axis.barh(rows, rates, color=[colours[n] for n in names], alpha=0.35)
    if has_answers:
        axis.barh(rows, right, color=[colours[n] for n in names], height=0.45)
    for row, rate, answers in zip(rows, rates, right, strict=True):
        label = f"{rate:.2f}" + (f" ({answers:.2f})" if has_answers else "")
        axis.annotate(label, (rate, row), xytext=(3, 0), **_SMALL, va="center")
    axis.set_yticks(rows, names)
    axis.invert_yaxis()
    axis.set_xlim(0, max(rates) * 1.3)
    axis.set_xlabel("per second")
    axis.set_title("requests, pale (right answers, solid)" if has_answers else "requests")


def plot_pressure(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG: requests per second against the size of the pool, and the ratio beside its ceiling.

    Args:
      document: as ``benchmarks/studies/sweeps/pools.py`` writes it.
      path: file to write.
    """
    points = document["points"]
    shares = [p["share"] for p in points]
    figure, (rates, ratios) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, colour in zip(("full", "full-guaranteed", "aligned"), COLOURS, strict=False):
        values = [v["request_throughput_req_s"] for p in points for v in p["variants"] if v["variant"] == name]
        rates.plot(shares, values, color=colour, marker="o", label=name)
    rates.set_title("requests per second")
    ratios.plot(shares, [p["ratio"] for p in points], color=COLOURS[2], marker="o", label="aligned / better full")
    ratios.axhline(document["ceiling"], color="#666666", linestyle=":", label="ceiling: resident blocks saved")
    ratios.axhline(1, color="#666666", linewidth=0.8)
    ratios.set_title("ratio")
    for axis in (rates, ratios):
        axis.set_xlabel("KV pool / the full cache's peak demand")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
