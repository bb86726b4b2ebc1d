"""JSON that users give: parsed in bounded time and memory, and refused with one sentence where it is not plain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from trtllm_memshare.errors import UserError, nearest, shorten

MAX_LINE_BYTES = 16 * 2**20
"""Longest line of a JSON-lines file: a prompt of a million tokens, written as ids, takes half of it."""
MAX_FILE_BYTES = 64 * 2**20
"""Largest JSON document: tokenizers with 256,000 words and their merges take a third of it."""


def parse_json(text: str, where: str, hint: str = "") -> Any:
    """The value that ``text`` holds.

    Refuses what Python's parser takes and JSON does not know (NaN, Infinity), and what later code cannot hold: lone
    surrogates, integers of thousands of digits, nesting deeper than Python's stack.

    Args:
      where: file, or file and line, for the error.
      hint: what to do, for the error of a text that is no JSON.

    Raises:
      UserError: not JSON, or one of those.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where} is not JSON: {error.msg} at {place}{hint and f' ({hint})'}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not usable: its JSON is nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"{where} is not usable: {shorten(str(error).partition(';')[0])}") from error
    # A surrogate is only reached through its escape, so that most texts need no second look.
    if "\\ud" in text.lower() and _has_lone_surrogate(value):
        raise UserError(f"{where} is not usable: a text has half of a surrogate pair (write the character itself)")
    return value


def parse_json_line(line: str, where: str) -> dict[str, Any]:
    """One object of a JSON-lines file; ``where`` names file and line. Raises UserError if it is not one."""
    row = parse_json(line, where, "one object per line")
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, got {type(row).__name__} (one object per line)")
    return row


def read_json(path: Path, whose: str, remedy: str) -> dict[str, Any]:
    """A JSON object from a file; ``whose`` and ``remedy`` go into the error."""
    shown = shorten(str(path))
    try:
        if not path.is_file():
            raise UserError(f"{whose} is missing {shown} ({remedy})")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{shown} must be at most {MAX_FILE_BYTES:,} bytes, got {size:,} ({remedy})")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror} ({remedy})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown} is damaged: not JSON, no UTF-8 at byte {error.start} ({remedy})") from error
    try:
        document = parse_json(text, "it")
    except UserError as error:
        raise UserError(f"{shown} is damaged: {str(error).removeprefix('it is ')} ({remedy})") from error
    if not isinstance(document, dict):
        raise UserError(f"{shown} must hold a JSON object, got {type(document).__name__} ({remedy})")
    return document


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of the lines of a file that are not blank, one at a time.

    Raises:
      UserError: the file cannot be read, a line is longer than ``MAX_LINE_BYTES`` or is not UTF-8, with its number.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(_bounded(file, path), start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin a file with a mark
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{shorten(str(path))} line {number} is not UTF-8 text: {error.reason} at byte {error.start} "
                        f"(convert the file to UTF-8)"
                    ) from error
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{what} cannot be read: {shorten(str(path))}: {error.strerror}") from error


def check_known_keys(row: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuses a key that nothing reads: a misspelled one would be ignored in silence."""
    for key in row:
        if key not in known:
            raise UserError(f"{where} has an unknown key {shorten(key)} ({nearest(key, known)})")


def _bounded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise UserError(
                f"{shorten(str(path))} line {number} is longer than {MAX_LINE_BYTES:,} bytes (one request per line)"
            )
        yield raw


def _refuse_constant(name: str) -> Any:
    raise UserError(f"{name} is no JSON number")


def _has_lone_surrogate(value: Any) -> bool:
    """Walks without recursion: the parser has bounded the depth, not this function's stack."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if any("\ud800" <= c <= "\udfff" for c in item):
                return True
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
    return False
