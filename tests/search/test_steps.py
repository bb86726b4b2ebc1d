"""Step boundaries on token ids, for character tokens and for word pieces."""

from __future__ import annotations

import numpy as np
import pytest

from build_scripts.tiny_reasoner.tokenizer import encode_fast
from trtllm_memshare.search.steps import BoundaryTokens

PIECES = ["So", " x", " =", " 3", ".", "5", "\n\n", "Wait", " The", " ", ".\n"]


def pieces(*texts: str) -> np.ndarray:
    return np.array([PIECES.index(t) for t in texts], np.int32)


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (pieces("So", " x", ".", " The", " x"), [3]),
        (pieces(" x", " =", " 3", ".", "5", " x"), []),  # a decimal point ends nothing
        (pieces("So", " x", "\n\n", "So"), [3]),
        (pieces("So", ".\n", "\n\n", "So"), [3]),
        (pieces("So", " x", "Wait", " x"), [2]),
        (pieces(".", " The"), [1]),
        (pieces("So"), []),
    ],
)
def test_word_pieces(tokens, starts):
    assert BoundaryTokens.from_texts(PIECES).step_starts(tokens, 0).tolist() == starts


@pytest.mark.parametrize(
    ("texts", "starts"),
    [
        (["\u6240\u4ee5", "\u3002", "\u90a3\u4e48", "\u3002\u300d", "\u518d"], [2, 4]),
        (["\u0938\u094b", "\u0964", " \u0905\u092c"], [2]),
        (["\u0645\u0627", "\u061f", " \u0646\u0639\u0645"], [2]),
        (["a", "\u2026", " b"], [2]),
    ],
)
def test_sentences_of_other_scripts_end(texts, starts):
    assert BoundaryTokens.from_texts(texts).step_starts(np.arange(len(texts)), 0).tolist() == starts


def test_character_tokens(boundaries):
    text = "x. y\nz 3.5\n\nw"
    starts = boundaries.step_starts(encode_fast(text).astype(np.int32), 0)
    assert [text[s:] for s in starts] == ["y\nz 3.5\n\nw", "z 3.5\n\nw", "w"]


def test_piece_by_piece_gives_the_same_starts(boundaries):
    tokens = encode_fast("Q: 1.\nWait. So. x\n\n\nyes? no\n" * 5).astype(np.int32)
    whole = boundaries.step_starts(tokens, 0).tolist()
    cut: list[int] = []
    for first in range(0, len(tokens), 7):
        cut += boundaries.step_starts(tokens[: first + 7], first).tolist()
    assert cut == whole


def test_tokens_of_any_classes_start_steps_where_the_rules_say():
    """The rules one by one, on ids that are any mixture of classes."""
    rng = np.random.default_rng(0)
    names = ("ends_line", "ends_sentence", "ends_wide", "blank", "spaced", "opens_step")
    for _ in range(300):
        b = BoundaryTokens(**{name: rng.random(40) < 0.25 for name in names})
        ids = rng.integers(0, 40, rng.integers(0, 12)).astype(np.int32)
        first, expected = int(rng.integers(0, len(ids) + 1)), []
        for position in range(max(first, 1), len(ids)):
            now, last, before = ids[position], ids[position - 1], ids[max(position - 2, 0)]
            if (
                ((b.ends_line[last] or b.ends_wide[last]) and not b.blank[now])
                or (b.ends_sentence[last] and b.spaced[now])
                or (b.ends_sentence[before] and b.blank[last] and not b.blank[now])
                or b.opens_step[now]
            ):
                expected.append(position)
        assert b.step_starts(ids, first).tolist() == expected
