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
_NOBODY = 0  # the slot of requests that have ended


class PageSurprisal:
    """Sums of ``-log p`` over the tokens of each page, in nats, of all requests in flight.

    Memory: 8 bytes a page of the longest request, for as many requests as were in flight together, or twice of both.

    Args:
      tokens_per_block: tokens of a page.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._size = tokens_per_block
        self._sums = np.zeros((2, 2))  # by slot and page; the last column stays 0
        self._slots: dict[int, int] = {}  # by request
        self._free = [1]
        # A row: whose tokens it is, their slots, the position of each one's first and of the next, the steps.
        self._states: list[RequestState] = []
        self._owners: list[int] = []
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

    def lose(self, states: list[RequestState]) -> None:
        """An error has lost the tokens that were just chosen: nothing is known of their pages any more."""
        self._lose([self._slot(s.request_id) for s in states], [len(s.tokens) for s in states], 1)

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
            self._reach(int(first_pages.max()) + width)
            self._sums[np.array(self._owners)[:, None], first_pages[:, None] + np.arange(width)] += by_page
        self._drop()

    def of(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        """Sums of some pages up to the last ``catch_up``, float32 ``[len(pages)]``.

        What nobody generated surprised nobody; NaN = it was lost with an error.
        """
        slot = self._slots.get(request_id)
        if slot is None:
            return np.zeros(len(pages), np.float32)
        return self._sums[slot].take(pages, mode="clip").astype(np.float32)

    def forget(self, request_id: int) -> None:
        """Drops what is known of a request that ended."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._owners = [_NOBODY if owner == slot else owner for owner in self._owners]
            self._sums[slot] = 0.0
            self._free.append(slot)
        if not self._slots:
            self._drop()

    def _begin(self, states: list[RequestState], positions: list[int]) -> None:
        """A new row; an error loses the one before and the first step of this one, whose pages are then unknown."""
        owners = [self._slot(state.request_id) for state in states]
        try:
            self.catch_up()
        except Exception:
            self._lose(self._owners, self._starts, len(self._steps))
            self._lose(owners, positions, 1)
            raise
        finally:
            self._drop()
        self._states, self._owners, self._starts, self._next = states, owners, positions, positions

    def _lose(self, owners: list[int], starts: list[int], num_steps: int) -> None:
        self._reach((max(starts, default=0) + num_steps) // self._size + 1)
        for slot, start in zip(owners, starts, strict=True):
            self._sums[slot, start // self._size : (start + num_steps - 1) // self._size + 1] = np.nan

    def _slot(self, request_id: int) -> int:
        slot = self._slots.get(request_id)
        if slot is None:
            if not self._free:
                count = len(self._sums)
                self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
                self._free = list(range(2 * count - 1, count - 1, -1))
            slot = self._slots[request_id] = self._free.pop()
        return slot

    def _reach(self, num_pages: int) -> None:
        """Makes room for so many pages of each request, and a last column that stays 0."""
        if num_pages >= self._sums.shape[1]:
            grown = np.zeros((len(self._sums), 2 * num_pages))
            grown[:, : self._sums.shape[1]] = self._sums
            self._sums = grown

    def _drop(self) -> None:
        self._states, self._owners, self._starts, self._next, self._steps = [], [], [], [], []
