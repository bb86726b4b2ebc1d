"""Texts with facts in them: where statements are, in which order, and what is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_memshare.evaluation.masked_replay import nothing_retired
from trtllm_memshare.evaluation.recall_study import judge
from trtllm_memshare.evaluation.retirement import NO_DONOR, Retirements
from trtllm_memshare.evaluation.stated_facts import KINDS, AskedText, make_asked_text


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture(scope="module")
def asked() -> AskedText:
    return make_asked_text([1] * 50, [2] * 4000, Letters(), 3200, seed=4)


def text_of(ids) -> str:
    return "".join(map(chr, ids))


def test_every_kind_is_stated_and_asked_once(asked):
    text = text_of(asked.ids)
    assert len(asked.ids) == 3200
    assert asked.ids[:50] == [1] * 50
    assert [q.kind for q in asked.questions] == [
        "code", "name", "place", "definition", "changed", "surname", "latest"
    ]  # fmt: skip
    assert len(KINDS) == 7
    for question, (first, last), ask, length in zip(
        asked.questions, asked.places, asked.asks, asked.answer_lengths, strict=True
    ):
        assert [text.count(s) for s in question.statements] == [1] * len(question.statements)
        assert text[first : last + 1].strip() == question.statements[-1]
        assert question.answer in question.statements[-1]
        assert text_of(ask).endswith(f"{question.ask} {question.answer}")
        assert text_of(ask[-length:]) == f" {question.answer}"
        places = [text.index(s) for s in question.statements]
        assert places == sorted(places)  # what is asked for came last
    assert min(first for first, _ in asked.places) >= 50 + 160


def test_the_end_of_the_text_holds_no_statement(asked):
    assert asked.ids[-100:] == [2] * 100


def test_seeds_give_other_facts_and_the_same_seed_the_same():
    one, two, again = (make_asked_text([1], [2] * 2000, Letters(), 1600, seed) for seed in (1, 2, 1))
    assert one == again
    assert one.asks != two.asks


def test_judging(asked):
    logits = []
    for index, ask in enumerate(asked.asks):
        rows = torch.zeros(len(ask), 200)
        rows[torch.arange(len(ask) - 1), torch.tensor(ask[1:])] = 1.0  # each token foretells the next
        if index == 2:
            rows[-2] = rows[-2].roll(1)  # the last token of the answer is missed
        logits.append(rows)
    judged = judge(asked, logits, [nothing_retired(3200, 16)] * 7)
    assert [q["right"] for q in judged] == [i != 2 for i in range(7)]
    assert all(q["pages_kept"] == 1.0 for q in judged)
    assert [q["distance"] for q in judged] == [3200 - last for _, last in asked.places]
    gone = np.full(200, 10**6, np.int64)
    each = [nothing_retired(3200, 16)] * 3 + [Retirements(16, gone, np.full(200, NO_DONOR))] * 4
    assert [q["pages_kept"] for q in judge(asked, logits, each)] == [1.0] * 3 + [0.0] * 4
