"""References from a page to committed results, which a reader of the rendered page does not see.

A figure is checked by a marker right behind it. The key walks through objects by name (``[a.b]``: one with a point in
it), through lists by number or by ``[field=value]``; `` / ``, `` * `` and `` - `` join keys and numbers;
``module:function`` takes the whole file. It may go on in the next line::

    1.15<!--= benchmarks/results/demo.json ratio -->
    99.4 %<!--= benchmarks/results/evaluation.json variants[variant=aligned].accuracy -->
    p < 0.001<!--= rows.jsonl benchmarks.studies.real_model.figures:compared what="p" arm="redundancy-k" -->
    1.33<!--= schedule.json rows[variant=a].req_s / rows[variant=full].req_s -->
    42 of 52<!--= recall.jsonl benchmarks.studies.real_model.figures:recalled arm="redundancy-v" -->

The table below a ``rows`` marker shows rows of a list (or of an object, by name). Its first column names the row by a
field, or the names are listed (``@``: keys of the list), or all rows stand there in order (``#``, ``#field``). Every
other column is a key of the row (``$`` before a key: of the document). ``&`` parts the figures of one cell, ``_`` is a
column of words::

    <!--rows= FILE rows[pool_share=0.25]
    variant: full; pressure | num_steps | latency.p50 & latency.p99 | _ -->

The lines that a function makes of a file stand below a ``table`` marker::

    <!--table= benchmarks/results/evaluation.json trtllm_memshare.report.tables:variants_table markdown=true -->
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
FIGURE = re.compile(
    rf"(?P<shown>(?:< )?{NUMBER}(?: of \d+)?)(?P<percent> ?%)?<!--=\s+(?P<path>\S+)\s+(?P<key>[^>]+?) -->"
)
ROWS = re.compile(r"<!--rows= (?P<path>\S+)\s+(?P<list>(?:\[[^\]]*\]|\S)+)\s+(?P<columns>[^>]+?) -->")
TABLE = re.compile(r"<!--table= (?P<path>(?:[^\s;>]+;\s*)*[^\s;>]+)\s+(?P<call>[^>]+?) -->")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def load(path: str) -> Any:
    """A committed result; lines of JSON are a list, and so are several files joined by ``;``."""
    if ";" in path:
        return [load(one.strip()) for one in path.split(";")]
    text = (ROOT / path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.endswith(".jsonl") else json.loads(text)


def look_up(document: Any, key: str) -> Any:
    """``rows[pool_share=0.25][variant=full].steps``: the value at a key; a filter may leave several rows."""
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]+)\]", key):
        if name:
            document = document[int(name)] if isinstance(document, list) else document[name]
        elif "=" in index:
            field, _, value = index.partition("=")
            rows = [row for row in document if str(row[field]) == value]
            document = rows[0] if len(rows) == 1 else rows
        else:
            document = document[index if isinstance(document, dict) else int(index)]
    return document


def call(document: Any, text: str) -> Any:
    """``module:function name=value ...``: what the function makes of the document."""
    target, *options = text.split()
    module, _, function = target.partition(":")
    keywords = {name: json.loads(value) for name, _, value in (option.partition("=") for option in options)}
    return getattr(importlib.import_module(module), function)(document, **keywords)


def evaluate(text: str, row: Any, document: Any) -> Any:
    """A key, a call, or keys and numbers joined by `` - ``, `` / `` and `` * ``, the last two first."""
    if re.match(r"[\w.]+:\w+", text):
        return call(document, text)

    def operand(name: str) -> Any:
        if re.fullmatch(NUMBER, name):
            return float(name)
        return look_up(document, name[1:]) if name.startswith("$") else look_up(row, name)

    def term(product: str) -> Any:
        first, *rest = re.split(r" ([/*]) ", product)
        value = operand(first)
        for sign, name in zip(rest[::2], rest[1::2], strict=True):
            value = value / operand(name) if sign == "/" else value * operand(name)
        return value

    first, *others = (term(product) for product in " ".join(text.split()).split(" - "))
    return first - sum(others) if others else first


def is_shown(value: Any, shown: str, is_percent: bool = False) -> bool:
    """Whether a value, rounded to the digits that a page prints, is what it prints, or less where it prints ``<``."""
    if isinstance(value, str):
        return value == shown
    if shown.startswith("< "):
        return bool(value * (100 if is_percent else 1) < float(shown[2:].replace(",", "")))
    mantissa = shown.lower().partition("e")[0]
    form = f".{len(mantissa.partition('.')[2])}{'e' if 'e' in shown.lower() else 'f'}"
    return float(f"{value * (100 if is_percent else 1):{form}}") == float(shown.replace(",", ""))


def wrong_figures(text: str) -> Iterator[tuple[str, Any]]:
    for found in FIGURE.finditer(text):
        document = load(found["path"])
        value = evaluate(found["key"], document, document)
        if not is_shown(value, found["shown"], bool(found["percent"])):
            yield found[0], value


def wrong_cells(text: str) -> Iterator[tuple[str, str, Any]]:
    """(list, cell, value) of each cell that is not what its row holds."""
    for found in ROWS.finditer(text):
        document = load(found["path"])
        for row, cells, columns in cells_of(found, text):
            for column, cell in zip(columns, cells, strict=True):
                yield from ((found["list"], *wrong) for wrong in _wrong_in(cell, column, row, document))


def cells_of(found: re.Match[str], text: str) -> Iterator[tuple[Any, list[str], list[str]]]:
    """Of each line of the table below a ``rows`` marker: its row of the results, its cells, and the columns' keys."""
    document = load(found["path"])
    rows = document if found["list"] == "." else evaluate(found["list"], document, document)
    naming, *columns = (" ".join(column.split()) for column in found["columns"].split("|"))
    field, _, names = naming.partition(":")
    listed = [name.strip() for name in names.split(";")] if names else None
    table = table_below(text, found.end())
    assert listed is None or len(listed) == len(table), (found[0], "rows are missing")
    assert not field.startswith("#") or len(table) == len(rows), (found[0], "rows are missing")
    for index, (first, *cells) in enumerate(table):
        name = listed[index] if listed else first.strip("`*")
        if field.startswith("#"):
            row = rows[index]
            assert field == "#" or str(row[field[1:]]) == name, (found["list"], name)
        else:
            by_field = isinstance(rows, list) and field != "@"
            row = rows[name] if isinstance(rows, dict) else look_up(rows, f"[{field}={name}]" if by_field else name)
        yield row, cells, columns


