"""From texts and conversations to prompt tokens, with special tokens once and not twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtllm_memshare.errors import UserError, quote, shorten

MAX_CHARACTERS_PER_TOKEN = 256
"""A text longer than this times the tokens it may have is refused before it is tokenized, which would take minutes."""
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt's text becomes tokens.

    Attributes:
      chat_template: a text is the user's message of a conversation, put into the model's own template.
      add_special_tokens: whether the tokenizer adds its special tokens to a text. None: unless the text begins with
        the first of them, as one that a chat template made does.
    """

    chat_template: bool = False
    add_special_tokens: bool | None = None


def encode_prompt(tokenizer: Any, prompt: Any, prompt_format: PromptFormat, max_tokens: int | None = None) -> list[int]:
    """Tokens of a text.

    Args:
      tokenizer: a transformers tokenizer.
      max_tokens: most tokens that can be used, None = any number.

    Raises:
      UserError: no text, one that cannot be encoded or is much too long, or a tokenizer without a template.
    """
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"a prompt must be a text that is not empty, got {quote(prompt)}")
    _check_text(prompt, max_tokens)
    if prompt_format.chat_template:
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}], max_tokens)
    adds = prompt_format.add_special_tokens
    if adds is None:
        first = tokenizer.bos_token
        adds = not (first and prompt.startswith(first))
    return list(tokenizer(prompt, add_special_tokens=adds)["input_ids"])


def encode_messages(tokenizer: Any, messages: Any, max_tokens: int | None = None) -> list[int]:
    """Tokens of a conversation in the model's own template, ready for the assistant's answer.

    Args:
      messages: objects with ``role`` (system, user, assistant or tool) and ``content``, a text.

    Raises:
      UserError: another shape, a role the template refuses, or a tokenizer without a template.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages must be a list of at least one message, got {quote(messages)}")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"messages[{place}] must be an object with role and content (a text), got {quote(message)}")
        if message.get("role") not in _ROLES:
            raise UserError(
                f"messages[{place}].role must be one of {', '.join(_ROLES)}, got {quote(message.get('role'))}"
            )
        _check_text(message["content"], max_tokens)
    if not tokenizer.chat_template:
        raise UserError(
            "the model's tokenizer has no chat template (leave out --chat-template and give prompts, or add the "
            "model's chat_template.jinja to the engine's model folder)"
        )
    try:
        # The template writes special tokens itself: what transformers makes of it gets no second ones.
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses the messages: {shorten(str(error))}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_text(text: str, max_tokens: int | None) -> None:
    if max_tokens is not None and len(text) > max_tokens * MAX_CHARACTERS_PER_TOKEN:
        raise UserError(f"a prompt of {len(text):,} characters cannot fit {max_tokens:,} tokens (shorten it)")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(
            "a prompt holds half of a surrogate pair, which no tokenizer encodes (write the character itself)"
        )
