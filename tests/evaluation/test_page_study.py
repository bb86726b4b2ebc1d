"""Rows of the study of pages: a preset's row is of its own decisions, nothing is computed twice."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.evaluation.masked_replay import MaskedReplay
from trtllm_memshare.evaluation.page_arms import Budget
from trtllm_memshare.evaluation.page_study import PAGE_TOKENS, Task, compute_rows
from trtllm_memshare.evaluation.page_table import Setting
from trtllm_memshare.evaluation.real_rows import RowFile
from trtllm_memshare.evaluation.real_texts import TokenText, Trace
from trtllm_memshare.evaluation.retirement import hold_at_floor, lowest_need
from trtllm_memshare.report.real_model import main_table
from trtllm_memshare.search.steps import BoundaryTokens

PROMPT, LOOP = 16, 528


@pytest.fixture(scope="module")
def replay(tiny_checkpoint) -> MaskedReplay:
    return MaskedReplay(tiny_checkpoint)


@pytest.fixture(scope="module")
def plain(replay) -> BoundaryTokens:
    return BoundaryTokens.from_texts([f"t{i}" for i in range(replay.model.config.vocab_size)])


def make_text(name: str, problem: str) -> TokenText:
    """A passage of 24 tokens, again and again: it repeats word for word, and so do its pages."""
    passage = np.random.default_rng(len(name)).integers(4, 60, 24).tolist()
    return TokenText(Trace(name, problem, "m", "", ""), [*range(4, 4 + PROMPT), *(passage * (LOOP // 24))], PROMPT)


def test_a_preset_shares_what_it_finds_and_is_held_against_random_pages(replay, plain, tmp_path, monkeypatch):
    rows = RowFile(tmp_path / "rows.jsonl")
    tasks = [Task("random"), Task("aligned", Budget(0.25))]
    texts = [(make_text("a", "p"), tasks), (make_text("bc", "q"), tasks)]
    compute_rows(replay, texts, rows, boundaries=plain)
    found = {(row["text"], row["arm"]): row for row in rows.rows}
    assert len(found) == 2 * 3
    for text in ("a", "bc"):
        assert found[text, "random"]["min_kept"] == 0.5
        aligned = found[text, "aligned"]
        assert aligned["min_kept"] == 1.0
        assert 5 <= aligned["retired_pages"] <= LOOP // PAGE_TOKENS
        assert aligned["memory_share"] < 1
    table = main_table(rows.rows, Setting(tokens=PROMPT + LOOP))
    assert "`aligned` preset | 2 | " in table
    assert "random pages | 2 | " in table
    monkeypatch.setattr(replay, "read", None)
    compute_rows(replay, texts, rows, boundaries=plain)


def test_a_preset_needs_the_tokenizers_boundaries(replay, tmp_path):
    with pytest.raises(ValueError, match="arm aligned cuts text into steps, got no boundaries"):
        compute_rows(replay, [(make_text("a", "p"), [Task("aligned")])], RowFile(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("size", [16, 80])
def test_the_share_of_tokens_held_counts_those_of_the_page_that_is_being_written(size):
    prompt, tokens = 37, 900
    held = hold_at_floor(prompt, tokens, size, 0.5, 128, lowest_need(lambda moment: moment.may_go))
    written = there = 0
    for now in range(prompt + 1, tokens + 1):
        written += now - prompt
        there += now - prompt - size * int((held.retired_at <= now).sum())
    assert held.tokens_share(prompt, tokens) == pytest.approx(there / written)
    assert held.tokens_share(prompt, tokens) > held.memory_share(-(-prompt // size))
