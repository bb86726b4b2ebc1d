"""Reads texts from JSON lines, and cuts them into streams of word pieces where no tokenizer is at hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from trtllm_memshare.errors import UserError, nearest, quote, shorten
from trtllm_memshare.json_input import parse_json_line, read_lines
from trtllm_memshare.search.steps import BoundaryTokens

_PIECE = re.compile(r" ?\w{1,4}|\n+|\s|[^\w\s]")  # about as many pieces per word as a reasoning model's tokenizer gives
TEXT_FIELDS = ("reasoning", "text")
"""Names tried when none is given: that of the committed traces, and that of generated outputs."""


def read_texts(path: Path, field: str | None = None) -> list[str]:
    """Reads one text from each line of a JSON-lines file.

    Args:
      field: name of the text's field, None = the first of ``TEXT_FIELDS`` that the line has.

    Raises:
      UserError: no such file, no lines, or a line that is not JSON or has no text there, with its number.
    """
    if not path.is_file():
        raise UserError(f"no texts at {path} (give JSON lines with a field {' or '.join(TEXT_FIELDS)})")
    texts = [_text_of(line, field, f"{path} line {number}") for number, line in read_lines(path, "the texts")]
    if not texts:
        raise UserError(f"{path} has no texts (give JSON lines with a field {' or '.join(TEXT_FIELDS)})")
    return texts


def make_streams(path: Path, length: int) -> tuple[list[np.ndarray], BoundaryTokens]:
    """Token streams of `length` pieces, traces joined end to end, and the step boundaries of their vocabulary."""
    vocabulary: dict[str, int] = {}
    tokens = [vocabulary.setdefault(p, len(vocabulary)) for text in read_texts(path) for p in _PIECE.findall(text)]
    streams = [np.array(tokens[i : i + length], np.int32) for i in range(0, len(tokens) - length, length)]
    return streams, BoundaryTokens.from_texts(list(vocabulary))


def _text_of(line: str, field: str | None, where: str) -> str:
    row = parse_json_line(line, where)
    name = field or next((known for known in TEXT_FIELDS if known in row), TEXT_FIELDS[0])
    if name not in row:
        raise UserError(f"{where} has no field {name} (set --field; {shorten(nearest(name, row))})")
    if not isinstance(row[name], str) or not row[name].strip():
        raise UserError(f"{where}: {name} must be text of at least one word, got {quote(row[name])}")
    return str(row[name])
