"""The benchmark's data sets: held-out problems of 3 to 6 terms, drawn with fixed seeds, none in two files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from build_scripts.tiny_reasoner.problems import HARD_DIGITS, REPETITIVE_DIGITS, Problem, sample_problem

OUTPUT_TOKENS = 2048
"""Cap on generated tokens that no transcript of 3 to 6 terms reaches: the longest of 36,000 drawn ones with 6 terms
has 1,753 tokens, the longest in the files 1,698. (8 terms, which no file holds, take up to 2,320.)"""

SIZES = {"demo": 20, "small": 60, "evaluation": 500, "hard": 100, "tuning": 300, "repetitive": 100, "paired": 2000}
"""Problems per file. ``tuning`` is what settings are chosen on, so that ``evaluation`` stays unseen by them too.
``paired`` is more of the kind of ``evaluation``, for tests between arms that 500 problems cannot tell apart. New names
go to the end: the place in this table is part of the seed."""

_DIGITS = {"hard": HARD_DIGITS, "repetitive": REPETITIVE_DIGITS}
_SEED = 2507_21433


def write_datasets(folder: Path) -> dict[str, Path]:
    """Writes every file to ``folder``; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[Problem] = set()
    paths = {}
    for index, (name, size) in enumerate(SIZES.items()):
        rng = random.Random(_SEED + index)
        lines: list[str] = []
        while len(lines) < size:
            problem = sample_problem(rng, rng.randint(3, 6), held_out=True, digits=_DIGITS.get(name, tuple(range(10))))
            if problem in seen:
                continue
            seen.add(problem)
            row = {
                "task_id": len(lines),
                "prompt": problem.prompt,
                "output_tokens": OUTPUT_TOKENS,
                "answer": str(problem.answer),
            }
            lines.append(json.dumps(row))
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("\n".join(lines) + "\n")
    return paths
