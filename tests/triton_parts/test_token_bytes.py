"""The bytes of tokens, joined, are those of the text, wherever characters are cut."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trtllm_memshare.triton.events import TextEvent
from trtllm_memshare.triton.openai_replies import Replies
from trtllm_memshare.triton.token_bytes import token_bytes

TEXT = "é€😀 a b"


def byte_level() -> PreTrainedTokenizerFast:
    """One token for each byte, as a byte-level BPE without merges has them."""
    backend = Tokenizer(models.BPE({c: byte for byte, c in bytes_to_unicode().items()}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<|é|>"])


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: words with a mark for their space, and bytes for what is in no word."""
    vocabulary = {"\u2581": 0, "a": 1, "b": 2, "<unk>": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_joined_they_are_the_text(make):
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > len(TEXT)  # characters are cut
    assert b"".join(token_bytes(tokenizer).of(token) for token in ids).decode() == TEXT


def test_of_a_token_that_was_added_they_are_its_name():
    tokenizer = byte_level()
    assert token_bytes(tokenizer).of(tokenizer.convert_tokens_to_ids("<|é|>")) == "<|é|>".encode()


def test_of_added_spaces_they_are_spaces():
    """Gemma's runs of spaces are added tokens, under SentencePiece's mark."""
    tokenizer = byte_fallback()
    tokenizer.add_tokens(["\u2581\u2581"])
    token = tokenizer.convert_tokens_to_ids("\u2581\u2581")
    assert token_bytes(tokenizer).of(token) == b"  " == tokenizer.decode([token]).encode()


def test_of_another_way_to_text_there_are_none():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert token_bytes(words).of(0) is None


def test_log_probabilities_of_a_chat_carry_them():
    tokenizer = byte_level()
    ids = tokenizer("é ")["input_ids"]
    figures = {"num_input_tokens": 1, "num_output_tokens": 3, "memshare_retired_pages": 0}
    event = TextEvent(ids, 0, "length", True, [-1.0, -2.0, -3.0], figures, "é ")
    (choice,) = Replies("m", tokenizer, 1, True, True).whole([(0, event)])["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "é ".encode()
    assert [entry["token"] for entry in content] == ["\ufffd", "\ufffd", " "]
