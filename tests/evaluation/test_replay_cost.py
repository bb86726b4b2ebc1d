"""The cost of sharing on replayed text: no figure without its work behind it."""

from __future__ import annotations

import numpy as np
import pytest

from trtllm_memshare.evaluation.random_model import SHAPES, make_model, zero_null_page
from trtllm_memshare.evaluation.replay_cost import ReplaySetup, make_setup, replay, replay_rounds, summarize
from trtllm_memshare.report.replay_cost import replay_cost_table
from trtllm_memshare.runners.torch.runner import TorchRunner
from trtllm_memshare.search.config import make_config

FIGURES = {"search_time_fraction": 0.0, "shared_block_fraction": 0.0, "mean_used_blocks": 1.0, "peak_used_blocks": 1,
           "step_ms_last_tenth": 1.0}  # fmt: skip


def entry(step_ms: float, pairs: int) -> dict:
    return {"step_ms_mean": step_ms, "pairs_compared": pairs, **FIGURES}


def test_a_cost_is_the_median_of_rounds_and_absent_where_nothing_was_compared():
    rounds = [
        {"off": entry(off, 0), "shadow": entry(off * 1.5, 0), "full-searches": entry(full, 640)}
        for off, full in ((10, 11), (20, 20.2), (10, 10.5))
    ]
    rows = summarize(rounds)
    assert rows["shadow"]["over_off"] is None
    assert rows["shadow"]["no_over_off"] == "no pair was compared"
    assert rows["full-searches"]["over_off"] == pytest.approx(0.05)
    assert rows["full-searches"]["over_off_range"] == pytest.approx([0.01, 0.1])
    assert rows["full-searches"]["step_ms_mean"] == 11
    assert rows["off"]["over_off"] is None
    assert summarize(rounds[:2])["off"]["step_ms_mean"] == 15  # not the slower one of two
    assert [line.split()[2] for line in replay_cost_table(rows).splitlines()[1:]] == ["-", "-", "+5.0%"]


def test_full_searches_compare_max_pairs_whatever_the_text_holds(boundaries):
    runner = TorchRunner(make_model(SHAPES["small"], 96, "cpu"), 16, 8)
    rng = np.random.default_rng(0)
    scripts = [rng.permutation(60)[:40].astype(np.int32) for _ in range(2)]
    shadow = replay(runner, "shadow", boundaries, scripts, 8)
    full = replay(runner, "full-searches", boundaries, scripts, 8)
    assert shadow["pairs_compared"] == 0
    config = make_config("aligned")
    # One step for the prompts, 31 more; the first search, at step 0, finds no full block.
    assert full["pairs_compared"] == config.max_pairs * (32 // config.search_interval)
    assert full["candidates"] == full["shared_block_fraction"] == 0


@pytest.mark.parametrize("variant", ["half-dropped", "half-null"])
def test_every_second_generated_page_is_forgotten(boundaries, variant):
    """48 tokens, of which 32 are generated: four full pages of eight, of which two go."""
    model = make_model(SHAPES["small"], 96, "cpu")
    runner = TorchRunner(model, 17, 8, null_page_set=zero_null_page(model.config, 96))
    rng = np.random.default_rng(0)
    scripts = [rng.permutation(60)[:48].astype(np.int32) for _ in range(2)]
    found = {name: replay(runner, name, boundaries, scripts, 8) for name in ("off", variant)}
    assert found["off"]["peak_used_blocks"] == 12
    assert found[variant]["peak_used_blocks"] == 8
    assert found[variant]["pairs_compared"] == 0
    assert summarize([found])[variant]["over_off"] is not None


def test_no_round_starts_that_would_not_end_in_time(boundaries):
    runner = TorchRunner(make_model(SHAPES["small"], 96, "cpu"), 16, 8)
    scripts = [np.arange(30, dtype=np.int32)]
    setup = ReplaySetup(runner, boundaries, scripts, num_prompt_tokens=8)
    rounds = list(replay_rounds(setup, ["off", "shadow"], num_rounds=3, budget_s=0))
    assert len(rounds) == 1  # the first always runs
    assert list(rounds[0]) == ["off", "shadow"]


def test_the_pool_holds_every_request_and_its_null_page():
    """Three requests of 8 + 26 tokens, the last never read, fill five pages each; one page more is read by nobody."""
    texts = ["First we add 3 and 4. That gives 7.\n\nWait, let me check: 3 and 4 make 7.\n\n" * 8]
    setup = make_setup(texts, SHAPES["small"], 3, 8, 26, tokens_per_block=8, device="cpu", decode="pytorch")
    assert [len(script) for script in setup.scripts] == [34] * 3
    found = replay(setup.runner, "off", setup.boundaries, setup.scripts, setup.num_prompt_tokens)
    assert found["num_steps"] == 26 - 1  # the prompts' step gives the first
    assert found["peak_used_blocks"] == setup.runner.num_blocks - 1 == 15
