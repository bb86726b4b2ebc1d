"""How surprising the text of each page was: noted with every step, and added up by page before somebody asks.

The same requests go on for many steps. So a step keeps no more than its tensor where it is, and a row of them is moved
to the host and added up together: a loop over tokens, and a wait for the device, in every step would cost more.
"""

from __future__ import annotations

import numpy as np
import torch

from trtllm_memshare.serving.request import RequestState

_MOST_STEPS = 64
"""Steps that are kept before they are added up."""


class PageSurprisal:
    """Sums of ``-log p`` over the tokens of each page, in nats, of all requests in flight.

    Args:
      tokens_per_block: tokens of a page.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._size = tokens_per_block
        self._sums: dict[int, np.ndarray] = {}  # by request: float64, by page; the last number stays 0
        # A row: whose tokens it is, the position of each one's first and of the next, the steps.
        self._states: list[RequestState] = []
        self._starts: list[int] = []
        self._next: list[int] = []
        self._steps: list[torch.Tensor] = []

    def note(self, states: list[RequestState], log_probs: torch.Tensor) -> None:
        """Takes the tokens that were just chosen, before they are appended to their requests.

        Args:
          states: each once; the list is kept, not changed.
          log_probs: float32 ``[len(states)]``, of each one's token, in nats, on any device.

        Raises:
          ValueError: another number of tokens than of requests.
        """
        if len(log_probs) != len(states):
            raise ValueError(f"{len(states)} requests need as many log-probabilities, got {len(log_probs)}")
        if not states:  # all of the step's contexts go on
            return
        positions = [len(state.tokens) for state in states]
        # Where an error left a step out, positions tell.
        if len(self._steps) == _MOST_STEPS or positions != self._next or states != self._states:
            self._begin(states, positions)
        self._steps.append(log_probs)
        self._next = [position + 1 for position in positions]

    def catch_up(self) -> None:
        """Adds up what was noted; an error leaves it for the next call."""
        steps = self._steps
        if steps:
            surprisal = -torch.stack(steps, 1).cpu().numpy().astype(np.float64)  # [requests, steps]
            starts = np.array(self._starts)
            first_pages = starts // self._size
            pages = (starts[:, None] + np.arange(len(steps))) // self._size - first_pages[:, None]
            width = int(pages.max()) + 1
            places = pages + width * np.arange(len(starts))[:, None]
            by_page = np.bincount(places.ravel(), surprisal.ravel(), width * len(starts)).reshape(-1, width)
            rooms = [self._room(s, page, width) for s, page in zip(self._states, first_pages.tolist(), strict=True)]
            for room, added in zip(rooms, by_page, strict=True):  # nothing here takes memory
                room += added
        self._drop()

    def of(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        """Sums of some pages up to the last ``catch_up``, float32 ``[len(pages)]``.

        What nobody generated surprised nobody; NaN = it was lost with an error.
        """
        sums = self._sums.get(request_id)
        return np.zeros(len(pages), np.float32) if sums is None else sums.take(pages, mode="clip").astype(np.float32)

    def forget(self, request_id: int) -> None:
        """Drops what is known of a request that ended."""
        self._sums.pop(request_id, None)
        if not self._sums:
            self._drop()

    def _begin(self, states: list[RequestState], positions: list[int]) -> None:
        """A new row; an error loses the one before and the first step of this one, whose pages are then unknown."""
        for state in states:
            self._sums.setdefault(state.request_id, np.zeros(1))
        try:
            self.catch_up()
        except Exception:
            self._lose(self._states, self._starts, len(self._steps))
            self._lose(states, positions, 1)
            raise
        finally:
            self._drop()
        self._states, self._starts, self._next = states, positions, positions

    def _lose(self, states: list[RequestState], starts: list[int], num_steps: int) -> None:
        for state, start in zip(states, starts, strict=True):
            page = start // self._size
            self._room(state, page, (start + num_steps - 1) // self._size + 1 - page)[:] = np.nan

    def _room(self, state: RequestState, page: int, width: int) -> np.ndarray:
        """The sums of some pages, to be changed, float64 ``[width]``; of a request that has ended nobody's."""
        sums = self._sums.get(state.request_id)
        if sums is None:
            return np.zeros(width)
        if page + width >= len(sums):
            sums = self._sums[state.request_id] = np.append(sums, np.zeros(page + width + 1))
        return sums[page : page + width]

    def _drop(self) -> None:
        self._states, self._starts, self._next, self._steps = [], [], [], []
