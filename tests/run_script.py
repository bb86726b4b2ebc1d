"""Runs a command line of the repository inside the test's process: nothing is imported twice."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

from trtllm_memshare.errors import run_command_line


def run_script(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``python path arguments`` would print, and its exit code. An error that is no ``SystemExit`` comes out."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        spec.loader.exec_module(module)
        try:
            run_command_line(module.main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess([str(path), *arguments], code, out.getvalue(), err.getvalue())
