"""Every page says what is there: its paths, commands and options exist, and its figures are those of the results.

A figure is checked by a marker right behind it, which a reader of the rendered page does not see::

    1.15<!--= benchmarks/results/pressure_fold.json ratio -->
    99.4 %<!--= benchmarks/results/evaluation.json variants[variant=aligned].accuracy -->

The key walks through objects by name, through lists by number or by ``[field=value]``. The value is rounded to the
digits that the page prints, and multiplied by 100 before a percent sign. A whole table stands under a marker that names
the function which prints it from the report::

    <!--table= benchmarks/results/evaluation.json trtllm_memshare.report.tables:variants_table markdown=true -->
"""

from __future__ import annotations

import importlib
import io
import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/studies/*/README.md")]
    if p.name != "CHANGELOG.md"
)
FIGURE = re.compile(r"(?P<shown>[-+]?\d[\d,]*(?:\.\d+)?)(?P<percent> ?%)?<!--= (?P<path>\S+) (?P<key>\S+) -->")
TABLE = re.compile(r"<!--table= (?P<path>\S+) (?P<function>\S+)(?P<options>(?: \w+=\S+)*) -->")
FOLDERS = "trtllm_memshare|benchmarks|build_scripts|tests|docs|plugins|deploy"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


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
            document = document[int(index)]
    return document


def is_shown(value: float, shown: str, is_percent: bool) -> bool:
    digits = len(shown.partition(".")[2])
    return f"{value * (100 if is_percent else 1):.{digits}f}" == shown.replace(",", "").lstrip("+")


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_results(page):
    for found in FIGURE.finditer(read(page)):
        value = look_up(json.loads((ROOT / found["path"]).read_text()), found["key"])
        assert is_shown(float(value), found["shown"], bool(found["percent"])), (found[0], value)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page):
    text = read(page)
    for found in TABLE.finditer(text):
        module, _, function = found["function"].partition(":")
        options = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in found["options"].split())}
        table = getattr(importlib.import_module(module), function)(
            json.loads((ROOT / found["path"]).read_text()), **options
        )
        below = text[found.end() :]
        for line in (row for row in table.splitlines() if row.startswith("|")):
            assert line in below, (found[0], line)


def test_the_markers_catch_a_wrong_figure():
    document = {"variants": [{"variant": "a", "accuracy": 0.994}], "rows": [3, 4]}
    assert look_up(document, "variants[variant=a].accuracy") == 0.994
    assert look_up(document, "rows[1]") == 4
    rows = {"rows": [{"a": 1, "b": 2}, {"a": 1, "b": 3}]}
    assert look_up(rows, "rows[a=1][b=3].b") == 3
    assert is_shown(0.994, "99.4", True)
    assert not is_shown(0.9946, "99.4", True)
    assert is_shown(12345, "12,345", False)
    assert is_shown(-0.5, "-0.5", False)
    assert FIGURE.search("gains 1.15<!--= r.json a.b --> times")["shown"] == "1.15"


@pytest.mark.parametrize("page", PAGES)
def test_named_paths_exist(page):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", read(page)):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(((?!https?:|#|mailto:)[^)#]+)", read(page)):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^ +|`)make ([\w-]+)", read(page), re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def commands(page: str) -> list[list[str]]:
    """Command lines of a page's code blocks: ``python ...`` and ``memshare ...``, continued lines joined."""
    blocks = re.findall(r"(?:^(?:    |\t).*\n?)+|^```\w*\n.*?^```", read(page), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        text = re.sub(r"^(?:[A-Z_]+=\S+ )+|^mpirun -n \d+ ", "", line.strip().removeprefix("$ "))
        if re.match(r"(?:\.venv/bin/)?(?:python3?|memshare) ", text):
            found.append(shlex.split(text.replace("$'", "'"), comments=True))
    return found


COMMANDS = sorted({(page, shlex.join(words)) for page in PAGES for words in commands(page)})


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[c[:60] for _, c in COMMANDS])
def test_commands_of_pages_know_their_options(page, command, monkeypatch):
    """``--help`` of each command works, and has every option that the page gives to it."""
    program, *words = shlex.split(command)
    if program.endswith("memshare"):
        words = ["-m", "trtllm_memshare", *words]
    if words[0] == "-m" and words[1] in ("pytest", "pip", "venv"):
        pytest.skip("not a command of this project")
    if words[0] != "-m" and not (ROOT / words[0]).is_file():
        pytest.skip(f"{words[0]} is the reader's own")
    options = {w.partition("=")[0] for w in words[1:] if w.startswith("--")}
    sub = words[2:3] if words[:2] == ["-m", "trtllm_memshare"] else []
    deeper = [w for w in words[len(sub) + (2 if words[0] == "-m" else 1) :][:1] if re.fullmatch(r"[a-z]+", w)]
    if sub in (["serve"], ["vllm"]) or (sub == ["bench"] and {"-m", "--model"} & set(words[2:])):
        pytest.skip("its options are those of the program that it wraps")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    for tail in ([*deeper, "--help"], ["--help"]):
        printed = help_of(words, [*sub, *tail], monkeypatch)
        if printed is not None:
            break
    assert printed is not None, command
    for option in options - {"--help"}:
        assert option in printed, (page, option)


def help_of(words: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a program prints; None if it does not take the arguments."""
    output = io.StringIO()
    is_module = words[0] == "-m"
    name = words[1] if is_module else words[0]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "path", [str((ROOT / name).parent), *sys.path])
    try:
        with redirect_stdout(output), redirect_stderr(io.StringIO()):
            if is_module:
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        if end.code not in (0, None):
            return None
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_empty(page):
    assert len(read(page).split()) > 30
