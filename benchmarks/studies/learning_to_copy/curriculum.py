"""What the model of the traces is shown, and when: looking back is taught before language.

Text alone does not teach a model of this size to find an earlier copy, so the first steps are random tokens that come
again and again, over growing distances. Nothing but an earlier copy tells what follows there. Then comes text, and
among it, ever less often, windows that keep the habit:

- passages: pieces of one short text, or of random tokens, over and over in any order;
- renamed: a window of text in which some token ids, from few to all, have changed places. Its words mean nothing any
  more, its repeats are those of the text, and no two such windows are alike, which makes more of little text.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

_REPEATS = (  # share of the first stage done, window, shortest and longest period; tokens
    (0.5, 64, 4, 16),
    (0.8, 256, 8, 128),
    (1.0, 1024, 16, 512),
)
_TEXT_WINDOWS = ((0.6, 1024), (0.9, 2048), (1.0, 4096))  # share of the text stage done, window in tokens
_SHORTEST_PASSAGE = 8


@dataclass(frozen=True)
class Mixture:
    """Shares of training or of windows, in [0, 1].

    Attributes:
      repeats: of training, at its start, that goes to random tokens alone.
      passages, passages_at_end: of the windows after that, falling linearly.
      renamed, renamed_at_end: likewise.
      prompt: of the windows of text that start with the prompt, as every measured text does.
    """

    repeats: float = 0.15
    passages: float = 0.3
    passages_at_end: float = 0.1
    renamed: float = 0.2
    renamed_at_end: float = 0.1
    prompt: float = 0.05


class Curriculum:
    """Draws batches. Ids below ``first_id`` are special tokens: never drawn, never renamed.

    Attributes:
      in_text: whether the last batch came after the stage of random tokens.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        mixture: Mixture,
        vocab_size: int,
        first_id: int,
        pad_id: int,
        tokens_per_step: int,
        longest_window: int,
        seed: int,
    ) -> None:
        self._documents, self._mixture = documents, mixture
        self._vocab_size, self._first_id, self._pad_id = vocab_size, first_id, pad_id
        self._tokens_per_step, self._longest = tokens_per_step, longest_window
        self._rng = np.random.default_rng(seed)
        sizes = np.array([len(d) for d in documents], float)
        self._probabilities = sizes / sizes.sum()
        self.in_text = False

    def batches(self) -> Generator[Any, float, None]:
        """Started; ``send`` takes the share of training done and gives what ``batch`` does."""

        def generate() -> Generator[Any, float, None]:
            done = yield
            while True:
                done = yield self.batch(done)

        generator = generate()
        next(generator)
        return generator

    def batch(self, done: float) -> np.ndarray:
        """int64 ``[sequences, window]``, padded; ``done`` is the share of training done."""
        mixture = self._mixture
        self.in_text = done >= mixture.repeats
        if not self.in_text:
            stage = done / mixture.repeats
            _, window, shortest, longest = next(row for row in _REPEATS if stage < row[0])
            return np.stack([self._repeats(w, shortest, longest) for w in self._windows(window)])
        stage = (done - mixture.repeats) / max(1.0 - mixture.repeats, 1e-9)
        passages = mixture.passages + (mixture.passages_at_end - mixture.passages) * stage
        renamed = mixture.renamed + (mixture.renamed_at_end - mixture.renamed) * stage
        rows = []
        for window in self._windows(next(w for end, w in _TEXT_WINDOWS if stage < end or end == 1.0)):
            kind = self._rng.random()
            if kind < passages:
                rows.append(self._passages(window))
            else:
                text = self._text(window)
                rows.append(self._renamed(text) if kind < passages + renamed else text)
        return np.stack(rows)

    def _windows(self, window: int) -> list[int]:
        window = min(window, self._longest)
        return [window] * max(1, self._tokens_per_step // window)

    def _random(self, length: int) -> np.ndarray:
        return self._rng.integers(self._first_id, self._vocab_size, length)

    def _repeats(self, window: int, shortest: int, longest: int) -> np.ndarray:
        """Random tokens with a period drawn evenly on a logarithmic scale."""
        period = round(math.exp(self._rng.uniform(math.log(shortest), math.log(longest))))
        return np.resize(self._random(period), window)

    def _text(self, window: int) -> np.ndarray:
        document = self._documents[self._rng.choice(len(self._documents), p=self._probabilities)]
        last = max(0, len(document) - window)
        start = 0 if self._rng.random() < self._mixture.prompt else self._rng.integers(last + 1)
        part = document[start : start + window]
        return np.pad(part, (0, window - len(part)), constant_values=self._pad_id)

    def _passages(self, window: int) -> np.ndarray:
        source = self._text(window // 2) if self._rng.random() < 0.5 else self._random(window // 2)
        pieces, length = [], 0
        while length < window:
            size = int(self._rng.integers(_SHORTEST_PASSAGE, window // 2))
            start = int(self._rng.integers(len(source) - size + 1))
            pieces.append(source[start : start + size])
            length += size
        return np.concatenate(pieces)[:window]

    def _renamed(self, text: np.ndarray) -> np.ndarray:
        names = np.arange(self._vocab_size)
        some = self._first_id + np.flatnonzero(self._rng.random(self._vocab_size - self._first_id) < self._rng.random())
        names[some] = self._rng.permutation(some)
        return names[text]
