"""Errors a user can cause, and how command lines show them."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError


class UserError(ValueError):
    """Input that cannot be used. The message is one sentence: what, got, expected, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that names the known name nearest to ``name``, or lists all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"


def describe_validation_error(error: ValidationError, known: Iterable[str], where: str) -> str:
    """The first problem of a pydantic error as one sentence; an unknown key gets the nearest known one."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where} has an unknown key {key} ({nearest(key, known)})"
    return f"{where}: {key} {first['msg'].lower()}, got {first['input']!r}" if key else f"{where}: {first['msg']}"


def read_text(path: Path, what: str) -> str:
    """A file that a user named; ``what`` names it in errors. Raises UserError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: {path}: {error.reason} at byte {error.start}") from error


def parse_json_line(line: str, where: str) -> dict[str, Any]:
    """One object of a JSON-lines file; ``where`` names file and line. Raises UserError if it is not one."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno} (one object per line)") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, got {type(row).__name__}")
    return row


def run_command_line(main: Callable[[], None]) -> None:
    """Runs ``main``; a ``UserError`` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
