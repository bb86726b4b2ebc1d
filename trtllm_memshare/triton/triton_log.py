"""Puts what this package logs into Triton's own log, where a model's lines are looked for."""

from __future__ import annotations

import logging
from typing import Any


class TritonLog(logging.Handler):
    """Takes the package's records from INFO up, from when it is made until ``close``.

    Args:
      logger: ``Logger`` of Triton's ``triton_python_backend_utils``. Triton shows of it what ``--log-info``,
        ``--log-warning`` and ``--log-error`` let through.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._logger = logger
        self._source = logging.getLogger("trtllm_memshare")
        self._source.addHandler(self)
        self._source.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Hands one record on, under Triton's level for it."""
        try:
            names = ((logging.ERROR, "log_error"), (logging.WARNING, "log_warn"), (logging.INFO, "log_info"))
            name = next(name for level, name in names if record.levelno >= level)
            getattr(self._logger, name)(self.format(record))
        except Exception:  # a log that is gone ends nobody's request
            self.handleError(record)

    def close(self) -> None:
        """Takes no more records."""
        self._source.removeHandler(self)
        super().close()
