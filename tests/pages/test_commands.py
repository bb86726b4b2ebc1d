"""Commands of pages can be given as they stand there: programs, options, make targets and shell scripts are known."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from pages.test_pages import PAGES, read

from benchmarks.pages.markers import COMMENT, ROOT
from trtllm_memshare.trtllm.pytorch import wrap
from trtllm_memshare.vllm import commands as vllm_commands

PROGRAM = r"(?:\.venv/bin/)?(?:python3?|memshare|bash|make)"


def commands(page: str) -> list[list[str]]:
    """Command lines in code blocks and in backticks: continued lines joined, variables and ``mpirun`` left out."""
    text = COMMENT.sub("", read(page))
    blocks = re.findall(r"(?:^(?:    |\t).*\n?)+|^```\w*\n.*?^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [" ".join(code.split()) for code in re.findall(rf"`({PROGRAM} [^`]+)`", text)]
    found = []
    for line in lines:
        command = re.sub(r"^(?:[A-Z_]+=\S+ )+|^mpirun -n \d+ ", "", line.strip().removeprefix("$ "))
        if re.match(rf"{PROGRAM} ", command):
            found.append(shlex.split(command.replace("$'", "'"), comments=True))
    return found


ALL = sorted({(page, shlex.join(words)) for page in PAGES for words in commands(page)})


def those_of(*programs: str) -> pytest.MarkDecorator:
    cases = [(page, command) for page, command in ALL if command.split()[0].removeprefix(".venv/bin/") in programs]
    assert cases
    return pytest.mark.parametrize(("page", "command"), cases, ids=[command[:60] for _, command in cases])


@those_of("python", "python3", "memshare")
def test_commands_know_their_options(page, command, monkeypatch):
    """``--help`` of each command works, and has every option that the page gives to it."""
    program, *words = shlex.split(command)
    if program.endswith("memshare"):
        words = ["-m", "trtllm_memshare", *words]
    if words[0] == "-m" and words[1] in ("pytest", "pip", "venv"):
        pytest.skip("not a command of this project")
    if words[0] != "-m" and "/" not in words[0]:
        pytest.skip(f"{words[0]} is the reader's own")
    assert words[0] == "-m" or (ROOT / words[0]).is_file(), f"{page} names {words[0]}, which is not there"
    if words[:2] == ["-m", "trtllm_memshare"] and wraps_another(words[2:]):
        return
    options = {w.partition("=")[0] for w in words[1:] if w.startswith("--")}
    sub = words[2:3] if words[:2] == ["-m", "trtllm_memshare"] else []
    deeper = [w for w in words[len(sub) + (2 if words[0] == "-m" else 1) :][:1] if re.fullmatch(r"[a-z]+", w)]
    for tail in ([*deeper, "--help"], ["--help"]):
        printed = help_of(words, [*sub, *tail], monkeypatch)
        if printed is not None:
            break
    assert printed is not None, command
    for option in options - {"--help"}:
        assert option in printed, (page, option)


def wraps_another(words: list[str]) -> bool:
    """Whether vLLM's or TensorRT-LLM's own program runs; our part of its command line is then made, or refused."""
    name, *arguments = words
    if name == "vllm" and arguments[0] in ("serve", "bench"):
        if len(arguments) > 2:  # else the page only names it
            assert "--scheduler-cls" in vllm_commands.engine_arguments(arguments)
        return True
    if (name == "serve" and "--engine-dir" not in arguments) or (name == "bench" and {"-m", "--model"} & {*arguments}):
        assert "options.yaml" in wrap.place_option(name, arguments, "options.yaml")
        return True
    return False


_HELP: dict[tuple[str, ...], str | None] = {}


def help_of(words: list[str], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a program prints; None if it does not take the arguments.

    As for a user, who has the package installed: a script finds what is beside it, a module what is in the root.
    """
    is_module = words[0] == "-m"
    name = words[1] if is_module else words[0]
    key = (name, *arguments)
    if key in _HELP:
        return _HELP[key]
    output = io.StringIO()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    root = ROOT if is_module else (ROOT / name).parent
    monkeypatch.setattr(sys, "path", [str(root), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)])
    for loaded in [m for m in sys.modules if m.partition(".")[0] in ("benchmarks", "build_scripts")]:
        monkeypatch.delitem(sys.modules, loaded)
    _HELP[key] = None
    try:
        with redirect_stdout(output), redirect_stderr(io.StringIO()):
            if is_module:
                monkeypatch.delitem(sys.modules, f"{name}.__main__", raising=False)
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        if end.code not in (0, None):
            return None
    _HELP[key] = output.getvalue()
    return _HELP[key]


@those_of("make")
def test_make_would_run(page, command):
    line = ["make", "-n", *shlex.split(command)[1:]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@those_of("bash")
def test_shell_scripts_parse_and_know_their_options(page, command):
    _, script, *arguments = shlex.split(command)
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    text = (ROOT / script).read_text()
    for called in re.findall(r"(?:benchmarks|build_scripts)/\w+\.py", text):  # what it hands its arguments on to
        text += (ROOT / called).read_text() if (ROOT / called).is_file() else ""
    for option in (a for a in arguments if a.startswith("--")):
        assert option in text, option
