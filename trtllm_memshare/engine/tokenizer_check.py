"""Loads a checkpoint's tokenizer once, at build, and sends texts there and back.

A tokenizer that loads may still be another one: transformers 5 rebuilds some classes from their parts and ignores what
tokenizer.json says of the rest (5.13.0 turned byte-level ones of class ``LlamaTokenizerFast`` into Llama 2's).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm_memshare.engine.skeleton import describe
from trtllm_memshare.errors import UserError, quote

_SAMPLES = (
    "The answer is 42, so x = 6 * 7.\n\nWait, let me check:  2 + 2 = 4.",
    "a1b2 (c3) [d4] {e5}\n\tif x >= 10: y = 0.5",
    "naïve café, 北京 东京, здравствуйте, 🙂",
)
_AGAIN = "copy all tokenizer files of the model beside its weights"


def check_tokenizer(model_dir: Path, vocab_size: int) -> list[str]:
    """Loads the tokenizer and holds it against its own file and against the texts it is given.

    Returns:
      What a user should know of it, in sentences.

    Raises:
      UserError: it does not load, gives other ids than tokenizer.json, or loses text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
        num_ids, unknown = len(tokenizer), tokenizer.unk_token_id
        encoded = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _SAMPLES]
        decoded = [str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in encoded]
    except Exception as error:  # whatever a foreign library makes of a foreign file
        raise UserError(f"{model_dir} has a tokenizer that does not load: {describe(error)} ({_AGAIN})") from error
    _check_against_file(model_dir, encoded)
    came_back = 0
    for text, ids, back in zip(_SAMPLES, encoded, decoded, strict=True):
        is_whole = _plain(back) == _plain(text)
        # A small vocabulary (the bundled model has 80 characters) drops or marks what it does not know.
        knows_all = unknown not in ids and len(_characters(back)) >= len(_characters(text))
        if not is_whole and (knows_all or not ids):
            raise UserError(
                f"{model_dir} has a tokenizer that loses text: {quote(text)} came back as {quote(back)} ({_AGAIN})"
            )
        came_back += bool(ids)
    if not came_back:
        raise UserError(f"{model_dir} has a tokenizer that knows no text: {quote(_SAMPLES[0])} gave no ids ({_AGAIN})")
    if num_ids > vocab_size:
        return [
            f"tokenizer: {num_ids:,} tokens, the model knows {vocab_size:,}; a request with one of the others is "
            f"refused"
        ]
    return []


def _check_against_file(model_dir: Path, encoded: list[list[int]]) -> None:
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(str(path))
        expected = [own.encode(text, add_special_tokens=False).ids for text in _SAMPLES]
    except Exception as error:  # its errors have no type of their own
        raise UserError(f"{path} is damaged: {describe(error)} ({_AGAIN})") from error
    for text, ids, wanted in zip(_SAMPLES, encoded, expected, strict=True):
        if ids != wanted:
            import transformers

            raise UserError(
                f"transformers {transformers.__version__} gives other ids than {path}: {quote(ids)}, expected "
                f"{quote(wanted)} for {quote(text)} (install another version, or give the folder the tokenizer "
                f"files of its own model)"
            )


def _plain(text: str) -> str:
    return text.strip()  # SentencePiece adds a space in front


def _characters(text: str) -> str:
    return "".join(text.split())
