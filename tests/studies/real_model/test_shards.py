"""Processes that share a study's texts: one file of rows, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "studies" / "real_model" / "shards.sh"
# Stands for a module: adds one row of its shard, and where a file named "stay" lies, half a row, and never ends.
MODULE = r"""#!/bin/bash
while [ $# -gt 0 ]; do
  case $1 in --shard) shard=${2%%/*}; shift ;; --output) output=$2; shift ;; --fail) exit 3 ;; esac
  shift
done
row=$(printf '{"text": "%s"}' "$shard")
grep -qF "$row" "$output" || echo "$row" >> "$output"
if [ -f stay ]; then printf '{"text": "half' >> "$output"; exec sleep 60; fi
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "python").write_text(MODULE)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def start(folder, *options):
    return subprocess.Popen(
        ["bash", str(SCRIPT), "2", "rows.jsonl", "table", *options],
        cwd=folder, env={**os.environ, "PYTHON": str(folder / "python")},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def lines(path):
    return sorted(path.read_text().splitlines()) if path.is_file() else []


def test_rows_of_all_are_added_to_those_that_are_there(folder):
    (folder / "rows.jsonl").write_text('{"text": "old"}\n{"text": "1"}\n')
    process = start(folder)
    assert process.communicate()[0].endswith("3 rows\n")
    assert process.returncode == 0
    assert lines(folder / "rows.jsonl") == ['{"text": "0"}', '{"text": "1"}', '{"text": "old"}']
    assert not (folder / "rows.jsonl.parts").exists()


def test_a_run_that_was_killed_leaves_its_rows_to_the_next(folder):
    (folder / "stay").touch()
    process = start(folder)
    parts = [folder / "rows.jsonl.parts" / f"rows_{i}.jsonl" for i in (0, 1)]
    until = time.monotonic() + 30
    while not all("half" in "".join(lines(p)) for p in parts) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder / "stay").unlink()
    assert start(folder).wait() == 0
    assert lines(folder / "rows.jsonl") == ['{"text": "0"}', '{"text": "1"}']


def test_a_process_that_fails_fails_the_run(folder):
    (folder / "rows.jsonl").write_text('{"text": "old"}\n')
    assert start(folder, "--fail").wait() == 1
    assert lines(folder / "rows.jsonl") == ['{"text": "old"}']
