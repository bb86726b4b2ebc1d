"""Text from a growing list of token ids, and stop words in it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
_MAX_HELD = 8  # tokens that wait for the end of a character; one has at most four bytes, and a token at least one
_MAX_SILENT = 64  # tokens without text that the window takes in


class IncrementalDetokenizer:
    """Turns tokens into text piece by piece; the pieces joined are the text decoded at once.

    A window of recent tokens is decoded, not the whole: the cost per token does not grow. Text that ends in an
    unfinished character is held back until the character is whole, or until so many tokens wait that the bytes can be
    no character: those are given out as replacement characters.

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
        text = ""
        while len(self._ids) - self._read > _MAX_HELD:  # many tokens at once, or bytes that are no character
            text += self._give(self._read + self._whole_in(self._ids[self._read : self._read + _MAX_HELD]))
        return text + self._give(len(self._ids), last)

    def _give(self, stop: int, last: bool = True) -> str:
        """Text of the tokens up to ``stop``; nothing, with nothing changed, if it ends in an unfinished character."""
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window : stop])
        if after.endswith(_REPLACEMENT) and not last:
            return ""
        if len(after) <= len(before) and stop - self._window <= _MAX_SILENT:
            self._read = stop  # special tokens: the window keeps a text token, or the next one would lose its space
            return ""
        self._window, self._read = self._read, stop
        # Tokens before the window are not needed again: a request of any length holds a few.
        del self._ids[: self._window]
        self._read, self._window = self._read - self._window, 0
        return after[len(before) :]

    def _whole_in(self, held: list[int]) -> int:
        """How many of ``held`` tokens to give out so that no character is cut: at least all but the last three."""
        for count in range(len(held), len(held) - 4, -1):
            if not self._decode(held[:count]).endswith(_REPLACEMENT):
                return count
        return len(held) - 3

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def special_stop_tokens(tokenizer: Any, words: list[str]) -> tuple[int, ...]:
    """Ids of the stop words that are special tokens, such as ``<|im_end|>``.

    They never appear in the text, which leaves special tokens out, so the executor has to stop at their ids.
    """
    if not words:
        return ()
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    known.update({text: i for text, i in tokenizer.get_added_vocab().items() if text in words and text not in known})
    return tuple(int(known[word]) for word in words if word in known)


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
