"""Tables of `benchmarks/studies/distances`."""

from __future__ import annotations

from typing import Any

from benchmarks.studies.distances.study import NO_DISTANCES
from benchmarks.studies.real_text.tables import align
from trtllm_memshare.evaluation.machine import one_line

SHOWN = (
    *(f"K and V, {vote}" for vote in ("worst", "quorum", "mean", "pooled", "first", "last")),
    *("K, worst", "V, worst", "K as stored, worst", "K as stored and V, pooled"),
    *(f"K quarter {n}, worst" for n in (1, 2, 3, 4)),
    *("K high half, worst", "K low half, worst", "K by frequency, worst", "K by wavelength, worst"),
    *("K by wavelength and V, worst", "K low half and V, mean", "K low half, last"),
    *("learned layers", "learned layers of K quarters and V"),
    *NO_DISTANCES,
)
"""Definitions in the printed tables; the report has all of them. The first is the one that the rest is held against."""

MEASURES = {
    "rank_correlation": "Spearman's rank correlation with the harm",
    "auc": "probability that a pair of the most harmful tenth is farther than another pair",
}

_WIDE = ("all", "near+similar")


def study_tables(report: dict[str, Any]) -> str:
    """What the pairs are like, how well each definition ranks them, and the harm that a threshold lets in."""
    ranked = [ranking_table(report, measure) for measure in MEASURES]
    return "\n\n".join((kinds_table(report), *ranked, acceptance_table(report), one_line(report["machine"])))


def kinds_table(report: dict[str, Any]) -> str:
    """One row per kind of pairs: default distance and harm."""
    rows = [["pairs", "number", "distance p10", "p50", "p90", "harm p50", "p90", "p99", "largest", "mean", "V alone"]]
    for kind, figures in report["kinds"].items():
        distances = [f"{figures['distance'][q]:.2f}" for q in ("p10", "p50", "p90")]
        means = [_micro(figures[key]) for key in ("mean_harm", "mean_harm_of_values")]
        harms = [_micro(figures["harm"][q]) for q in ("p50", "p90", "p99", "p100")]
        rows.append([kind, str(figures["pairs"]), *distances, *harms, *means])
    return (
        f"{align(rows)}\n\nharm: KL of one remap alone, mean over the tokens that follow, 1e-6 nats per token; "
        "distance: K and V, worst layer"
    )


def ranking_table(report: dict[str, Any], measure: str) -> str:
    """One of ``MEASURES`` of each definition, by group."""
    groups = report["groups"]
    kinds = [name for name in groups if name not in _WIDE]
    rows = [["definition", *(title for group in _WIDE for title in (group, "less the first's")), *kinds]]
    for name in SHOWN:
        row = [name]
        for group in _WIDE:
            figures = groups[group]["definitions"][name][measure]
            row += [f"{figures['value']:.2f}", _span(figures["gain_interval"], "+.3f")]
        rows.append([*row, *(f"{groups[kind]['definitions'][name][measure]['value']:.2f}" for kind in kinds)])
    counts = "; ".join(
        f"of {total} distances {better} lie above 0 and {worse} below for {group}"
        for group in _WIDE
        for better, worse, total in [count_different(report, group, measure)]
    )
    return (
        f"{align(rows)}\n\n{MEASURES[measure]}; test half: {groups['all']['pairs']} pairs of {groups['all']['texts']} "
        f"texts\nless the first's: 95 % interval of the difference; {counts}"
    )


def acceptance_table(report: dict[str, Any]) -> str:
    """Mean harm of the pairs that a threshold on each definition accepts."""
    titles = ["25 %", "50 %", "75 %", "ratio at 50 %", "at 75 %"]
    rows = [["definition", *titles, *titles]]
    for name in SHOWN:
        cells = []
        for group in _WIDE:
            accepted = report["groups"][group]["definitions"][name]["accepted"]
            cells += [_micro(a["harm"]) for a in accepted.values()]
            cells += [_span(accepted[share]["ratio_interval"], ".2g") for share in ("50", "75")]
        rows.append([name, *cells])
    means = [_micro(report["groups"][group]["mean_harm"]) for group in _WIDE]
    shares = [f"{100 * report['groups'][group]['top_percent_share']:.0f} %" for group in _WIDE]
    return (
        f"{align(rows)}\n\nmean harm, 1e-6 nats per token, of the nearest 25, 50 and 75 % of the pairs; left: all four "
        f"kinds, mean of all pairs {means[0]}; right: near and similar, {means[1]}\nratio: 95 % interval of the ratio "
        f"to the first definition's; the most harmful hundredth of the pairs makes {shares[0]} and {shares[1]} of it\n"
        f"{_confirmed(report)}"
    )


def by_definition(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A definition's figures by group of pairs, as the page's tables have them side by side."""
    groups = {name: report["groups"][name]["definitions"] for name in _WIDE}
    return {name: {group: groups[group][name] for group in groups} for name in groups["all"]}


def count_different(report: dict[str, Any], group: str, measure: str) -> tuple[int, int, int]:
    """Distances whose interval of the difference to the first lies above 0, below 0, and how many there are."""
    definitions = report["groups"][group]["definitions"]
    intervals = [d[measure]["gain_interval"] for n, d in definitions.items() if n not in (SHOWN[0], *NO_DISTANCES)]
    return sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals), len(intervals)


def above(report: dict[str, Any], group: str, measure: str) -> str:
    """How many distances are better than the first for sure, ``0 of 91``."""
    better, _, total = count_different(report, group, measure)
    return f"{better} of {total}"


def below(report: dict[str, Any], group: str, measure: str) -> int:
    """How many distances are worse than the first for sure."""
    return count_different(report, group, measure)[1]


def largest_weight(report: dict[str, Any]) -> float:
    """Of all weights that were learned."""
    return max(weight for entry in report["learned"].values() for row in entry["weights"] for weight in row)


def won(report: dict[str, Any], group: str) -> int:
    """Figures in which a fixed distance beat the first on the test half."""
    return count_confirmed(report, group)[0]


def won_twice(report: dict[str, Any], group: str) -> int:
    """Figures in which a fixed distance beat the first on both halves."""
    return count_confirmed(report, group)[1]


def count_confirmed(report: dict[str, Any], group: str) -> tuple[int, int]:
    """Figures in which a fixed distance beat the first on the test half, and how many of them it won again."""
    once = twice = 0
    for name, again in report["again"][group].items():
        first = report["groups"][group]["definitions"][name]
        for measure in MEASURES:
            won = [f[measure]["gain_interval"][0] > 0 for f in (first, again)]
            once, twice = once + won[0], twice + all(won)
        for share in first["accepted"]:
            won = [f["accepted"][share]["ratio_interval"][1] < 1 for f in (first, again)]
            once, twice = once + won[0], twice + all(won)
    return once, twice


def _confirmed(report: dict[str, Any]) -> str:
    counts = [(group, *count_confirmed(report, group)) for group in _WIDE]
    return "; ".join(
        f"{group}: {once} figures of all tables beat the first's, {twice} of them on the other half of the texts too"
        for group, once, twice in counts
    )


def _micro(harm: float) -> str:
    return f"{1e6 * harm:.3g}" if harm < 1e-3 else f"{1e6 * harm:.0f}"


def _span(interval: list[float], form: str) -> str:
    return " to ".join(format(v, form) for v in interval)
