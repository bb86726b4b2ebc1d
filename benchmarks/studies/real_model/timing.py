"""What the modules of this study take: their command lines out of ``all.sh``, and the seconds from row to row."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from trtllm_memshare.evaluation.real_rows import read_rows

RESULTS = Path("benchmarks/studies/real_model/results")
_POLL_S = 0.05
Kind = tuple[Any, ...]


def parts(script: str) -> Iterator[tuple[Path, list[str]]]:
    """Results file and command line of each module that ``all.sh`` runs for results."""
    names: dict[str, str] = {"results": str(RESULTS)}
    lines = script.replace("\\\n", " ")
    for name in re.findall(r'^(\w+)="(?!\$)', lines, re.MULTILINE):
        names[name] = " ".join(lines.split(f'{name}="')[1].split('"')[0].split())
    for line in lines.splitlines():
        for name, value in names.items():
            line = line.replace(f"${name}", value)
        words = line.split()
        if words[:1] == ["split"] and len(words) > 2 and words[1].endswith(".jsonl"):
            yield Path(words[1]), words[2:]
        elif words[:1] == ["study"] and words[1] in ("generation", "table"):
            output = words.index("--output") if "--output" in words else None
            yield Path(words[output + 1]) if output else RESULTS / "generation.jsonl", words[1:]
        elif words[:2] == ["study", "loops"]:
            yield Path(words[-1] if "--output" in words else RESULTS / "loops.json"), words[1:]


def arms_of(words: list[str]) -> list[str]:
    """The arms that a command line names."""
    if "--arms" not in words:
        return []
    behind = words[words.index("--arms") + 1 :]
    return list(takewhile(lambda word: not word.startswith("--"), behind))


def kind_of(row: dict[str, Any]) -> Kind:
    """What rows of equal cost have in common."""
    return tuple(row.get(name) for name in ("arm", "min_kept", "tokens_per_block", "tokens", "decoding"))


def time_rows(words: list[str], num_texts: int) -> dict[Kind, list[float]]:
    """Seconds of every row of the first texts, by kind; that of the first holds the start of the process."""
    found, seen = defaultdict(list), 0
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        last = time.monotonic()
        process = subprocess.Popen(_command(words, output, "--texts", str(num_texts)), stderr=subprocess.DEVNULL)
        is_running = True
        while is_running:
            is_running = process.poll() is None
            rows = read_rows(output) if output.is_file() else []
            now = time.monotonic()
            for row in rows[seen:]:
                found[kind_of(row)].append((now - last) / (len(rows) - seen))
            if len(rows) > seen:
                seen, last = len(rows), now
            time.sleep(_POLL_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return found


def time_whole(words: list[str]) -> float:
    """Seconds of a command, with its start."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        subprocess.run(
            _command(words, Path(folder) / "result.json"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        return time.monotonic() - started


def _command(words: list[str], output: Path, *more: str) -> list[str]:
    """A module's command line, its last options taking the place of its own."""
    module = f"benchmarks.studies.real_model.{words[0]}"
    return [sys.executable, "-m", module, *words[1:], *more, "--output", str(output)]
