"""What arms write on their own beside the full cache, in tables of Markdown for the page of the real model."""

from __future__ import annotations

import numpy as np

from trtllm_memshare.evaluation.free_generation import ARMS, FULL
from trtllm_memshare.evaluation.page_table import Row, by_problem
from trtllm_memshare.evaluation.statistics import sign_flip, standard_error
from trtllm_memshare.report.real_model import LABELS, p_value

_HEAD = (
    "| what goes | floor | texts | kept | ended itself | tokens | against the full cache | p | repeated | "
    "against the full cache | p | distinct 4-grams | first difference |"
)


def generation_table(rows: list[Row], decoding: str) -> str:
    """One line an arm and floor: each is held against the full cache on its own texts, problem by problem.

    Of runs of several lengths the longest counts.

    Means are over problems, errors are standard errors over them. ``first difference``: the quartiles over texts of the
    first token that is not the full cache's, one that never differs as infinity.
    """
    longest = max((row["tokens"] for row in rows), default=0)
    chosen = [row for row in rows if row["decoding"] == decoding and row["tokens"] == longest]
    floors = sorted({row["min_kept"] for row in chosen}, reverse=True)
    tables = {
        (arm, floor): {r["text"]: r for r in chosen if (r["arm"], r["min_kept"]) == (arm, floor)}
        for arm in ARMS
        for floor in floors
    }
    lines = [_HEAD, f"| --- | {' | '.join(['---:'] * (_HEAD.count('|') - 2))} |"]
    lines += [_line(*kind, table, tables[FULL, 1.0]) for kind, table in tables.items() if table]
    return "\n".join(lines)


def _line(arm: str, floor: float, ours: dict[str, Row], full: dict[str, Row]) -> str:
    texts = list(ours)
    problems = [ours[text]["problem"] for text in texts]

    def means(table: dict[str, Row], field: str) -> np.ndarray:
        return by_problem(problems, [float(table[text][field]) for text in texts])

    def against(field: str, form: str) -> str:
        if arm == FULL:
            return "| "
        difference = means(ours, field) - means(full, field)
        shown = f"{format(difference.mean(), '+' + form)} ± {format(standard_error(difference), form)}"
        return f"{shown} | {p_value(sign_flip(difference))}"

    ended = sum(ours[text]["ended"] for text in texts)
    return (
        f"| {LABELS[arm]} | {'' if arm == FULL else f'{floor:.0%}'} | {len(texts)} | "
        f"{means(ours, 'kept').mean():.0%} | {ended} | {means(ours, 'length').mean():.0f} | "
        f"{against('length', '.0f')} | "
        f"{means(ours, 'repeated').mean():.2f} | {against('repeated', '.2f')} | "
        f"{means(ours, 'distinct_4').mean():.2f} | {'' if arm == FULL else _quartiles(ours)} |"
    )


def _quartiles(rows: dict[str, Row]) -> str:
    places = [np.inf if row["differs_at"] is None else row["differs_at"] for row in rows.values()]
    found = np.quantile(places, [0.25, 0.5, 0.75], method="inverted_cdf")
    return " / ".join("never" if np.isinf(place) else f"{place:.0f}" for place in found)
