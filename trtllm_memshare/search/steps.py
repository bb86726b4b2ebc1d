"""Cuts generated tokens into reasoning steps, on token ids alone.

A step starts after a line break, after a sentence end that white space follows (or none, where a script puts none), and
at an opener such as "Wait" wherever it stands. Which ids do what is worked out once from the tokenizer, so nothing is
detokenized on the hot path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

OPENERS = ("Wait", "Hmm", "Alternatively", "Actually", "However")
SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u061f", "\u06d4", "\u0964", "\u0965", "\u0589", "\u1362")
"""With white space behind them: Latin, Arabic and Urdu, Devanagari, Armenian, Ethiopic."""
WIDE_SENTENCE_ENDS = ("\u3002", "\uff01", "\uff1f", "\uff0e", "\uff61", "\u17d4", "\u104b")
"""With none: Chinese and Japanese, Khmer, Burmese."""
_CLOSERS = "\"')]}\u00bb\u201d\u2019\u300d\u300f\uff09"


@dataclass(frozen=True)
class BoundaryTokens:
    """Classes of token ids, each bool ``[vocab_size]``.

    Attributes:
      ends_line: the text ends with a line break.
      ends_sentence: the text ends with a full stop, exclamation or question mark, or what other scripts have for it.
      ends_wide: the same in scripts that put no white space behind it; brackets and quotes may close after it.
      blank: nothing but white space.
      spaced: white space, then text: " The".
      opens_step: an opener.
    """

    ends_line: np.ndarray
    ends_sentence: np.ndarray
    ends_wide: np.ndarray
    blank: np.ndarray
    spaced: np.ndarray
    opens_step: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int) -> BoundaryTokens:
        """Classifies each id by its text. ``tokenizer``: a transformers tokenizer; ``vocab_size``: the model's."""
        known = min(vocab_size, len(tokenizer))
        return cls.from_texts(tokenizer.batch_decode([[i] for i in range(known)]) + [""] * (vocab_size - known))

    @classmethod
    def from_texts(cls, texts: list[str]) -> BoundaryTokens:
        """Classifies token ids by position in ``texts``."""
        stripped = [t.strip() for t in texts]
        return cls(
            ends_line=np.array([t.rstrip(" \t").endswith("\n") for t in texts]),
            ends_sentence=np.array([s.endswith(SENTENCE_ENDS) for s in stripped]),
            ends_wide=np.array([s.rstrip(_CLOSERS).endswith(WIDE_SENTENCE_ENDS) for s in stripped]),
            blank=np.array([bool(t) and not s for t, s in zip(texts, stripped, strict=True)]),
            spaced=np.array([bool(s) and t[0].isspace() for t, s in zip(texts, stripped, strict=True)]),
            opens_step=np.array([s in OPENERS for s in stripped]),
        )

    @cached_property
    def _roles(self) -> np.ndarray:
        """What an id is good for as the token itself, the one before, and the one before that: uint8 ``[vocab, 3]``.

        A step starts at a token in four cases, a bit each: behind the end of a line; behind that of a sentence, with
        white space of its own; behind both; anywhere. It does where all three tokens have the bit of one case.
        """
        line, sentence, gap, opener = 1, 2, 4, 8
        roles = np.full((len(self.blank), 3), [0, opener, line | sentence | opener], np.uint8)
        roles[:, 0] |= np.where(self.blank, 0, line | gap).astype(np.uint8)
        roles[self.spaced, 0] |= sentence
        roles[self.opens_step, 0] |= opener
        roles[self.ends_line | self.ends_wide, 1] |= line
        roles[self.ends_sentence, 1] |= sentence
        roles[self.blank, 1] |= gap
        roles[self.ends_sentence, 2] |= gap
        return roles

    def step_starts(self, token_ids: np.ndarray, first: int) -> np.ndarray:
        """Positions from ``first`` on at which a step starts.

        Args:
          token_ids: int32 ``[n]``, the request so far.
          first: first position to decide on; up to two tokens before it are looked at.

        Returns:
          int ``[m]``, ascending. Cut into characters, "a. b" has a start at 3: a sentence ends at 1, white space
          follows at 2. Cut as "a", ".", " b" it has one at 2.
        """
        lead = min(first, 2)
        roles = self._roles[token_ids[first - lead :]]
        if lead < 2:
            roles = np.concatenate([np.repeat(roles[:1], 2 - lead, 0), roles])
        found = np.flatnonzero(roles[2:, 0] & roles[1:-1, 1] & roles[:-2, 2]) + first
        return found if first else found[found > 0]  # position 0 starts the first step by definition
