"""How well a distance foretells harm: rank correlation, harmful pairs told from others, harm that a threshold lets in.

Intervals are percentiles of a bootstrap over problems, since pairs of one problem are not independent. Definitions are
compared within each resample, so that what all of them share cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = (0.25, 0.5, 0.75)
"""Shares of the pairs that a threshold accepts."""

_HARMFUL_SHARE = 0.1


@dataclass(frozen=True)
class Judged:
    """Pairs whose harm is known.

    Attributes:
      harm: float64 ``[pairs]``, nats per token.
      problem: int ``[pairs]``, from 0 on.
      distances: by name of the definition, float64 ``[pairs]``; the first is what the others are compared with.
    """

    harm: np.ndarray
    problem: np.ndarray
    distances: dict[str, np.ndarray]

    def where(self, chosen: np.ndarray) -> Judged:
        """A part of the pairs. ``chosen``: bool ``[pairs]``."""
        distances = {name: values[chosen] for name, values in self.distances.items()}
        return Judged(self.harm[chosen], self.problem[chosen], distances)


def compare_definitions(
    judged: Judged, num_resamples: int = 1000, seed: int = 0, shares: tuple[float, ...] = SHARES
) -> dict[str, dict[str, Any]]:
    """Figures of each definition.

    Returns:
      by name: ``rank_correlation``, Spearman's; ``auc``, the probability that one of the most harmful tenth is farther
      than one of the others; each a ``value`` with ``interval``, and its ``gain`` over the first definition with
      ``gain_interval``. ``accepted``: for each of ``shares``, in percent, the mean ``harm`` of the pairs accepted, and
      its ``ratio`` to the first definition's with ``ratio_interval``. All intervals 95 %.
    """
    num_problems = int(judged.problem.max()) + 1
    present = np.unique(judged.problem)
    rng = np.random.default_rng(seed)
    draws = rng.choice(present, (num_resamples, len(present)))
    weights = [np.ones(len(judged.harm))]
    weights += [np.bincount(draw, minlength=num_problems)[judged.problem].astype(float) for draw in draws]
    harm_codes = _codes(judged.harm)
    harm_ranks = [weighted_midranks(harm_codes, w) for w in weights]
    harmful = judged.harm >= np.quantile(judged.harm, 1 - _HARMFUL_SHARE)
    correlations, aucs, accepted = {}, {}, {}
    for name, distances in judged.distances.items():
        codes = _codes(distances)
        ranks = [weighted_midranks(codes, w) for w in weights]
        both = zip(ranks, harm_ranks, weights, strict=True)
        correlations[name] = np.array([_correlation(rank, by_harm, w) for rank, by_harm, w in both])
        aucs[name] = np.array([_auc(rank, harmful, w) for rank, w in zip(ranks, weights, strict=True)])
        accepted[name] = np.array([accepted_harm(codes, judged.harm, w, shares) for w in weights])
    base = next(iter(judged.distances))
    return {
        name: {
            "rank_correlation": _against(correlations[name], correlations[base]),
            "auc": _against(aucs[name], aucs[base]),
            "accepted": {
                f"{100 * share:.0f}": {
                    "harm": _round(accepted[name][0, i]),
                    "ratio": _round(accepted[name][0, i] / accepted[base][0, i]),
                    "ratio_interval": _interval(accepted[name][:, i] / accepted[base][:, i]),
                }
                for i, share in enumerate(shares)
            },
        }
        for name in judged.distances
    }


def weighted_midranks(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks of values that occur ``weights`` times each, equal ones sharing their mean rank, less a constant.

    Args:
      codes: int ``[n]``, dense ranks of the values from 0 on.
      weights: float64 ``[n]``.

    Example: codes 0, 1, 1 with weights 2, 1, 1 are the values a, a, b, b; the ranks are 1, 3, 3.
    """
    counts = np.bincount(codes, weights)
    return (np.cumsum(counts) - counts / 2)[codes]


def accepted_harm(
    codes: np.ndarray, harm: np.ndarray, weights: np.ndarray, shares: tuple[float, ...] = SHARES
) -> list[float]:
    """Mean harm of the nearest pairs, for each of ``shares``; of pairs at one distance, as many as fit, pro rata.

    Args:
      codes: int ``[n]``, dense ranks of the distances from 0 on.
      harm: float64 ``[n]``.
      weights: float64 ``[n]``, how often each pair counts.
    """
    counts, sums = np.bincount(codes, weights), np.bincount(codes, weights * harm)
    before, total = np.cumsum(counts) - counts, counts.sum()
    means = []
    for share in shares:
        taken = np.clip((share * total - before) / np.maximum(counts, 1e-300), 0, 1)
        means.append(float((taken * sums).sum() / (share * total)))
    return means


def _codes(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's, of values that occur ``weights`` times each; 0 where one of them does not vary."""
    total = weights.sum()
    a, b = a - (weights @ a) / total, b - (weights @ b) / total
    scale = float(np.sqrt((weights @ a**2) * (weights @ b**2)))
    return float(weights @ (a * b)) / scale if scale > 0 else 0.0


def _auc(ranks: np.ndarray, harmful: np.ndarray, weights: np.ndarray) -> float:
    """Area under the receiver operating characteristic; nan in a resample without harmful pairs, or without others."""
    of_harmful = weights[harmful].sum()
    others = weights.sum() - of_harmful
    if of_harmful == 0 or others == 0:
        return float("nan")
    # Ranks count the pairs below and half of those level with one; among the harmful these are half of all couples.
    return float((weights[harmful] @ ranks[harmful] - of_harmful**2 / 2) / (of_harmful * others))


def _against(values: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """The first value and its difference to the base's, each with the interval of the resamples behind it."""
    difference = values - base
    return {
        "value": _round(values[0]),
        "interval": _interval(values),
        "gain": _round(difference[0]),
        "gain_interval": _interval(difference),
    }


def _interval(resampled: np.ndarray) -> list[float]:
    """Percentiles of all but the first entry, which is no resample."""
    return [_round(v) for v in np.nanpercentile(resampled[1:], (2.5, 97.5))]


def _round(value: float) -> float:
    return float(f"{value:.4g}")
