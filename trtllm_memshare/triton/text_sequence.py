"""One answer as it grows: tokens in, pieces of text out."""

from __future__ import annotations

from typing import Any

from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer, StopWords
from trtllm_memshare.triton.events import TextEvent, TokenEvent


class Sequence:
    """One answer as it grows.

    Args:
      tokenizer: a transformers tokenizer.
      stop_words: see ``TextRequest``.
      text: what it begins with.
    """

    def __init__(self, tokenizer: Any, stop_words: list[str], text: str) -> None:
        self._detokenizer, self._stop_words = IncrementalDetokenizer(tokenizer), StopWords(stop_words)
        self.text = text
        self._token_ids, self._log_probs = list[int](), list[float]()

    def take(self, event: TokenEvent) -> bool:
        """Adds new tokens. Returns whether generation should end here, because a stop word has just come."""
        last, found = bool(event.finish_reason), self._stop_words.found
        self.text += self._stop_words.push(self._detokenizer.push(event.token_ids, last), last)
        if not found:
            self._token_ids += event.token_ids
            self._log_probs += event.log_probs
        return self._stop_words.found and not found and not last

    def give(self, event: TokenEvent) -> TextEvent:
        """What has come since the last time, as the text of ``event``."""
        reason = "stop" if event.finish_reason and self._stop_words.found else event.finish_reason
        given = TextEvent(
            self._token_ids, event.sequence_index, reason, event.is_last, self._log_probs, event.figures, self.text
        )
        self.text, self._token_ids, self._log_probs = "", [], []
        return given
