"""The bytes that single tokens stand for: a character may be spread over several, none of which is text by itself."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's
_TOKENIZERS = 8  # that are remembered; a server has one


class TokenBytes:
    """Bytes of a tokenizer's tokens.

    Args:
      tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # What turns tokens into text, as the library itself writes it down.
        decoder = b"" if backend is None or backend.decoder is None else backend.decoder.__getstate__()
        self._is_byte_level = b'"ByteLevel"' in decoder
        self._is_sentencepiece = b'"Metaspace"' in decoder or b'"ByteFallback"' in decoder
        self._added = set(tokenizer.get_added_vocab())
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def of(self, token: int) -> bytes | None:
        """The token's bytes; None where the tokenizer's way to text is another than the two that are known."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return None
        if name in self._added:
            return bytes((name.replace(_SPACE, " ") if self._is_sentencepiece else name).encode())
        if self._is_byte_level and all(character in self._byte_of for character in name):
            return bytes(self._byte_of[character] for character in name)
        if self._is_sentencepiece:
            found = _FALLBACK.fullmatch(name)
            return bytes([int(found[1], 16)]) if found else bytes(name.replace(_SPACE, " ").encode())
        return None


@lru_cache(_TOKENIZERS)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """``TokenBytes`` of a tokenizer, made once."""
    return TokenBytes(tokenizer)