def _wrong_in(cell: str, column: str, row: Any, document: Any) -> Iterator[tuple[str, Any]]:
    if column == "_":
        return
    if cell == "-":
        assert not _has(row, column), (cell, column, "the result has a value")
        return
    parts = re.split(r" / | to | ± ", cell)
    for part, key in zip(parts, column.split(" & "), strict=True):
        shown = part.strip(" *%")
        value = evaluate(key, row, document)
        if not is_shown(value, shown, "%" in part):
            yield cell, value


def _has(row: Any, column: str) -> bool:
    try:
        return look_up(row, column.split(" ")[0]) is not None
    except (KeyError, IndexError):
        return False


def table_lines(text: str, start: int) -> tuple[int, int]:
    """Where the first table behind a place begins and ends."""
    found = re.compile(r"(?:^ *\|.*(?:\n|\Z))+", re.MULTILINE).search(text, start)
    assert found is not None, (text[start : start + 80], "no table follows")
    assert not COMMENT.sub("", text[start : found.start()]).strip(), (text[start : start + 80], "words come first")
    return found.span()


def table_below(text: str, start: int) -> list[list[str]]:
    """The rows, without header and rule, of the first table behind a place; their cells without comments."""
    first, stop = table_lines(text, start)
    lines = COMMENT.sub("", text[first:stop]).splitlines()
    return [
        [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")] for line in lines[2:]
    ]


def whole_table(found: re.Match[str]) -> str | None:
    """What a ``table`` marker's function makes, from head to last row; None if it makes rows or words alone."""
    lines = [line for line in call(load(found["path"]), found["call"]).splitlines() if line.startswith("|")]
    return "".join(f"{line}\n" for line in lines) if lines[1:] and lines[1].startswith("| --") else None


def wrong_tables(text: str) -> Iterator[tuple[str, str]]:
    """(marker, lines) of tables that are not what their functions make; of rows and words, the first that differs.

    Rows of several markers in a row, with nothing between them, are all rows of the table below them.
    """
    rows: list[str] = []
    for found in TABLE.finditer(text):
        whole = whole_table(found)
        if whole is not None:
            first, stop = table_lines(text, found.end())
            if text[first:stop] != whole:
                yield found[0], whole
            continue
        made = [line for line in call(load(found["path"]), found["call"]).splitlines() if line.strip()]
        if not made[0].startswith("|"):
            yield from ((found[0], line) for line in _first_difference(made, _block_below(text[found.end() :])))
            continue
        rows += made
        if not TABLE.match(text[found.end() :].lstrip()):
            first, stop = table_lines(text, found.end())
            there = [line.strip() for line in text[first:stop].splitlines()[2:]]
            yield from ((found[0], line) for line in _first_difference(rows, there))
            rows = []


def _block_below(text: str) -> list[str]:
    """The lines of the indented block that ``text`` begins with, without the indentation and without blank ones."""
    lines = [line for line in text.splitlines() if line.strip()]
    indent = " " * (len(lines[0]) - len(lines[0].lstrip())) if lines else ""
    assert len(indent) >= 4, (text[:80], "no indented block follows")
    return [line.removeprefix(indent) for line in itertools.takewhile(lambda line: line.startswith(indent), lines)]


def _first_difference(made: list[str], there: list[str]) -> list[str]:
    """The first line that is made and not there, or there and not made; none where the two are the same."""
    pairs = itertools.zip_longest(made, there)
    return [is_made if is_made is not None else is_there for is_made, is_there in pairs if is_made != is_there][:1]
