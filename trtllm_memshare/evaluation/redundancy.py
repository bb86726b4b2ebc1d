"""How repetitive a set of texts is: the measures that our real traces are described by.

A word is a whitespace-separated piece; a step is the text between blank lines. The same definitions applied to the
bundled model's outputs show how far that toy is from real reasoning.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Redundancy:
    """Measures over a set of texts, pooled; ratios in [0, 1], 0 where no text is long enough to have a window.

    Attributes:
      words_per_text, steps_per_text: means.
      steps_over: share of steps with an earlier step of the same text at a cosine above 0.8 and 0.9.
      words_in_steps_over: share of all words that lie in such steps.
      windows_seen: share of windows of 8, 16 and 32 words that occurred before in the same text.
      words_covered: share of words inside a non-overlapping repeat of at least 8, 16 and 32 words.
      near_blocks_same, near_blocks_any: share of 8-word blocks with an earlier block that agrees in at least 80 % of
        its words, slot by slot; the earlier one starts at a multiple of 8, or anywhere.
    """

    num_texts: int
    words_per_text: float
    steps_per_text: float
    steps_over: dict[float, float]
    words_in_steps_over: dict[float, float]
    windows_seen: dict[int, float]
    words_covered: dict[int, float]
    near_blocks_same: float
    near_blocks_any: float


def measure(texts: list[str]) -> Redundancy:
    """Measures texts; repeats between two texts do not count.

    Raises:
      ValueError: no texts, or one without a word.
    """
    words = [text.split() for text in texts]
    if not words or not all(words):
        empty = [i for i, w in enumerate(words) if not w]
        what = f"texts {empty} without a word" if words else "none"
        raise ValueError(f"redundancy is measured on texts of at least one word, got {what} (leave those out)")
    steps = [[s.lower().split() for s in _BLANK_LINES.split(text) if s.split()] for text in texts]
    total_words, total_steps = sum(map(len, words)), sum(map(len, steps))
    similar, similar_words = Counter[float](), Counter[float]()
    for of_text in steps:
        best = best_earlier_cosine(of_text)
        for threshold in (0.8, 0.9):
            over = best > threshold
            similar[threshold] += int(over.sum())
            similar_words[threshold] += sum(len(s) for s, o in zip(of_text, over, strict=True) if o)
    ids = [_word_ids(w) for w in words]
    seen = {n: [windows_seen_before(i, n) for i in ids] for n in (8, 16, 32)}
    near = {phase: np.concatenate([best_block_agreement(i, 8, phase) for i in ids]) for phase in ("same", "any")}
    return Redundancy(
        num_texts=len(texts),
        words_per_text=total_words / len(texts),
        steps_per_text=total_steps / len(texts),
        steps_over={t: similar[t] / total_steps for t in (0.8, 0.9)},
        words_in_steps_over={t: similar_words[t] / total_words for t in (0.8, 0.9)},
        windows_seen={n: _mean(np.concatenate(s)) for n, s in seen.items()},
        words_covered={n: sum(words_in_repeats(i, n) for i in ids) / total_words for n in (8, 16, 32)},
        near_blocks_same=_mean(near["same"] >= 0.8),
        near_blocks_any=_mean(near["any"] >= 0.8),
    )


def best_earlier_cosine(steps: list[list[str]]) -> np.ndarray:
    """For each step the largest cosine of its bag of words with an earlier one, float64 ``[num_steps]``; first: 0.

    Bags hold counts, so their products are whole numbers, exact in float64 in whatever order a BLAS adds them.
    Normalised bags would put a cosine of exactly 0.9 on either side of a threshold, by machine.
    """
    vocabulary: dict[str, int] = {}
    bags = np.zeros((len(steps), len({w for s in steps for w in s})))
    for row, step in zip(bags, steps, strict=True):
        for word in step:
            row[vocabulary.setdefault(word, len(vocabulary))] += 1
    products = bags @ bags.T
    squares = products.diagonal()
    cosines = np.tril(products / np.sqrt(np.outer(squares, squares)), -1)
    return cosines.max(1) if len(steps) else np.zeros(0)


def windows_seen_before(ids: np.ndarray, width: int) -> np.ndarray:
    """For each window of ``width`` words, stride 1, whether an equal one started earlier: bool ``[windows]``."""
    if len(ids) < width:
        return np.zeros(0, bool)
    windows = np.lib.stride_tricks.sliding_window_view(ids, width)
    _, first, inverse = np.unique(windows, axis=0, return_index=True, return_inverse=True)
    return first[inverse.ravel()] < np.arange(len(windows))


def words_in_repeats(ids: np.ndarray, shortest: int) -> int:
    """Words inside a repeat of at least ``shortest`` words whose earlier copy does not overlap it."""
    covered = np.zeros(len(ids), bool)
    if len(ids) < shortest:
        return 0
    ends: dict[bytes, int] = {}
    windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ids, shortest))
    for start, window in enumerate(windows):
        earlier = ends.setdefault(window.tobytes(), start)
        if start - earlier >= shortest:
            covered[start : start + shortest] = True
    return int(covered.sum())


def best_block_agreement(ids: np.ndarray, size: int, phase: str) -> np.ndarray:
    """For each block the best share of equal words with an earlier block, slot by slot: float ``[blocks]``.

    Args:
      size: words per block; blocks are cut at multiples of it.
      phase: "same": the earlier block also starts at a multiple of ``size``; "any": anywhere before this block.
    """
    num_blocks = len(ids) // size
    best = np.zeros(num_blocks)
    for block in range(1, num_blocks):
        start = block * size
        stride = size if phase == "same" else 1
        earlier = np.lib.stride_tricks.sliding_window_view(ids[:start], size)[::stride]
        best[block] = (earlier == ids[start : start + size]).mean(1).max()
    return best


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def _word_ids(words: list[str]) -> np.ndarray:
    vocabulary: dict[str, int] = {}
    return np.array([vocabulary.setdefault(w, len(vocabulary)) for w in words], np.int32)
