"""Runs a command of ours where the program that it starts is a script of the test's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import trtllm_memshare

ROOT = Path(trtllm_memshare.__file__).parents[1]
_CODE = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find(name, *rest)
from trtllm_memshare.__main__ import main
main()
"""


def run_program(folder: Path, name: str, text: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """The command, in a process group of its own.

    Args:
      folder: where the script is written; it comes first on PATH.
      name: of the script, ``text``: all of it.
      arguments: of the command.
      variables: beside this process's.
    """
    program = folder / name
    program.write_text(text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    settings = {"PATH": f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, *arguments],
        env={**os.environ, **settings, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
