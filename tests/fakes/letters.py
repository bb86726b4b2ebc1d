"""A tokenizer of one token for each of 80 characters, which cannot decode one of them: a detokenizer with a fault."""

from __future__ import annotations

VOCAB_SIZE = 80
POISON = 45
"""The token that has no text."""


END = 44
"""A special token, written ``<|im_end|>``."""


class Letters:
    """Token ``i`` is the character ``chr(48 + i)``, but for a special one."""

    bos_token = chat_template = None
    all_special_tokens, all_special_ids = ("<|im_end|>",), (END,)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [(ord(c) - 48) % VOCAB_SIZE for c in text]}

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(48 + token)

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: object) -> str:
        if POISON in ids:
            raise IndexError(f"token {POISON} has no text")
        return letters(ids)

    def batch_decode(self, sequences: list[list[int]], **_: object) -> list[str]:
        return [self.decode(ids) for ids in sequences]


def letters(ids: list[int]) -> str:
    """The text of tokens that have one."""
    return "".join(chr(48 + i) for i in ids if i != END)
