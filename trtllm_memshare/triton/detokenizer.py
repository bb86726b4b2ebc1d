"""Text from a growing list of token ids, and stop words in it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class IncrementalDetokenizer:
    """Turns tokens into text piece by piece; the pieces joined are the text decoded at once.

    A window of recent tokens is decoded, not the whole: the cost per token does not grow. Text that ends in an
    unfinished character is held back until the character is whole.

    Args:
      tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window, self._read = 0, 0  # tokens from _window on are decoded; text up to _read was given out

    def push(self, token_ids: list[int], last: bool = False) -> str:
        """Text that the new tokens add. ``last``: give out even an unfinished character."""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not last):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopWords:
    """Cuts a stream of text at the first stop word, which is left out.

    Args:
      words: not empty strings.
    """

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._held = ""
        self.found = False

    def push(self, text: str, last: bool = False) -> str:
        """Text that may be given out: all but an ending that could become a stop word, unless ``last``."""
        if self.found:
            return ""
        self._held += text
        places = [p for p in (self._held.find(w) for w in self._words) if p >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = 0 if last else max((overlap(self._held, w) for w in self._words), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given


def overlap(text: str, word: str) -> int:
    """Length of the longest proper beginning of ``word`` that ``text`` ends with."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
