"""Text out of tokens: pieces join to the whole, in bounded time, whatever the bytes are; stop words are held back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.triton.detokenizer import IncrementalDetokenizer, StopWords, special_stop_tokens


class Bytes:
    """A tokenizer of 256 bytes and one special token; counts the tokens that it decodes."""

    SPECIAL = 256
    all_special_tokens, all_special_ids = ("<|im_end|>",), (SPECIAL,)

    def __init__(self) -> None:
        self.num_decoded = 0

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        self.num_decoded += len(ids)
        return bytes(i for i in ids if i < self.SPECIAL).decode("utf-8", "replace")

    def get_added_vocab(self):
        return {"<|im_end|>": self.SPECIAL, "<tool>": 7}


def pieces(tokenizer: Bytes, batches: list[list[int]]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.push(batch, last=i == len(batches) - 1) for i, batch in enumerate(batches)]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(1, 12), max_size=60))
def test_pieces_of_a_text_join_to_it(text, sizes):
    ids, batches = list(text.encode()), []
    for size in sizes:
        batches.append(ids[:size])
        ids = ids[size:]
    batches.append(ids)
    assert "".join(pieces(Bytes(), batches)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=80))
def test_any_bytes_join_to_what_decodes_at_once(ids):
    given_out = "".join(pieces(Bytes(), [[i] for i in ids] or [[]]))
    whole = Bytes().decode(ids)
    assert given_out.replace("\ufffd", "") == whole.replace("\ufffd", "")


@pytest.mark.parametrize("token", [0xFF, 0x80, 0xE2, 256])
def test_a_run_of_one_token_takes_linear_time_and_is_given_out_on_the_way(token):
    tokenizer = Bytes()
    got = pieces(tokenizer, [[token]] * 4000)
    assert tokenizer.num_decoded < 4000 * 200
    if token != Bytes.SPECIAL:
        assert sum(map(len, got[:100])) >= 90
        assert sum(map(len, got)) >= 3990


def test_a_long_batch_is_taken_as_well():
    text = "naïve 北京 🙂 " * 500
    assert "".join(pieces(Bytes(), [list(text.encode()), []])) == text


def test_stop_words_that_are_special_tokens_become_ids():
    assert special_stop_tokens(Bytes(), ["END", "<|im_end|>", "<tool>"]) == (256, 7)
    assert special_stop_tokens(Bytes(), []) == ()


def test_pieces_of_text_join_to_the_whole_and_no_character_is_cut():
    tokenizer = build_tokenizer(4096)
    ids = tokenizer("Q: 51 + 142 = ?\n")["input_ids"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([token], last=index == len(ids) - 1) for index, token in enumerate(ids)]
    assert "".join(pieces) == "Q: 51 + 142 = ?\n"

    detokenizer = IncrementalDetokenizer(Bytes())
    assert [detokenizer.push([b]) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert detokenizer.push(["é".encode()[0]], last=True) == "\ufffd"


def test_stop_words_are_held_back_until_they_are_sure():
    words = StopWords(["END", "NDX"])
    assert [words.push(t) for t in ("aE", "N", "x", "EN", "D", "more")] == ["a", "", "ENx", "", "", ""]
    assert words.found
    assert StopWords(["END"]).push("aEN", last=True) == "aEN"
    assert StopWords([]).push("text") == "text"
    overlapping = StopWords(["aab"])
    assert overlapping.push("aaab") == "a"
    assert overlapping.found
