"""When pressure begins and when it ends: one line of JSON each, for whoever collects logs."""

from __future__ import annotations

import json
import logging

log = logging.getLogger("trtllm_memshare.pressure")


class Episodes:
    """Stretches of time in which requests give pages up; who serves says when they begin and end.

    Attributes:
      num: how many began.
      is_active: one has begun and not ended.
    """

    def __init__(self) -> None:
        self.num, self.is_active = 0, False
        self._retired_before = 0  # when the present one began

    def begin(self, num_used: int, num_pages: int, num_running: int, num_retired: int) -> None:
        """Begins one, if there is none.

        Args:
          num_used: pages in use, of ``num_pages``.
          num_running: requests.
          num_retired: pages given up since the start.
        """
        if self.is_active:
            return
        self.num, self.is_active, self._retired_before = self.num + 1, True, num_retired
        _log_line("pressure_begins", used_blocks=num_used, max_blocks=num_pages, running=num_running)

    def end(self, num_used: int, num_pages: int, num_retired: int) -> None:
        """Ends the present one, if there is one; see ``begin``."""
        if not self.is_active:
            return
        self.is_active = False
        retired = num_retired - self._retired_before
        _log_line("pressure_ends", used_blocks=num_used, max_blocks=num_pages, retired_pages=retired)


def _log_line(event: str, **numbers: int) -> None:
    log.info(json.dumps({"event": event, **numbers}))
