"""Shows how much texts repeat themselves, one column per file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm_memshare.evaluation.redundancy import Redundancy


def redundancy_table(columns: dict[str, Redundancy]) -> str:
    """Plain-text table: one row per measure, one column per set of texts, shares in percent.

    Args:
      columns: measures by title, for example the name of the file.
    """
    rows = [["measure", *columns]]
    rows += [[title, *map(cell, columns.values())] for title, cell in _ROWS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", _LEGEND])


def table_of_document(document: dict[str, dict[str, Any]]) -> str:
    """The table of a report as it is read from JSON, whose keys are all text; columns are named by the files' stems."""
    columns = {}
    for path, measures in document.items():
        keyed: dict[str, Any] = {
            name: {json.loads(key): share for key, share in value.items()} if isinstance(value, dict) else value
            for name, value in measures.items()
        }
        columns[Path(path).stem] = Redundancy(**keyed)
    return redundancy_table(columns)


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}"


def _threshold_rows(threshold: float) -> list[tuple[str, Callable[[Redundancy], str]]]:
    return [
        (f"steps with an earlier step > {threshold}, %", lambda m: _percent(m.steps_over[threshold], 1)),
        ("  their share of words, %", lambda m: _percent(m.words_in_steps_over[threshold], 1)),
    ]


def _window_row(width: int) -> tuple[str, Callable[[Redundancy], str]]:
    return f"{width}-word windows seen before, %", lambda m: _percent(m.windows_seen[width], 3)


def _cover_row(width: int) -> tuple[str, Callable[[Redundancy], str]]:
    return f"words in a repeat of >= {width} words, %", lambda m: _percent(m.words_covered[width], 2)


_ROWS: list[tuple[str, Callable[[Redundancy], str]]] = [
    ("texts", lambda m: str(m.num_texts)),
    ("words per text, mean", lambda m: f"{m.words_per_text:.0f}"),
    ("steps per text, mean", lambda m: f"{m.steps_per_text:.0f}"),
    *_threshold_rows(0.8),
    *_threshold_rows(0.9),
    *map(_window_row, (8, 16, 32)),
    *map(_cover_row, (8, 16, 32)),
    ("8-word blocks >= 80 % equal, same phase, %", lambda m: _percent(m.near_blocks_same, 2)),
    ("8-word blocks >= 80 % equal, any phase, %", lambda m: _percent(m.near_blocks_any, 2)),
]

_LEGEND = (
    "word: piece between white space; step: text between blank lines, compared by the cosine of its bag of words\n"
    "phase: same = the earlier block starts at a multiple of 8 words too, any = anywhere; all within one text"
)
