"""Which texts each kind of row of the table has, and which of them a process takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from trtllm_memshare.evaluation.page_arms import DEFAULT, FORESEEN, PAIRED, Budget
from trtllm_memshare.evaluation.page_study import BY_HEAD, Task

TEXT_TOKENS = 2048
NUM_TEXTS = 109

_DECIDE = (
    "random", "attention-redundancy", "attention-redundancy-recency", "redundancy-k", "surprisal-led-signature",
    DEFAULT, *PAIRED,
)  # fmt: skip
_PUBLISHED = ("snapkv", "streaming", "rkv", "redundancy-v", "surprisal-redundancy")
_SIGNATURES = ("redundancy-signature", "redundancy-recency-signature")
_OTHERS = ("attention-surprisal-redundancy", "random-once", BY_HEAD, FORESEEN)
_AXES = ("random", "attention-redundancy")
_PAPERS_SHARES = (0.62, 0.53)
"""What is kept where 38 and 47 % are given up, as the published method reports."""
_FEW = range(20)
_HUNDRED = [*range(98), 99, 101]  # as it came, in two processes
_QUARTER = [*_FEW, *range(20, NUM_TEXTS, 2)]

PLAN: dict[Task, Sequence[int]] = {
    **dict.fromkeys(map(Task, _DECIDE), range(NUM_TEXTS)),
    **dict.fromkeys(map(Task, _PUBLISHED), _HUNDRED),
    Task("aligned"): range(100),
    **dict.fromkeys(map(Task, _SIGNATURES), range(60)),
    **dict.fromkeys(map(Task, _OTHERS), _FEW),
    **{Task(arm, Budget(0.25)): _QUARTER for arm in _DECIDE[:3]},
    **{Task(arm, Budget(0.75)): _FEW for arm in (*_AXES, DEFAULT)},
    Task(DEFAULT, Budget(0.25)): _FEW,
    **{Task(arm, Budget(kept)): _FEW for arm in ("random", "paper-alias", DEFAULT) for kept in _PAPERS_SHARES},
    **{Task(arm, pages_merged=count): _FEW for arm in _AXES for count in (2, 4)},
}
"""Of each kind of row the texts, by their places in the order: few at first, more of what they could not tell."""


def tasks_of(index: int) -> list[Task]:
    """The rows of a text by its place in the order."""
    return [task for task, texts in PLAN.items() if index in texts]


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers; raises argparse's error for anything else."""
    shard, slash, count = text.partition("/")
    if not (slash and shard.isdigit() and count.isdigit() and int(shard) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text}")
    return int(shard), int(count)
