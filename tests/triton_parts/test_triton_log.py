"""What the package logs goes to Triton's logger, under Triton's levels, for as long as a model is there."""

from __future__ import annotations

import logging

import pytest

from trtllm_memshare.triton.triton_log import TritonLog


class Logger:
    """Triton's, which may be gone."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.is_gone = False

    def _note(self, level: str, message: str) -> None:
        if self.is_gone:
            raise RuntimeError("the stub has ended")
        self.lines.append((level, message))

    def log_info(self, message: str) -> None:
        self._note("info", message)

    def log_warn(self, message: str) -> None:
        self._note("warning", message)

    def log_error(self, message: str) -> None:
        self._note("error", message)


@pytest.fixture
def _level_as_before():
    log = logging.getLogger("trtllm_memshare")
    level = log.level
    yield
    log.setLevel(level)


@pytest.mark.usefixtures("_level_as_before")
def test_records_arrive_under_triton_s_levels_until_the_model_goes(capsys):
    logger, log = Logger(), logging.getLogger("trtllm_memshare.pressure")
    handler = TritonLog(logger)
    log.debug("too small")
    log.info('{"event": "pressure_begins"}')
    log.warning("%d pages", 3)
    log.error("x")
    log.critical("y")
    assert logger.lines == [
        ("info", '{"event": "pressure_begins"}'),
        ("warning", "3 pages"),
        ("error", "x"),
        ("error", "y"),
    ]
    logger.is_gone = True
    log.error("nobody's request ends with it")
    assert "the stub has ended" in capsys.readouterr().err
    logger.is_gone = False
    handler.close()
    log.error("later")
    assert len(logger.lines) == 4
