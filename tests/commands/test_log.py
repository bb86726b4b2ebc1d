"""What the package logs reaches whoever runs a command: on stderr, beside progress bars, with stdout left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.engine_dir import write_engine
from trtllm_memshare.search.config import make_config

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: under pytest logging is configured."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture
def short_of_memory(tiny_checkpoint, tmp_path) -> list[object]:
    """Options of ``memshare bench``: one of the requests needs 27 blocks, in a pool of 20."""
    config = make_config("pressure", need="age", retired_becomes="dropped", protected_tokens=16)
    build = BuildConfig(max_seq_len=512, tokens_per_block=8, max_batch_size=4)
    write_engine(tmp_path / "engine", read_checkpoint(tiny_checkpoint), build, config, False)
    rows = [{"task_id": i, "prompt": f"Q: {100 + i} + 27 = ?\n", "output_tokens": 200} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--engine-dir", tmp_path / "engine", "--dataset", tmp_path / "rows.jsonl", "--kv-cache-blocks", 20,
            "--variants", "pressure:retired_becomes=dropped,need=age,protected_tokens=16"]  # fmt: skip


def test_a_benchmark_shows_pressure_on_stderr_and_its_report_on_stdout(short_of_memory):
    done = run("-m", "trtllm_memshare", "bench", *short_of_memory)
    assert done.returncode == 0, done.stderr
    (variant,) = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert sum(variant["pressure"]["retired_pages"].values()) > 0
    assert variant["pressure"]["num_failed_reliefs"] == 0
    assert "pressure_begins" not in done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["pressure_begins", "pressure_ends"]
    assert lines[1]["retired_pages"] == sum(variant["pressure"]["retired_pages"].values())


SPEAKS = """
import logging, sys
from trtllm_memshare.errors import run_command_line
log = logging.getLogger("trtllm_memshare.some.part")
def main():
    {before}
    log.debug("too small")
    log.info('{{"a": 1}}')
    log.warning("%d pages", 3)
    {after}
{first}
run_command_line(main)
"""


def speak(first: str = "", before: str = "pass", after: str = "pass") -> subprocess.CompletedProcess[str]:
    return run("-c", SPEAKS.format(first=first, before=before, after=after))


def test_lines_come_as_they_are_from_info_up():
    done = speak()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", '{"a": 1}\n3 pages\n')


def test_a_progress_bar_is_drawn_anew_below_a_line():
    done = speak(before="from tqdm import tqdm; bar = tqdm(total=2, ascii=True); bar.refresh()", after="bar.close()")
    drawn = done.stderr.replace("\r", "\n").split("\n")
    assert '{"a": 1}' in [piece.strip() for piece in drawn]
    assert "0/2" in done.stderr.split("3 pages")[1]
    assert done.stdout == ""


def test_whoever_has_configured_logging_gets_what_it_asked_for():
    done = speak(first="logging.basicConfig(level=logging.WARNING, format='mine: %(message)s')")
    assert done.stderr == "mine: 3 pages\n"


def test_a_line_is_shown_once_though_somebody_configures_logging_later():
    done = speak(before="logging.basicConfig(format='mine: %(message)s')")
    assert done.stderr == 'mine: {"a": 1}\nmine: 3 pages\n'


def test_a_stderr_that_is_gone_ends_nothing():
    done = speak(before="sys.stderr.close()", after="print('went on')")
    assert (done.returncode, done.stdout) == (0, "went on\n")
