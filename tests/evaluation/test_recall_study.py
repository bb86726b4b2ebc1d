"""What is asked of which memory: one draw a question where that is asked for, one choice a text elsewhere."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.page_arms import ANEW, Budget
from trtllm_memshare.evaluation.page_table import recall
from trtllm_memshare.evaluation.real_rows import RowFile
from trtllm_memshare.evaluation.recall_study import compute_recall
from trtllm_memshare.evaluation.retirement import NEVER
from trtllm_memshare.search.steps import BoundaryTokens

TRACES = Path(__file__).parents[2] / "benchmarks" / "data" / "traces"


class Pairs:
    """A tokenizer for a vocabulary of 60: a token for two letters."""

    def __call__(self, text, **_):
        return {"input_ids": [4 + sum(map(ord, text[i : i + 2])) % 56 for i in range(0, len(text), 2)]}


class Asked(MaskedReplay):
    """Remembers what was asked of what; answers everything with token 0."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.calls = []

    def answers(self, full, retirements, branches, stored=None):
        self.calls.append((tuple(retirements.retired_at), len(branches)))
        return [torch.zeros(len(branch), 64) for branch in branches]


@pytest.fixture
def replay(tiny_checkpoint) -> Asked:
    return Asked(tiny_checkpoint)


def test_each_question_has_a_draw_of_its_own(replay, tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    compute_recall(replay, Pairs(), ["full", "random", ANEW], Budget(), 2, rows, traces=TRACES)
    full, random, *anew = replay.calls[:9]
    assert [full[1], random[1], *(count for _, count in anew)] == [7, 7, *[1] * 7]
    gone = [np.array(retired_at) < NEVER for retired_at, _ in (random, *anew)]
    assert len({tuple(pages) for pages in gone}) == 8
    assert {pages.sum() for pages in gone} == {gone[0].sum()}  # the budget is one
    assert not {at for at, _ in anew} & {at for at, _ in replay.calls[11:]}  # and the next text draws its own
    kept = {row["arm"]: [q["pages_kept"] for q in row["questions"]] for row in islice(rows.rows, 3)}
    assert kept["full"] == [1.0] * 7
    assert kept["random"] != kept[ANEW]
    calls = len(replay.calls)
    compute_recall(replay, Pairs(), ["full", "random", ANEW], Budget(), 2, rows, traces=TRACES)
    assert len(replay.calls) == calls
    assert [found.asked for found in recall(rows.rows)] == []  # nothing that the full cache answers


def test_a_preset_is_asked_after_its_own_decisions(replay, tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="arm aligned cuts text into steps, got no boundaries"):
        compute_recall(replay, Pairs(), ["aligned"], Budget(), 1, rows, traces=TRACES)
    plain = BoundaryTokens.from_texts([f"t{i}" for i in range(replay.model.config.vocab_size)])
    compute_recall(replay, Pairs(), ["aligned"], Budget(), 1, rows, traces=TRACES, boundaries=plain)
    assert [(row["arm"], len(row["questions"])) for row in rows.rows] == [("aligned", 7)]
    assert [count for _, count in replay.calls] == [7]


def test_a_longer_text_has_its_facts_further_back(replay, tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    for num_tokens in (512, 1024):
        compute_recall(replay, Pairs(), ["full"], Budget(), 1, rows, traces=TRACES, num_tokens=num_tokens)
    short, long = rows.rows
    assert (short["tokens"], long["tokens"]) == (512, 1024)
    assert {row["text"] for row in rows.rows} == {short["text"]}  # rows of one length are not taken for another's
    furthest = [max(question["distance"] for question in row["questions"]) for row in rows.rows]
    assert furthest[0] < 512 < furthest[1] < 1024


def test_longer_pages_go_whole(replay, tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    for size in (16, 128):
        compute_recall(replay, Pairs(), ["full", "random"], Budget(), 1, rows, traces=TRACES, page_tokens=size)
    assert [(row["arm"], row["tokens_per_block"]) for row in rows.rows] == [
        (arm, size) for size in (16, 128) for arm in ("full", "random")
    ]
    short, long = (np.array(replay.calls[i][0]) < NEVER for i in (1, 3))
    assert (len(short), len(long)) == (80, 10)
    assert 0 < long.sum() < len(long) / 2
