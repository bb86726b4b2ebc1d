"""How sure a share of right answers is, or a mean difference of two arms."""

from __future__ import annotations

import math

import numpy as np

_Z = 1.959963984540054  # of a two-sided 95 % interval


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson's score interval), in [0, 1].

    Example: 99 of 100 right lie between 0.9455 and 0.9982.

    Raises:
      ValueError: no trials, or more successes than trials.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"a proportion needs 0 <= right <= count and count > 0, got {right} of {count}")
    share, z2 = right / count, _Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value of McNemar's test: are losses and gains between two arms equally likely?

    Under equal arms each problem that only one of them has right is a fair coin; only those count. Example: 1 lost and
    7 gained give 2 * (1 + 8) / 2^8 = 0.0703.

    Args:
      lost: problems that only the first arm has right.
      gained: problems that only the second arm has right.
    """
    count = lost + gained
    tail = sum(math.comb(count, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**count)


def paired_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """95 % interval of the change of a proportion between two arms on the same problems (Bonett and Price 2012).

    Wald's interval with one pseudo-observation in each of the two discordant cells, so that it has a width when
    nothing was lost and nothing gained.

    Args:
      lost, gained: as for ``mcnemar``.
      count: problems.

    Raises:
      ValueError: more changes than problems, or no problems.
    """
    if lost < 0 or gained < 0 or lost + gained > count or count == 0:
        raise ValueError(f"paired counts need 0 <= lost + gained <= count > 0, got {lost} + {gained} of {count}")
    minus, plus = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    half = _Z * math.sqrt((plus + minus - (plus - minus) ** 2) / (count + 2))
    return max(-1.0, plus - minus - half), min(1.0, plus - minus + half)


def standard_error(values: np.ndarray) -> float:
    """Of a mean of independent values, e.g. one a problem; NaN for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def sign_flip(differences: np.ndarray, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences: how often random signs give a mean as far from 0 as theirs.

    Every assignment of signs is tried where there are no more than ``draws`` of them. Example: differences 1, 2 and 3
    all point one way, as 2 of 8 assignments do: p = 0.25.

    Args:
      differences: ``[n]``, of independent pairs, e.g. one a problem.

    Returns:
      NaN where a difference is none.
    """
    count, whole = len(differences), float(np.abs(differences).sum())
    if not np.isfinite(whole):
        return float("nan")
    least = abs(differences.sum()) - 1e-9 * whole  # sums of the same numbers differ by rounding
    if 2**count <= draws:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        sums = np.abs((1 - 2 * bits) @ differences)
        return float((sums >= least).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, 10_000):
        signs = rng.integers(0, 2, (min(10_000, draws - start), count)) * 2 - 1
        hits += int((np.abs(signs @ differences) >= least).sum())
    return (hits + 1) / (draws + 1)


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values of several comparisons, each raised so that by chance at most one table in twenty has any below 0.05.

    Holm's step-down method: the smallest of ``n`` counts ``n`` times, the next ``n - 1`` times, and none comes out
    smaller than one before it. Example: 0.01, 0.04 and 0.03 give 0.03, 0.06 and 0.06.

    Args:
      p_values: float64 ``[n]``.
    """
    order = np.argsort(p_values, kind="stable")
    raised = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    result = np.empty(len(p_values))
    result[order] = np.minimum(raised, 1.0)
    return result


def ratio_interval(ours: np.ndarray, theirs: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``ours.mean() / theirs.mean()`` of paired values, by the percentiles of a bootstrap over pairs.

    Args:
      ours, theirs: ``[n]``, of independent pairs, e.g. one a problem.
    """
    drawn = np.random.default_rng(seed).integers(0, len(ours), (draws, len(ours)))
    low, high = np.percentile(ours[drawn].mean(1) / theirs[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)
