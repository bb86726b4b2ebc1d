"""Free-running generation: requests stand at their floors as in the masked replay, rows are paired with the full
cache's and computed once, and what is counted is right."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation import free_generation
from trtllm_memshare.evaluation.free_generation import (
    ARMS,
    DECODINGS,
    PAGE_TOKENS,
    HeldExecutor,
    Length,
    arm_config,
    compute_generations,
    distinct_share,
    first_difference,
    repeated_share,
)
from trtllm_memshare.evaluation.real_rows import RowFile, read_rows
from trtllm_memshare.evaluation.real_texts import TokenText, Trace
from trtllm_memshare.evaluation.replay import ReplaySampler
from trtllm_memshare.evaluation.retirement import NEVER, hold_at_floor, lowest_need
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.request import SamplingParams

LENGTH = Length(32, 208)
PROTECTED = 128  # tokens, of the preset


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def plain(model) -> BoundaryTokens:
    return BoundaryTokens.from_texts([f"t{i}" for i in range(model.config.vocab_size)])


def make_texts(count: int) -> list[TokenText]:
    rng = np.random.default_rng(1)
    traces = [Trace(f"text-{i}", f"problem-{i}", "m", "", "") for i in range(count)]
    return [TokenText(trace, rng.integers(4, 60, LENGTH.prompt).tolist(), 8) for trace in traces]


def test_a_held_request_gives_up_its_pages_when_the_masked_replay_does(model, plain):
    """By age, so that the choice does not hang on what the model computes; no run of the text repeats."""
    total = 400
    ids = np.random.default_rng(2).integers(4, 60, total).tolist()
    sampler = ReplaySampler()
    runner = TorchRunner(model, total // PAGE_TOKENS + 2, PAGE_TOKENS)
    executor = HeldExecutor(runner, ARMS["streaming"], plain, total, 1, total, sampler=sampler)
    request = executor.submit(ids[:20], SamplingParams(total - 20)).request_id
    sampler.add_script(request, ids[20:])
    retired_at, computed = np.full(total // PAGE_TOKENS, NEVER), 0

    def watch(retirement):
        retired_at[retirement.pages] = computed

    executor.pressure.watch = watch
    while executor.has_work:
        executor.step()
        computed = 20 if computed == 0 else computed + 1
    held = hold_at_floor(20, total, PAGE_TOKENS, 0.5, PROTECTED, lowest_need(lambda moment: moment.may_go))
    assert (held.retired_at < NEVER).sum() >= 8
    # The last page is full when the request ends, and nothing is asked of it any more.
    assert np.array_equal(np.where(held.retired_at < total, held.retired_at, NEVER), retired_at)


def test_rows_are_held_against_the_full_cache_and_computed_once(model, plain, tmp_path, monkeypatch):
    rows = RowFile(tmp_path / "rows.jsonl")
    arms = ["redundancy-recency-signature", "paper-alias"]
    compute_generations(model, plain, (), make_texts(1), arms, LENGTH, rows)
    compute_generations(model, plain, (), make_texts(2), arms, LENGTH, rows)
    found = {(r["arm"], r["text"], r["decoding"]): r for r in read_rows(tmp_path / "rows.jsonl")}
    assert len(found) == len(rows.rows) == 3 * 2 * len(DECODINGS)
    for (arm, _, _), row in found.items():
        assert row["length"] == LENGTH.output
        if arm == "full":
            assert (row["kept"], row["differs_at"], len(row["token_ids"])) == (1.0, None, LENGTH.output)
        else:
            assert 0.5 <= row["kept"] <= 0.75  # 13 pages, of which the newest 8 may not go
            # Nothing can go before a page is older than the protected tokens.
            assert row["differs_at"] is None or row["differs_at"] > PROTECTED
            assert "token_ids" not in row
    assert any(row["differs_at"] is not None for row in found.values())
    monkeypatch.setattr(free_generation, "generate", None)
    compute_generations(model, plain, (), make_texts(2), arms, LENGTH, rows)
    compute_generations(model, plain, (), make_texts(9), arms, LENGTH, rows, may_go_on=lambda: False)


def test_another_floor_is_another_row_and_keeps_another_share(model, plain, tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    for min_kept in (0.5, 0.75):
        compute_generations(model, plain, (), make_texts(1), ["streaming"], LENGTH, rows, min_kept=min_kept)
    full, half, more = ([r for r in rows.rows if r["min_kept"] == kept] for kept in (1.0, 0.5, 0.75))
    assert len(full) == len(half) == len(more) == len(DECODINGS)
    # Twelve pages are written while it may be asked, the newest eight are protected: of four old ones all go, or three.
    assert {r["kept"] for r in half} == {round(8 / 12, 4)}
    assert {r["kept"] for r in more} == {round(9 / 12, 4)}


def test_a_floor_that_is_no_share_is_refused():
    with pytest.raises(UserError, match="min_kept"):
        arm_config("streaming", 1.5)
    assert arm_config("full", 0.25) == ARMS["full"]


def test_a_stop_token_ends_a_request(model, plain, tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    everything = tuple(range(model.config.vocab_size))
    compute_generations(model, plain, everything, make_texts(1), [], LENGTH, rows)
    assert [(r["length"], r["ended"]) for r in rows.rows] == [(1, True)] * len(DECODINGS)


def test_shares_of_runs():
    assert repeated_share([2, 3], [1, 2, 1, 2, 3], 2) == 0.5
    assert repeated_share([], [5] * 20, 8) == pytest.approx(12 / 13)
    assert repeated_share([1], [1, 2], 8) == 0.0
    assert distinct_share([1, 2, 1, 2, 3], 2) == 0.75
    assert distinct_share([1], 2) == 1.0


@pytest.mark.parametrize(
    ("ids", "others", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([], [], None)]
)
def test_first_difference(ids, others, place):
    assert first_difference(ids, others) == place
