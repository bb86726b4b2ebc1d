"""The fidelity curve as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_memshare.report.plots import COLOURS, plt

_Column = tuple[str, Callable[[dict[str, Any]], str]]


def fidelity_table(document: dict[str, Any]) -> str:
    """Plain-text table, one row per arm.

    Args:
      document: as ``benchmarks/fidelity.py`` writes it.
    """
    against = [name for name in document["against"] if name != "full"]
    columns: list[_Column] = [
        ("arm", lambda e: str(e["arm"])),
        ("right %", lambda e: _percent(e, "free", "accuracy", 2)),
        ("95 % interval", lambda e: _interval(e.get("free", {}).get("interval"))),
        ("same %", lambda e: _percent(e, "free", "same_answer_as_full", 2)),
        ("lost/gained", lambda e: _changes(e, "full")),
        ("p", lambda e: _p_value(e, "full")),
        *[(f"p {name}", _p_against(name)) for name in against],
        ("KL mnat", lambda e: _number(e, "kl_nats", 1000, 3)),
        ("±", lambda e: _number(e, "kl_standard_error", 1000, 3)),
        ("perplexity", lambda e: _number(e, "perplexity", 1, 5)),
        ("saved %", lambda e: _percent(e, "replay" if "replay" in e else "free", "memory_saved", 1)),
        ("shared %", lambda e: _percent(e, "replay" if "replay" in e else "free", "shared_block_fraction", 1)),
    ]
    rows = [[title for title, _ in columns], *([cell(e) for _, cell in columns] for e in document["arms"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", _LEGEND])


def plot_fidelity(document: dict[str, Any], path: Path) -> None:
    """Writes a PNG: accuracy, and divergence, against the memory saved, one mark per arm, and what no arm beats.

    Args:
      document: as ``benchmarks/fidelity.py`` writes it.
      path: file to write.
    """
    entries = document["arms"]
    panels = [kind for kind in ("free", "replay") if any(kind in e for e in entries)]
    families = list(dict.fromkeys(e["arm"].partition(":")[0] for e in entries))
    looks = [(COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]) for i in range(len(families))]
    figure, axes = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 5.4), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], panels, strict=True):
        points = [(e["arm"].partition(":")[0], _point(e, kind)) for e in entries if kind in e]
        # The full cache, and what shares nothing, has no place on a logarithmic axis.
        points = [(name, p) for name, p in points if kind == "free" or p[1] > 0]
        for name, (x, y, low, high) in points:
            colour, marker = looks[families.index(name)]
            bars = [[y - low], [high - y]]
            axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, markersize=7, capsize=3, elinewidth=0.9)
        frontier = pareto_frontier([(p[0], p[1]) for _, p in points], is_higher_better=kind == "free")
        axis.plot(*zip(*frontier, strict=True), color="#999999", linewidth=1.1, linestyle=":", zorder=1)
        axis.set_xlabel(f"KV memory saved{_at_equal_text(entries)}, % of the full cache's block-steps per request")
        axis.set_title(_TITLES[kind])
        axis.grid(alpha=0.25)
        axis.set_xlim(min(-1.5, axis.get_xlim()[0]), max(p[0] for _, p in points) + 1.5)
        if kind == "replay":
            axis.set_yscale("log")
    marks = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, (colour, marker) in zip(families, looks, strict=True)
    ]
    marks.append(plt.Line2D([], [], color="#999999", linestyle=":", label="not beaten in both"))
    axes[0][-1].legend(handles=marks, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(f"{document['engine_dir']}: {document['num_problems']} problems of {document['dataset']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pareto_frontier(points: list[tuple[float, float]], is_higher_better: bool) -> list[tuple[float, float]]:
    """Points that no other beats in both saving and value, by saving."""
    sign = 1 if is_higher_better else -1
    ordered = sorted(points, key=lambda p: (-p[0], -sign * p[1]))
    kept: list[tuple[float, float]] = []
    for point in ordered:
        if not kept or sign * point[1] > sign * kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def _point(entry: dict[str, Any], kind: str) -> tuple[float, float, float, float]:
    """(saved %, value, lower end, upper end) of one arm in one panel."""
    figures = entry[kind]
    saved = 100 * entry.get("replay", figures)["memory_saved"]
    if kind == "free":
        low, high = figures["interval"]
        return saved, 100 * figures["accuracy"], 100 * low, 100 * high
    value, error = max(figures["kl_nats"], 0.0), figures["kl_standard_error"]
    return saved, value, max(value - error, value / 10), value + error


def _at_equal_text(entries: list[dict[str, Any]]) -> str:
    return " at equal text" if any("replay" in e for e in entries) else ""


def _percent(entry: dict[str, Any], kind: str, key: str, digits: int) -> str:
    return f"{100 * entry[kind][key]:.{digits}f}" if kind in entry else "-"


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _changes(entry: dict[str, Any], name: str) -> str:
    test = entry.get("paired", {}).get(name)
    return f"{test['lost']}/{test['gained']}" if test else "-"


def _p_value(entry: dict[str, Any], name: str) -> str:
    test = entry.get("paired", {}).get(name)
    return f"{test['p_value']:.2g}" if test else "-"


def _p_against(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda entry: _p_value(entry, name)


def _number(entry: dict[str, Any], key: str, factor: float, digits: int) -> str:
    return f"{factor * entry['replay'][key]:.{digits}f}" if "replay" in entry else "-"


_MARKERS = "osD^vP*Xd"
_TITLES = {
    "free": "right answers in %, with 95 % intervals",
    "replay": "KL divergence from the full cache, nats per token, ± 1 standard error",
}
_LEGEND = (
    "same: final answer equal to the full cache's; lost/gained: problems against the full cache; p: McNemar's exact "
    "test\nagainst the full cache, and against the arm named; KL: from the full cache's distribution, per token read, "
    "with its\nstandard error over problems; saved: KV block-steps per request below the full cache's, at equal text "
    "where scores are\nteacher-forced; shared: blocks freed / blocks filled by generation"
)
