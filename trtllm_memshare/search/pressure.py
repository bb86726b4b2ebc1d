"""Which pages go when a pool is short of memory: from what each request may give up to a choice over all of them.

Pure arithmetic on numpy arrays. Whoever serves (our executor, vLLM, TensorRT-LLM's PyTorch backend) describes its
requests by ``PressureView`` and carries out what ``choose_pages`` returns. A page is a full block of generated tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Spread = Literal["longest", "equal", "need"]
"""Who gives pages first: the request with most room, all by the same share of their room, or whose page is needed
least wherever it is."""


@dataclass(frozen=True)
class PressureView:
    """What one request could give up.

    Attributes:
      request_id: whatever its owner calls it.
      pages: int32 ``[n]``, logical pages that may go: full, generated, not protected, still the request's own.
      need: float32 ``[n]``, how much each is needed; **lower goes first**. NaN counts as needed most.
      repeated: bool ``[n]``, pages whose text the request still holds elsewhere; they go before any other page, and
        below the floor too: nothing that was said is lost with them.
      room: how many pages, repeats among them, may go before the request is at its floor, see ``floor_room``.
    """

    request_id: int
    pages: np.ndarray
    need: np.ndarray
    repeated: np.ndarray
    room: int

    def __post_init__(self) -> None:
        """Raises ValueError for arrays of unequal length or a negative room."""
        lengths = len(self.pages), len(self.need), len(self.repeated)
        if len(set(lengths)) > 1 or self.room < 0:
            raise ValueError(
                f"pages, need and repeated must have one length and room must not be negative, got lengths {lengths} "
                f"and room {self.room} (request {self.request_id})"
            )

    @property
    def most(self) -> int:
        """How many pages may go: all repeats, and others while there is room."""
        return max(int(np.count_nonzero(self.repeated)), min(self.room, len(self.repeated)))


def floor_room(num_generated_pages: int, num_retired: int, min_kept: float) -> int:
    """How many pages a request may still give up: what it keeps, less ``ceil(min_kept * num_generated_pages)``.

    Args:
      num_generated_pages: full pages of generated tokens, those given up included.
      num_retired: how many of them were given up already.
      min_kept: share that stays, in [0, 1].

    Example: of 9 pages with 3 given up and min_kept 0.5, 6 are kept and 5 must be: one may go.
    """
    # The product of a share such as 0.55 and a count can come out a hair above the integer that is meant.
    floor = math.ceil(min_kept * num_generated_pages - 1e-9)
    return max(0, num_generated_pages - num_retired - floor)


@dataclass(frozen=True)
class Watermarks:
    """When pages are given up, and until when; shares of the pool in use.

    Nothing happens while use stays at or below ``high``. A step that would pass it gives pages up until ``low``, so
    that the next steps find room: the distance of the two is the hysteresis.
    """

    high: float
    low: float

    def __post_init__(self) -> None:
        """Raises ValueError unless 0 < low <= high <= 1."""
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"watermarks must satisfy 0 < low <= high <= 1, got low {self.low} and high {self.high}")

    def pages_to_free(self, num_used: int, num_wanted: int, num_pages: int) -> int:
        """Pages to give up before ``num_wanted`` more are taken of a pool of ``num_pages``; 0 below the high mark."""
        after = num_used + num_wanted
        return after - math.floor(self.low * num_pages) if after > self.high * num_pages else 0


def choose_pages(views: list[PressureView], num_pages: int, spread: Spread = "need") -> list[tuple[int, np.ndarray]]:
    """The pages to give up: repeated ones first, then those needed least; of these none below a floor.

    The same views in the same order give the same choice: ties go to the earlier view and the earlier page.

    Args:
      views: of the requests that may give pages up, in the order of their arrival.
      num_pages: how many are wanted. Fewer are returned when all requests are at their floors.
      spread: see ``Spread``.

    Returns:
      (request id, int32 ``[m]`` logical pages in ascending order) of each request that gives any up.
    """
    # Each view's pages in the order in which they would go; a stable sort keeps ties in order of position.
    orders = [np.lexsort((view.need, ~view.repeated)) for view in views]
    most = np.array([view.most for view in views], np.int64)
    repeats = np.array([int(view.repeated.sum()) for view in views], np.int64)
    taken = _take(views, orders, np.zeros_like(most), repeats, num_pages, spread)
    rest = num_pages - int(taken.sum())
    if rest > 0:
        taken = taken + _take(views, orders, taken, most - taken, rest, spread)
    return [
        (view.request_id, np.sort(view.pages[order[:count]]).astype(np.int32))
        for view, order, count in zip(views, orders, taken.tolist(), strict=True)
        if count
    ]


def _take(
    views: list[PressureView],
    orders: list[np.ndarray],
    begun: np.ndarray,
    rooms: np.ndarray,
    num_pages: int,
    spread: Spread,
) -> np.ndarray:
    """How many pages each view gives of its next ``rooms``, int64 ``[len(views)]``, together at most ``num_pages``."""
    if num_pages >= int(rooms.sum()):
        return rooms
    if num_pages <= 0:
        return np.zeros_like(rooms)
    if spread == "longest":
        return _level(rooms, num_pages)
    if spread == "equal":
        return _proportional(rooms, num_pages)
    owner = np.repeat(np.arange(len(views)), rooms)
    need = np.concatenate(
        [v.need[o[b : b + r]] for v, o, b, r in zip(views, orders, begun.tolist(), rooms.tolist(), strict=True)]
    )
    # A view's pages are in ascending order of need, so a prefix of each is what goes.
    chosen = owner[np.argsort(need, kind="stable")[:num_pages]]
    return np.bincount(chosen, minlength=len(views)).astype(np.int64)


def _level(rooms: np.ndarray, num_pages: int) -> np.ndarray:
    """Takes from the largest rooms until they are level: what is left of any two that gave differs by at most 1."""
    low, high = 1, int(rooms.max())
    while low < high:  # the lowest level to which no more than num_pages lie above
        middle = (low + high) // 2
        low, high = (low, middle) if int(np.maximum(rooms - middle, 0).sum()) <= num_pages else (middle + 1, high)
    taken = np.maximum(rooms - low, 0)
    more = np.flatnonzero(rooms >= low)[: num_pages - int(taken.sum())]
    taken[more] += 1
    return taken


def _proportional(rooms: np.ndarray, num_pages: int) -> np.ndarray:
    """The same share of every room; what rounding down leaves goes to the largest remainders."""
    share = rooms * num_pages
    taken = share // int(rooms.sum())
    remainder = share % int(rooms.sum())
    more = np.argsort(-remainder, kind="stable")[: num_pages - int(taken.sum())]
    taken[more] += 1
    return taken
