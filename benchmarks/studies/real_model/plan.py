"""Which arms the table has for which text: all of them at first, then those that decide; and which texts a process
has."""

from __future__ import annotations

import argparse

from trtllm_memshare.evaluation.page_arms import FORESEEN, PAIRED, Budget
from trtllm_memshare.evaluation.page_study import BY_HEAD, Task

TEXT_TOKENS = 2048
MAIN = (
    "random", "attention-redundancy", "attention-redundancy-recency",
    "redundancy-k", "surprisal-redundancy", "surprisal-led-signature", "surprisal-led-recency-signature",
    "attention-surprisal-redundancy", "rkv", *PAIRED,
)  # fmt: skip
SOME = (
    "snapkv", "streaming", "redundancy-v", "redundancy-signature", "redundancy-recency-signature", "random-once",
    "aligned", BY_HEAD, FORESEEN,
)  # fmt: skip
"""On every fourth text; the first two on every second of the later ones."""
AXES = ("random", "attention-redundancy")
"""On every fourth text: other shares kept, longer pages."""
ALL_ARMS_UNTIL = 16
"""Texts after these have fewer arms, so that there can be more of them."""
LATER = (
    "random", "attention-redundancy", "attention-redundancy-recency", "redundancy-k", "surprisal-led-signature",
    "surprisal-led-recency-signature",
    "redundancy-signature", "redundancy-recency-signature", *PAIRED,
)  # fmt: skip


def tasks_of(index: int) -> list[Task]:
    """The rows of a text by its place in the order."""
    if index >= ALL_ARMS_UNTIL:
        tasks = [Task(arm) for arm in LATER]
        if index % 2 == 0:
            tasks += [Task(arm, Budget(0.25)) for arm in LATER[:3]] + [Task(arm) for arm in SOME[:2]]
        if index % 4 == 2:
            tasks += [task for arm in AXES for task in (Task(arm, Budget(0.75)), *_longer_pages(arm))]
        return tasks
    tasks = [Task(arm) for arm in MAIN]
    if index % 4 == 0:
        tasks += [Task(arm) for arm in SOME]
    if index % 4 == 2:
        tasks += [Task(arm, Budget(kept)) for arm in AXES for kept in (0.25, 0.75)]
        tasks += [task for arm in AXES for task in _longer_pages(arm)]
    return tasks


def every_task() -> list[Task]:
    """All rows of a text, for a machine that has the time: every arm, and both arms of the axes."""
    tasks = [Task(arm) for arm in (*MAIN, *SOME)]
    tasks += [Task(arm, Budget(0.25)) for arm in LATER[:3]] + [Task(arm, Budget(0.75)) for arm in AXES]
    return [*tasks, *(task for arm in AXES for task in _longer_pages(arm))]


def _longer_pages(arm: str) -> list[Task]:
    return [Task(arm, pages_merged=count) for count in (2, 4)]


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers; raises argparse's error for anything else."""
    shard, slash, count = text.partition("/")
    if not (slash and shard.isdigit() and count.isdigit() and int(shard) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text}")
    return int(shard), int(count)
