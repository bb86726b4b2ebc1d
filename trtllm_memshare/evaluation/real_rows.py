"""Rows of the study of pages: JSON lines that a later run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_memshare.evaluation.head_retirement import HeadRetirements
from trtllm_memshare.evaluation.masked_replay import Change, FullPass
from trtllm_memshare.evaluation.real_texts import TokenText
from trtllm_memshare.evaluation.retirement import Retirements

_KEY = ("text", "arm", "min_kept", "tokens_per_block", "tokens", "decoding")
BUCKET_TOKENS = 256
"""Positions that one entry of ``by_position`` covers."""


class RowFile:
    """Rows in a file of JSON lines, each found again by its text, arm and budget; written as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = read_rows(path) if path.is_file() else []
        if path.is_file():
            _cut_torn_line(path)
        self._keys = {_key(row) for row in self.rows}

    def __contains__(self, row: dict[str, Any]) -> bool:
        return _key(row) in self._keys

    def add(self, row: dict[str, Any], unless_there: bool = False) -> None:
        """Appends a row. ``unless_there``: does nothing where its key is known."""
        if unless_there and row in self:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._keys.add(_key(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that a stopped run left half-written is passed over."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _cut_torn_line(path: Path) -> None:
    """Takes off a half-written last line, so that the next row begins a line of its own."""
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        with path.open("r+b") as file:
            file.truncate(end)


def full_row(text: TokenText, full: FullPass) -> dict[str, Any]:
    """What the full cache makes of a text."""
    generated = full.losses[text.num_prompt_tokens :]
    return {
        "text": text.trace.name,
        "arm": "full",
        "tokens": len(text.ids),
        "model": text.trace.model,
        "problem": text.trace.problem[:120],
        "prompt_tokens": text.num_prompt_tokens,
        "loss": round(float(generated.mean()), 5),
    }


def change_row(text: TokenText, change: Change, retirements: Retirements | HeadRetirements) -> dict[str, Any]:
    """What an arm changes, as means over the generated tokens; ``by_position``: the change of the loss by buckets."""
    start = text.num_prompt_tokens - 1  # the first generated token is predicted here
    loss = change.loss[start:].astype(np.float64)
    positions = np.arange(start + 1, len(text.ids)) // BUCKET_TOKENS
    first = -(-text.num_prompt_tokens // retirements.tokens_per_block)
    return {
        "model": text.trace.model,
        "problem": text.trace.problem[:120],
        "loss_change": round(float(loss.mean()), 6),
        "divergence": round(float(change.divergence[start:].mean()), 6),
        "agreement": round(float(change.agrees[start:].mean()), 6),
        "memory_share": round(retirements.memory_share(first), 4),
        "retired_pages": retirements.retired_pages,
        "by_position": {
            int(bucket) * BUCKET_TOKENS: [
                round(float(loss[positions == bucket].sum()), 4),
                int((positions == bucket).sum()),
            ]
            for bucket in np.unique(positions)
        },
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)
