"""How much each page is still needed, from what is known of it: what memory pressure ranks pages by.

A page is one block of one request over all layers and heads. The same functions rank pages in serving and in the
studies. Lower goes first. Where a formula joins importance and redundancy it is R-KV's (arXiv 2505.24133):
``0.1 * importance - 0.9 * redundancy``, with importance on the scale of the request's most important page.

Example: redundancies 0.9 and 0.6, attention 0.02 and 0.01 -> needs 0.1 * 1.0 - 0.9 * 0.9 = -0.71 and
0.1 * 0.5 - 0.9 * 0.6 = -0.49: the first page goes first, although it is read more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trtllm_memshare.errors import UserError, nearest

IMPORTANCE_WEIGHT = 0.1  # lambda of R-KV
_MIDDLING = 0.5  # importance of a page, on the scale of the most important one, where that of none is known
LED_WEIGHT = 0.25
"""Of surprisal against redundancy from signatures, whose cosines spread wider than those of whole keys. Chosen on ten
texts that are in no table: they keep 0.97 of the pages of facts stated once, 0.91 with a tenth."""
RECENCY_WEIGHT = 0.05  # of the newest page that may go, above the oldest
LED_RECENCY_WEIGHT = 0.2
"""Of the newest page above the oldest beside surprisal and redundancy from signatures, by the logarithm of the age.
Chosen on texts that are in no table, among 0.1, 0.2 and 0.4, and against recency that falls evenly: at the same facts
kept it costs the next word less; with 0.4 facts that were stated long ago are lost."""
_NEAR = 8  # pages: age counts by how many times as many lie between
REDUNDANCY_RECENCY_WEIGHT = 0.2
"""The same beside redundancy from signatures alone. Chosen among 0.1, 0.2, 0.4 and 0.8 on texts that are in no table:
0.1 is no better than random pages for the next word, and from 0.4 on facts that were stated long ago are lost."""


@dataclass(frozen=True)
class PageFacts:
    """What is known of the pages of one request that may go, each ``[pages]``; None = not measured.

    Attributes:
      position: int32, logical index of the page in its request.
      redundancy: float32 in [-1, 1], the mean over a page's tokens of the largest cosine with any later resident token.
      attention: float32, mean attention that the page got from each query since it was written, over layers and heads.
      recent_attention: float32, the same from the last queries only (SnapKV's observation window).
      surprisal: float32, -log p of the page's tokens when they were sampled, summed, in nats.
      draw: float32 in [0, 1), a number drawn for each page.
      distance: float32, of the page to the earlier one that would be read in its place, as stored and relative (see
        ``nearest_page``); inf = there is none.
    """

    position: np.ndarray
    redundancy: np.ndarray | None = None
    attention: np.ndarray | None = None
    recent_attention: np.ndarray | None = None
    surprisal: np.ndarray | None = None
    draw: np.ndarray | None = None
    distance: np.ndarray | None = None


@dataclass(frozen=True)
class Need:
    """A formula and the facts that it reads, by their names in ``PageFacts``."""

    facts: tuple[str, ...]
    formula: Callable[..., np.ndarray]

    @property
    def finds_repeats(self) -> bool:
        """Whether exact repeats go first; the published choice looks at pairs of pages alone."""
        return "distance" not in self.facts


def find_need(name: str) -> Need:
    """A formula by its name. Raises UserError for an unknown one."""
    if name not in NEEDS:
        raise UserError(f"unknown need {name} ({nearest(name, NEEDS)})")
    return NEEDS[name]


def page_need(name: str, facts: PageFacts) -> np.ndarray:
    """Need of each page, float32 ``[pages]``; lower goes first.

    Raises:
      UserError: unknown name.
      ValueError: a fact that the formula reads was not measured.
    """
    need = find_need(name)
    values = [getattr(facts, fact) for fact in need.facts]
    missing = [fact for fact, value in zip(need.facts, values, strict=True) if value is None]
    if missing:
        raise ValueError(f"need {name} reads {', '.join(need.facts)}, got no {', '.join(missing)}")
    return np.asarray(need.formula(*values), np.float32)


def _relative(importance: np.ndarray) -> np.ndarray:
    """Importance on the scale of the most important page; zeros where nothing is important.

    A page whose importance is not known has that of a middling page, so that the other facts decide over it.
    """
    is_known = np.isfinite(importance)
    all_known = bool(is_known.all())
    known = importance if all_known else importance[is_known]
    top = known.max(initial=0.0)
    relative = importance / top if top > 0 else np.zeros_like(importance)
    if all_known:
        return relative
    return np.where(is_known, relative, relative[is_known].mean() if len(known) else _MIDDLING)


def _with_redundancy(importance: np.ndarray, redundancy: np.ndarray, weight: float = IMPORTANCE_WEIGHT) -> np.ndarray:
    return weight * _relative(importance) - (1 - weight) * redundancy


def _led_by_surprisal(surprisal: np.ndarray, redundancy: np.ndarray) -> np.ndarray:
    return _with_redundancy(surprisal, redundancy, LED_WEIGHT)


def _recency(position: np.ndarray) -> np.ndarray:
    """0 of the oldest page that may go, 1 of the newest."""
    since_oldest = position - position.min(initial=np.iinfo(np.int32).max)
    return _relative(since_oldest.astype(np.float32))


def _nearness(position: np.ndarray) -> np.ndarray:
    """1 of the newest page that may go, 0 of the oldest, falling with the logarithm of the age.

    What the next word needs lies near; of two pages far back the older one is hardly needed less.
    """
    age = position.max(initial=0) - position
    oldest = np.log1p(age.max(initial=0) / _NEAR)
    return 1 - np.log1p(age / _NEAR) / oldest if oldest > 0 else np.zeros(len(position))


def _with_recency(attention: np.ndarray, redundancy: np.ndarray, position: np.ndarray) -> np.ndarray:
    return _with_redundancy(attention, redundancy) + RECENCY_WEIGHT * _recency(position)


def _redundancy_with_recency(redundancy: np.ndarray, position: np.ndarray) -> np.ndarray:
    return REDUNDANCY_RECENCY_WEIGHT * _recency(position) - redundancy


def _led_with_recency(surprisal: np.ndarray, redundancy: np.ndarray, position: np.ndarray) -> np.ndarray:
    return _led_by_surprisal(surprisal, redundancy) + LED_RECENCY_WEIGHT * _nearness(position)


def _both_with_redundancy(attention: np.ndarray, surprisal: np.ndarray, redundancy: np.ndarray) -> np.ndarray:
    return _with_redundancy(_relative(attention) + _relative(surprisal), redundancy)


NEEDS: dict[str, Need] = {
    "random": Need(("draw",), lambda draw: draw),
    "age": Need(("position",), lambda position: position),  # StreamingLLM: the oldest page goes first
    "attention": Need(("recent_attention",), lambda attention: attention),  # SnapKV, by page
    "nearest-earlier": Need(("distance",), lambda distance: distance),  # the paper, at a budget
    "surprisal": Need(("surprisal",), lambda surprisal: surprisal),
    "redundancy": Need(("redundancy",), lambda redundancy: -redundancy),
    "redundancy-recency": Need(("redundancy", "position"), _redundancy_with_recency),
    "recent-attention-redundancy": Need(("recent_attention", "redundancy"), _with_redundancy),  # R-KV, by page
    "attention-redundancy": Need(("attention", "redundancy"), _with_redundancy),
    "attention-redundancy-recency": Need(("attention", "redundancy", "position"), _with_recency),
    "surprisal-redundancy": Need(("surprisal", "redundancy"), _with_redundancy),
    "surprisal-led-redundancy": Need(("surprisal", "redundancy"), _led_by_surprisal),
    "surprisal-led-redundancy-recency": Need(("surprisal", "redundancy", "position"), _led_with_recency),
    "attention-surprisal-redundancy": Need(("attention", "surprisal", "redundancy"), _both_with_redundancy),
}
