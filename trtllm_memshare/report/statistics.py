"""How sure a share of right answers is."""

from __future__ import annotations

import math

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
