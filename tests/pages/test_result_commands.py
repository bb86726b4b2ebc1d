"""What made a committed result can be run today: its script or module is where the recorded command says.

A script that moved leaves ``command`` as it was recorded; ``command_now`` beside it is the command of today. Code that
was removed is got back by ``git checkout COMMIT && ...``, and the page beside the result names the commit.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.pages.markers import ROOT


def commands() -> dict[str, str]:
    """The command of today, or else the recorded one, of each result that has one."""
    found = {}
    for path in sorted(ROOT.glob("benchmarks/**/results/**/*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "command" in document:
            found[path.relative_to(ROOT).as_posix()] = document.get("command_now", document["command"])
    return found


COMMANDS = commands()


def program(command: str) -> Path | None:
    """The file that a command runs; None if it is not there. Modules are found in the root and on ``PYTHONPATH``."""
    words = shlex.split(command)
    folders = [ROOT]
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        folders += [ROOT / folder for folder in value.split(":")] if name == "PYTHONPATH" else []
    assert words[0] in ("python", "python3", "bash", "pytest"), command
    if words[1] != "-m":
        places = [ROOT / words[1]]
    else:
        module = words[2].replace(".", "/")
        places = [folder / name for folder in folders for name in (f"{module}.py", f"{module}/__main__.py")]
    return next((place for place in places if place.is_file()), None)


@pytest.mark.parametrize("result", COMMANDS)
def test_what_made_a_result_is_there(result):
    removed = re.match(r"git checkout (\w+) && ", COMMANDS[result])
    if removed:
        assert f"commit {removed[1]} has it" in (ROOT / result).parents[1].joinpath("README.md").read_text()
        return
    command = re.sub(r"^git checkout \w+ -- \S+ && ", "", COMMANDS[result])
    assert program(command) is not None, (command, "is not there: add command_now to the result")


def test_programs_are_found_as_a_shell_finds_them():
    assert program("python benchmarks/fidelity.py --dataset FILE") == ROOT / "benchmarks/fidelity.py"
    assert program("python -m benchmarks.studies.sweeps.pools") == ROOT / "benchmarks/studies/sweeps/pools.py"
    assert program("python -m trtllm_memshare calibrate") == ROOT / "trtllm_memshare/__main__.py"
    assert program("python benchmarks/pressure_curve.py --shares 0.25") is None
    assert program("python -m trtllm_pytorch.pytorch_hook") is None
    assert program("A=1 PYTHONPATH=tests python -m trtllm_pytorch.pytorch_hook").name == "pytorch_hook.py"
