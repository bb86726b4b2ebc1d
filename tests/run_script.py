"""Runs a command line of the repository inside the test's process: nothing is imported twice."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock


def run_script(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``python path arguments`` would print, and its exit code. An error that is no ``SystemExit`` comes out."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess([str(path), *arguments], code, out.getvalue(), err.getvalue())
