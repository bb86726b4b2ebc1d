"""Scripts hold no logic: a script parses, calls and prints, and nothing reaches into one by its bare name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 100
FILES = sorted(
    p
    for pattern in ("benchmarks/*.py", "benchmarks/gpu/**/*.py", "benchmarks/studies/*/*.py", "build_scripts/**/*.py")
    for p in ROOT.glob(pattern)
)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def has_parser(tree: ast.Module) -> bool:
    """Whether the file makes an ``ArgumentParser`` of its own."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any("ArgumentParser" in (getattr(f, "attr", None), getattr(f, "id", None)) for f in calls)


def imported(tree: ast.Module) -> set[str]:
    """First parts of the names that a file imports."""
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_script_is_short(path):
    text = path.read_text()
    if has_parser(ast.parse(text)):
        count = len(text.splitlines())
        assert count <= MAX_LINES, f"{named(path)} has {count} lines: its logic belongs in a module with tests"


def test_nobody_imports_a_file_of_these_rooms_by_its_bare_name():
    """That works only from the folder of the file or after an edit of ``sys.path``, which the linter does not see."""
    bare = {p.stem for p in FILES if not p.stem.startswith("__")}
    for path in [*FILES, *ROOT.glob("tests/**/*.py")]:
        beside = {p.stem for p in path.parent.glob("*.py")} if path not in FILES else set()
        found = imported(ast.parse(path.read_text())) & bare - beside
        assert not found, f"{named(path)} imports {sorted(found)} (name its package: benchmarks.x)"


def test_the_check_sees_a_parser_and_a_bare_import():
    assert has_parser(ast.parse("import argparse\nparser = argparse.ArgumentParser()"))
    assert has_parser(ast.parse("from argparse import ArgumentParser\nmain(ArgumentParser())"))
    assert not has_parser(ast.parse("def add(parser: argparse.ArgumentParser): ..."))
    assert imported(ast.parse("import a.b\nfrom c.d import e\nfrom . import f")) == {"a", "c"}
