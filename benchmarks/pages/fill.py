"""Writes the tables and figures of pages anew from the results that their markers name, with the digits that they show.

    python -m benchmarks.pages.fill docs/real_model.md docs/pressure.md

A whole table that a function makes (``table``) is put below its marker; figures and cells change where the result has
another value. Which rows a ``rows`` table shows, single rows that functions make, and all words stay as they are.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

try:
    from benchmarks.pages.markers import (
        FIGURE,
        ROWS,
        TABLE,
        cells_of,
        evaluate,
        is_shown,
        load,
        table_lines,
        whole_table,
    )
    from trtllm_memshare.errors import UserError, run_command_line
except ModuleNotFoundError as error:
    sys.exit(f"error: {error} in {sys.executable} (make venv; source .venv/bin/activate)")


def filled(text: str) -> str:
    """A page with the figures, cells and tables that its results have now."""
    return _with_figures(_with_cells(_with_tables(text)))


def as_shown(value: Any, shown: str, is_percent: bool) -> str:
    """A value in the form of what stands there: as many digits, a sign or an exponent where it has one.

    Raises:
      UserError: ``< 0.001`` stands there, and the value is no less; the words around it are to be looked at. Or the
        value is no finite number.
    """
    if not isinstance(value, str) and not math.isfinite(value):
        raise UserError(f"the page says {shown}, got {value} (look at the result)")
    if isinstance(value, str) or is_shown(value, shown, is_percent):
        return value if isinstance(value, str) else shown
    if shown.startswith("< "):
        raise UserError(f"the page says {shown}, got {value} (write the figure yourself)")
    mantissa, exponent, _ = shown.lower().partition("e")
    sign, digits = "+" if shown.startswith("+") else "", len(mantissa.partition(".")[2])
    return f"{value * (100 if is_percent else 1):{sign}{'' if exponent else ','}.{digits}{'e' if exponent else 'f'}}"


def _with_figures(text: str) -> str:
    def figure(found: re.Match[str]) -> str:
        document = load(found["path"])
        value = as_shown(evaluate(found["key"], document, document), found["shown"], bool(found["percent"]))
        new = value + found[0].removeprefix(found["shown"])
        if not FIGURE.fullmatch(new):
            raise UserError(f"the page says {found['shown']}, got {value}, which no marker could stand behind")
        return new

    return FIGURE.sub(figure, text)


def _with_tables(text: str) -> str:
    for found in reversed(list(TABLE.finditer(text))):
        whole = whole_table(found)
        if whole is not None:
            first, stop = table_lines(text, found.end())
            text = f"{text[:first]}{whole}{text[stop:]}"
    return text


def _with_cells(text: str) -> str:
    for found in reversed(list(ROWS.finditer(text))):
        document = load(found["path"])
        first, stop = table_lines(text, found.end())
        lines = text[first:stop].splitlines()
        for place, (row, cells, columns) in enumerate(cells_of(found, text), 2):
            new = [_cell(cell, column, row, document) for cell, column in zip(cells, columns, strict=True)]
            before, name, *parts = lines[place].rstrip().removesuffix("|").split("|")
            parts = [part.replace(old, cell, 1) for part, old, cell in zip(parts, cells, new, strict=True)]
            lines[place] = f"{'|'.join([before, name, *parts])}|"
        text = f"{text[:first]}{''.join(line + chr(10) for line in lines)}{text[stop:]}"
    return text


def _cell(cell: str, column: str, row: Any, document: Any) -> str:
    if column == "_" or cell == "-":
        return cell
    parts, keys = re.split(r"( / | to | ± )", cell), column.split(" & ")
    for place, key in zip(range(0, len(parts), 2), keys, strict=True):
        shown = parts[place].strip(" *%")
        parts[place] = parts[place].replace(shown, as_shown(evaluate(key, row, document), shown, "%" in parts[place]))
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False)
    parser.add_argument("pages", nargs="+", type=Path)
    for page in parser.parse_args().pages:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        page.write_text(new, encoding="utf-8")
        print(f"{page}: {'as before' if new == text else 'written anew'}")


if __name__ == "__main__":
    run_command_line(main)
