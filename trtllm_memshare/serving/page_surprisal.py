"""How surprising the text of each page was: noted with every step, and added up by page once somebody asks.

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
        self._states: list[RequestState] = []  # whose tokens the kept steps are
        self._starts: list[int] = []  # position of each one's first token in them
        self._steps: list[torch.Tensor] = []

    def note(self, states: list[RequestState], log_probs: torch.Tensor) -> None:
        """Takes the tokens that were just chosen, before they are appended to their requests.

        Args:
          states: each once; the list is kept, not changed.
          log_probs: float32 ``[len(states)]``, of each one's token, in nats, on any device.
        """
        if not states:
            return
        goes_on = 0 < len(self._steps) < _MOST_STEPS and states == self._states
        # A step that an error left out is noticed by the first one's length: nobody else's can differ.
        if not goes_on or len(states[0].tokens) != self._starts[0] + len(self._steps):
            self._add_up()
            self._states, self._starts = states, [len(state.tokens) for state in states]
            for state in states:
                self._sums.setdefault(state.request_id, np.zeros(1))
        self._steps.append(log_probs)

    def of(self, request_id: int, pages: np.ndarray) -> np.ndarray:
        """Sums of some pages, float32 ``[len(pages)]``; what nobody generated surprised nobody."""
        self._add_up()
        sums = self._sums.get(request_id)
        return np.zeros(len(pages), np.float32) if sums is None else sums.take(pages, mode="clip").astype(np.float32)

    def forget(self, request_id: int) -> None:
        """Drops what is known of a request that ended."""
        self._sums.pop(request_id, None)

    def _add_up(self) -> None:
        """Adds the kept steps to the sums; an error loses what they held, and counts nothing twice."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        surprisal = -torch.stack(steps, 1).cpu().numpy().astype(np.float64)  # [requests, steps]
        starts = np.array(self._starts)
        first_pages = starts // self._size
        pages = (starts[:, None] + np.arange(len(steps))) // self._size - first_pages[:, None]
        width = int(pages.max()) + 1
        places = pages + width * np.arange(len(starts))[:, None]
        by_page = np.bincount(places.ravel(), surprisal.ravel(), width * len(starts)).reshape(-1, width)
        for state, page, added in zip(self._states, first_pages.tolist(), by_page, strict=True):
            sums = self._sums.get(state.request_id)
            if sums is None:
                continue  # it has ended
            if page + width >= len(sums):
                sums = self._sums[state.request_id] = np.append(sums, np.zeros(page + width + 1))
            sums[page : page + width] += added
