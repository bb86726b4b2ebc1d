"""Extremes of everything that a user can set on a request: the table of the fault matrix.

Values that a surface cannot write (None in an int tensor, say) are left out by that surface's own test.
"""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import repeat
from typing import Any

import numpy as np

from trtllm_memshare.serving.request import SamplingParams

VOCAB_SIZE = 80
HUGE = (2**63, 2**64, 2**70, 10**5000)
NO_NUMBERS: tuple[Any, ...] = (None, "a", "0.5", b"1", [], {}, object(), True, 1j)
NO_INTEGERS: tuple[Any, ...] = (*NO_NUMBERS, 0.5, math.nan, math.inf)


class NoLength:
    """Can be iterated and looked into, and raises when it is asked for its length."""

    def __iter__(self):
        return iter([1, 2])

    def __len__(self):
        raise RuntimeError("no length")


NO_LISTS: tuple[Any, ...] = (None, 44, "44", b"4", 0.5, repeat(1), np.array(5), NoLength())
TOKENS_OUTSIDE: tuple[Any, ...] = (-1, VOCAB_SIZE, 440, 2**31, 2**40, 2**63, -(2**70), 0.5, math.nan, None, "a", True)


def _each(name: str, values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return [(name, value) for value in values]


_FIELDS = {"input_ids", "group", "listener", *(field.name for field in fields(SamplingParams))}
BAD: list[tuple[str, Any]] = [
    *_each("input_ids", ([], *NO_LISTS, *([1, token] for token in TOKENS_OUTSIDE), [[1]], "text")),
    *_each("max_new_tokens", (*NO_INTEGERS, 0, -1, -(2**70), *HUGE)),
    *_each("temperature", (*NO_NUMBERS, -0.1, -1e-40, 101.0, 1e308, math.nan, math.inf, -math.inf, 10**5000)),
    *_each("top_k", (*NO_INTEGERS, -1, -1000, *HUGE)),
    *_each("top_p", (*NO_NUMBERS, -0.1, 1.1, math.nan, math.inf, 10**5000)),
    *_each("seed", (*NO_INTEGERS, -1, 2**64, 2**70, 10**5000)),
    *_each("stop_token_ids", (*NO_LISTS, *((token,) for token in TOKENS_OUTSIDE))),
    *_each("stop_sequences", (*NO_LISTS, (4,), ((),), *(((1, token),) for token in TOKENS_OUTSIDE))),
    *_each("bad_words", (*NO_LISTS, (4,), ((),), *(((token,),) for token in TOKENS_OUTSIDE))),
    ("bad_words", tuple((i,) for i in range(VOCAB_SIZE))),
    *_each("min_new_tokens", (*NO_INTEGERS, -1, 257, *HUGE)),
    *_each("repetition_penalty", (*NO_NUMBERS, 0.0, -1.0, math.nan, math.inf, 1e9, 10**5000)),
    *_each("presence_penalty", (*NO_NUMBERS, math.nan, math.inf, -1e9, 10**5000)),
    *_each("frequency_penalty", (*NO_NUMBERS, math.nan, -math.inf, 1e9, 10**5000)),
    *_each("log_probs", (None, 1, 0, "yes", [], 0.5)),
    *_each("min_kept", (*NO_NUMBERS[1:], -0.1, 1.1, math.nan, math.inf)),
    *_each("memshare", (None, 1, 0, "no", [], 0.5)),
    *_each("group", (-1, *HUGE, 0.5, "a", [], {}, True, math.nan)),
    *_each("listener", (5, "f", [])),
]
BAD = [(name, value) for name, value in BAD if name in _FIELDS]
"""(field, value) that must be refused; ``input_ids``, ``group`` and ``listener`` are arguments of ``submit``."""

GOOD: list[tuple[str, Any]] = [
    ("max_new_tokens", 1),
    ("temperature", 1e-6),
    ("temperature", 100.0),
    ("top_k", 2**31 - 1),
    ("top_p", 1e-300),
    ("seed", 2**64 - 1),
    ("stop_token_ids", tuple(range(VOCAB_SIZE))),
    ("stop_sequences", ((1,), (2, 3))),
    ("bad_words", tuple((i,) for i in range(VOCAB_SIZE - 1))),
    ("min_new_tokens", 256),
    ("repetition_penalty", 1e-3),
    ("presence_penalty", -1e3),
    ("frequency_penalty", 1e3),
    ("log_probs", True),
]
"""The last values on the right side; each must run and end."""

GREEDY: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1e-40},
    {"temperature": 9e-7},
    {"top_k": 1},
    {"top_p": 0.0},
    {"top_p": -0.0},
]
