"""What workers tell the scheduler of a request's pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WORKERS_FACTS = frozenset({"redundancy", "surprisal", "distance"})
"""Facts of pages, by their names in ``PageFacts``, that only a worker knows."""


class PageDistances(NamedTuple):
    """Distances of pages ``new``, int32 ``[n]``, to pages ``old``, int32 ``[m]``: float32 ``[n, m]``."""

    new: np.ndarray
    old: np.ndarray
    distance: np.ndarray


class PageReport(NamedTuple):
    """What a worker knows of a request's pages, float32 ``[pages]``, NaN = nothing; None = it was not asked."""

    redundancy: np.ndarray | None = None
    surprisal: np.ndarray | None = None
    distances: PageDistances | None = None
