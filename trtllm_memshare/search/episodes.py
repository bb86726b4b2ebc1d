"""When pressure begins and when it ends: one line of JSON each, for whoever collects logs."""

from __future__ import annotations

import json
import logging

QUIET_STEPS = 200  # without a page given up, until pressure may count as over: it comes and goes with every request
LOG = logging.getLogger("trtllm_memshare.pressure")


class Episodes:
    """Stretches of time in which requests give pages up; who serves says what happens, this says when one is over.

    A relief brings use to the low watermark itself, so that alone ends nothing. An episode ends when pages have not
    been given up for ``QUIET_STEPS`` steps and use is at or below the low watermark, or when nobody is left.

    Args:
      num_pages: of the pool, those left out that are nobody's.
      low_watermark: share of them.
      log: where the lines go.

    Attributes:
      num: how many began.
      is_active: one has begun and not ended.
    """

    def __init__(self, num_pages: int, low_watermark: float, log: logging.Logger = LOG) -> None:
        self._num_pages, self._low, self._log = num_pages, low_watermark * num_pages, log
        self.num, self.is_active = 0, False
        self._quiet_steps = 0
        self._retired_before = 0  # when the present one began

    def relieved(self, num_used: int, num_running: int, num_retired: int) -> None:
        """Pages are given up now: an episode begins, or goes on.

        Args:
          num_used: pages in use before they go.
          num_running: requests.
          num_retired: pages given up before these, since the start.
        """
        self._quiet_steps = 0
        if self.is_active:
            return
        self.num, self.is_active, self._retired_before = self.num + 1, True, num_retired
        log_line(self._log, "pressure_begins", used_blocks=num_used, max_blocks=self._num_pages, running=num_running)

    def look(self, num_used: int, num_retired: int, num_steps: int = 1) -> None:
        """Ends the present one if it is over.

        Args:
          num_used: pages in use.
          num_retired: pages given up since the start.
          num_steps: since the last call.
        """
        self._quiet_steps += num_steps
        if self._quiet_steps >= QUIET_STEPS and num_used <= self._low:
            self.end(num_used, num_retired)

    def end(self, num_used: int, num_retired: int) -> None:
        """Ends the present one, if there is one: nobody runs or waits any more. See ``look``."""
        if not self.is_active:
            return
        self.is_active = False
        retired = num_retired - self._retired_before
        log_line(self._log, "pressure_ends", used_blocks=num_used, max_blocks=self._num_pages, retired_pages=retired)


def log_line(log: logging.Logger, event: str, level: int = logging.INFO, **values: int | str) -> None:
    """Writes one line of JSON: an object with ``event`` and these values."""
    log.log(level, "%s", json.dumps({"event": event, **values}))
