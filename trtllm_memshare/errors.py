"""Errors a user can cause, and how command lines show them and what this package logs."""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import reprlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError  # a bare Python, which lacks it, must be told so by an error of ours

MAX_QUOTED = 200  # characters of a user's value that an error repeats
_MAX_MESSAGE = 2000  # characters; the last defence of a terminal and a log
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_LONGEST_NAME = 100  # characters; a longer one is no misspelling, and comparing it would take quadratic time


class UserError(ValueError):
    """Input that cannot be used. The message is one sentence: what, got, expected, what to do."""

    def __init__(self, message: str) -> None:
        # A lone surrogate cannot be printed.
        readable = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(_middle_cut(readable, _MAX_MESSAGE))


def quote(value: object) -> str:
    """``repr`` of a user's value for an error, at most ``MAX_QUOTED`` characters long.

    Never raises and never takes long: large containers are cut before they are written out, and an integer of more
    digits than Python prints is named by its size.
    """
    if isinstance(value, str) and len(value) <= MAX_QUOTED:
        return _middle_cut(repr(value), MAX_QUOTED)
    return _middle_cut(_SHORT.repr(value), MAX_QUOTED)


def shorten(text: str) -> str:
    """A name that a user gave, as it is, at most ``MAX_QUOTED`` characters long."""
    return _middle_cut(text, MAX_QUOTED)


def _middle_cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = (most - 5) // 2
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = MAX_QUOTED
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 8
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        if abs(value).bit_length() > 256:
            return f"an integer of {abs(value).bit_length()} bits"
        return repr(value)


_SHORT = _ShortRepr()


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that names the known name nearest to ``name``, or lists all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5) if len(name) <= _LONGEST_NAME else []
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"


def describe_validation_error(error: ValidationError, known: Iterable[str], where: str) -> str:
    """The first problem of a pydantic error as one sentence; an unknown key gets the nearest known one."""
    first = error.errors()[0]
    key = shorten(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{where} has an unknown key {key} ({nearest(key, known)})"
    return (
        f"{where}: {key} {first['msg'].lower()}, got {quote(first['input'])}"
        if key
        else f"{where}: {first['msg'].removeprefix('Value error, ')}"
    )


def read_text(path: Path, what: str) -> str:
    """A file that a user named; ``what`` names it in errors. Raises UserError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {shorten(str(path))}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: {path}: {error.reason} at byte {error.start}") from error


def run_command_line(main: Callable[[], None]) -> None:
    """Runs ``main``; a ``UserError``, or a file that the system refuses, becomes one line on stderr and exit code 2."""
    show_log()
    try:
        try:
            main()
        except SystemExit:
            _flush_output()
            raise
        _flush_output()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away, as ``| head`` does
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in _NO_ROOM:
            raise
        if error.filename is None:  # of a stream that was open, such as stdout
            _drop_output()
            print(f"error: cannot write: {error.strerror} (make room, or write elsewhere)", file=sys.stderr)
            sys.exit(2)
        print(f"error: {shorten(str(error.filename))}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _flush_output() -> None:
    """Writes what stdout still holds: at the end of the interpreter nobody could tell a failure."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Lets what stdout could not write go, which the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_log(form: str = "%(message)s") -> None:
    """Shows what this package logs, from INFO up, on stderr, unless somebody has configured logging.

    Args:
      form: of a line, see ``logging.Formatter``. As it is, a line of JSON stays one.
    """
    log = logging.getLogger("trtllm_memshare")
    if not log.handlers and not logging.getLogger().handlers:
        handler = _AboveBars()
        handler.setFormatter(logging.Formatter(form))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


class _AboveBars(logging.Handler):
    """Writes to stderr as it is now; tqdm's bars are there too and are drawn anew below each line."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return  # somebody has configured logging since, and shows the line
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # who has no bars need not import it
        beside = contextlib.nullcontext() if tqdm is None else tqdm.external_write_mode(sys.stderr)
        with contextlib.suppress(Exception), beside:  # a terminal that is gone ends nobody's request, nor a bad line
            print(self.format(record), file=sys.stderr, flush=True)
