"""Tokenizers that a build takes, and those it refuses with one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trtllm_memshare.engine.tokenizer_check import check_tokenizer
from trtllm_memshare.errors import UserError


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_byte_level(folder: Path) -> None:
    """A tokenizer of 256 bytes without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)  # transformers 4.57 writes one, of the tokens before
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


class Altered:
    """A tokenizer that a version of transformers reads in its own way."""

    unk_token_id = None

    def __init__(self, folder: Path, ids=lambda ids: ids, text=lambda text: text) -> None:
        self._real, self._ids, self._text = transformers.AutoTokenizer.from_pretrained(folder), ids, text

    def __len__(self):
        return len(self._real)

    def __call__(self, text, **options):
        return {"input_ids": self._ids(self._real(text, **options)["input_ids"])}

    def decode(self, ids, **options):
        return self._text(self._real.decode(ids, **options))


def test_the_bundled_kind_passes(own_checkpoint):
    assert check_tokenizer(own_checkpoint, 80) == []


def test_tokens_that_the_model_does_not_know_are_said(own_checkpoint):
    assert check_tokenizer(own_checkpoint, 74) == [
        "tokenizer: 75 tokens, the model knows 74; a request with one of the others is refused"
    ]


def test_a_byte_level_tokenizer_passes(own_checkpoint):
    write_byte_level(own_checkpoint)
    assert check_tokenizer(own_checkpoint, 257) == []


def test_one_that_does_not_put_texts_together_again(own_checkpoint, monkeypatch):
    write_byte_level(own_checkpoint)
    altered = Altered(own_checkpoint, text=str.upper)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: altered)
    with pytest.raises(UserError, match=r"has a tokenizer that loses text: 'The answer is 42"):
        check_tokenizer(own_checkpoint, 257)


def test_a_class_that_reads_the_file_in_its_own_way(own_checkpoint, monkeypatch):
    """As transformers 5.13.0 did with byte-level files of class LlamaTokenizerFast."""
    altered = Altered(own_checkpoint, ids=lambda ids: ids[:-1])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: altered)
    with pytest.raises(UserError, match=r"gives other ids than .*tokenizer.json: .*, expected .*install another"):
        check_tokenizer(own_checkpoint, 80)


def _only_a_sentencepiece_file(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(b"\x00\x01 no model")


def _vocabulary_without_merges(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))


@pytest.mark.parametrize(
    "damage",
    [
        _only_a_sentencepiece_file,
        _vocabulary_without_merges,
        lambda c: edit(c / "tokenizer.json", model={"type": "Own"}),
        lambda c: edit(c / "tokenizer_config.json", unk_token=""),  # transformers asks itself for it without an end
        lambda c: (c / "tokenizer.json").write_text("{}"),
    ],
)
def test_tokenizers_that_do_not_load(own_checkpoint, damage):
    damage(own_checkpoint)
    with pytest.raises(UserError, match=r"does not load|is damaged|knows no text|loses text|gives other ids") as caught:
        check_tokenizer(own_checkpoint, 80)
    assert len(str(caught.value)) < 700
