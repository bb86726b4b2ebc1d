"""What the rows of the study of pages say: means, differences by problem, and a choice that is judged on what it has
not seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trtllm_memshare.evaluation.statistics import mcnemar, sign_flip, standard_error, wilson_interval

Row = dict[str, Any]
BASE = "random"


@dataclass(frozen=True)
class Setting:
    """Which rows are meant; lengths in tokens."""

    min_kept: float = 0.5
    tokens_per_block: int = 16
    tokens: int = 2048


@dataclass(frozen=True)
class Comparison:
    """One arm beside another on the texts that both have; nats unless the name says otherwise.

    Attributes:
      loss_change, loss_error: against the full cache: mean over problems, and its standard error.
      divergence: KL(full || arm). agreement: share of positions with the same most likely token.
      difference, difference_error: of the loss change, arm less base, by problem.
      ratio: of the two loss changes.
      p: of the difference, two-sided, by signs of problems.
      divergence_difference, divergence_error, divergence_p: the same of the divergence.
    """

    arm: str
    base: str
    texts: int
    problems: int
    loss_change: float
    loss_error: float
    divergence: float
    agreement: float
    memory_share: float
    difference: float
    difference_error: float
    ratio: float
    p: float
    divergence_difference: float
    divergence_error: float
    divergence_p: float


_HALF = Setting()


def select(rows: Iterable[Row], arm: str, setting: Setting = _HALF) -> dict[str, Row]:
    """An arm's rows by text."""
    wanted = asdict(setting)
    return {r["text"]: r for r in rows if r["arm"] == arm and all(r.get(k) == v for k, v in wanted.items())}


def compare(
    rows: list[Row], arm: str, base: str = BASE, setting: Setting = _HALF, other: Setting | None = None
) -> Comparison | None:
    """An arm against another, or against itself in another setting; None where they have no two problems in common.

    Args:
      other: setting of the base, None = the same.
    """
    ours, theirs = select(rows, arm, setting), select(rows, base, other or setting)
    common = [text for text in ours if text in theirs]
    problem = [ours[text]["problem"] for text in common]
    if len(set(problem)) < 2:
        return None
    loss = by_problem(problem, [ours[t]["loss_change"] for t in common])
    base_loss = by_problem(problem, [theirs[t]["loss_change"] for t in common])
    difference = loss - base_loss
    divergence = by_problem(problem, [ours[t]["divergence"] for t in common])
    diverges = divergence - by_problem(problem, [theirs[t]["divergence"] for t in common])
    itself = arm == base and other is None
    return Comparison(
        arm,
        base,
        len(common),
        len(loss),
        float(loss.mean()),
        standard_error(loss),
        float(divergence.mean()),
        float(by_problem(problem, [ours[t]["agreement"] for t in common]).mean()),
        float(np.mean([ours[t]["memory_share"] for t in common])),
        float(difference.mean()),
        standard_error(difference),
        float(loss.mean() / base_loss.mean()),
        1.0 if itself else sign_flip(difference),
        float(diverges.mean()),
        standard_error(diverges),
        1.0 if itself else sign_flip(diverges),
    )


def by_problem(problems: list[str], values: list[float]) -> np.ndarray:
    """Mean over the texts of each problem, since texts of one are not independent: float64 ``[problems]``."""
    grouped = defaultdict(list)
    for problem, value in zip(problems, values, strict=True):
        grouped[problem].append(value)
    return np.array([np.mean(of_one) for of_one in grouped.values()])


def leave_one_out(
    rows: list[Row], arms: list[str], setting: Setting = _HALF
) -> tuple[Comparison, dict[str, int]] | None:
    """The best arm as it would have been chosen on all other problems, judged on the one left out.

    Returns:
      The comparison with random pages, named ``best of the others``, and how often which arm was chosen.
    """
    tables = {arm: select(rows, arm, setting) for arm in [*arms, BASE]}
    common = [text for text in tables[BASE] if all(text in table for table in tables.values())]
    problems = sorted({tables[BASE][text]["problem"] for text in common})
    if len(problems) < 3:
        return None
    chosen_rows, chosen = [], Counter[str]()
    for problem in problems:
        others = [t for t in common if tables[BASE][t]["problem"] != problem]
        names = [tables[BASE][t]["problem"] for t in others]
        means = {arm: by_problem(names, [tables[arm][t]["loss_change"] for t in others]).mean() for arm in arms}
        best = min(means, key=lambda arm: means[arm])
        chosen[best] += 1
        left = [t for t in common if tables[BASE][t]["problem"] == problem]
        chosen_rows += [{**tables[best][t], "arm": "best of the others"} for t in left]
    found = compare([*chosen_rows, *tables[BASE].values()], "best of the others", BASE, setting)
    return None if found is None else (found, dict(chosen))


def loss_by_position(rows: Iterable[Row]) -> dict[int, float]:
    """Mean change of the loss in each bucket of positions, pooled over rows: nats a token."""
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for row in rows:
        for bucket, pair in row["by_position"].items():
            sums[int(bucket)] += pair
    return {bucket: float(total / count) for bucket, (total, count) in sorted(sums.items())}


@dataclass(frozen=True)
class Recall:
    """Of the questions that the full cache answers, those that an arm answers too; ``low`` to ``high``: 95 %.

    Attributes:
      by_kind: right and asked of each kind of fact.
      by_distance: right and asked by tokens from the statement to the end, upper bounds.
      p: McNemar's against random pages, None for those.
    """

    arm: str
    right: int
    asked: int
    low: float
    high: float
    pages_kept: float
    by_kind: dict[str, tuple[int, int]]
    by_distance: dict[int, tuple[int, int]]
    p: float | None


def recall(rows: list[Row], min_kept: float = 0.5, bounds: tuple[int, ...] = (400, 600, 800, 1100)) -> list[Recall]:
    """Every arm's recall with that share kept, from best to worst."""
    rows = [row for row in rows if row["min_kept"] == min_kept]
    answered = {r["text"]: [q["right"] for q in r["questions"]] for r in rows if r["arm"] == "full"}
    found: dict[str, dict[tuple[str, int], Row]] = defaultdict(dict)
    for row in rows:
        for i, question in enumerate(row["questions"]):
            if answered.get(row["text"], [False] * (i + 1))[i]:
                found[row["arm"]][row["text"], i] = question
    base = found.get(BASE, {})
    results = []
    for arm, questions in found.items():
        right = sum(q["right"] for q in questions.values())
        low, high = wilson_interval(right, len(questions))
        lost = sum(q["right"] and not questions[k]["right"] for k, q in base.items() if k in questions)
        gained = sum(not q["right"] and questions[k]["right"] for k, q in base.items() if k in questions)
        kinds, distances = defaultdict(list), defaultdict(list)
        for q in questions.values():
            kinds[q["kind"]].append(q["right"])
            distances[next(b for b in (*bounds, 10**6) if q["distance"] <= b)].append(q["right"])
        results.append(
            Recall(
                arm,
                right,
                len(questions),
                low,
                high,
                float(np.mean([q["pages_kept"] for q in questions.values()])),
                {kind: (sum(flags), len(flags)) for kind, flags in sorted(kinds.items())},
                {bound: (sum(flags), len(flags)) for bound, flags in sorted(distances.items())},
                None if arm == BASE else mcnemar(lost, gained),
            )
        )
    return sorted(results, key=lambda r: -r.right / r.asked)
