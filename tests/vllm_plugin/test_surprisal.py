"""Surprisal is what the sampler chose from, whatever the sampler does to its logits and the batch to its rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_plugin.fake_runners import FakeRunnerV1, FakeRunnerV2

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.model_runner import open_runner
from trtllm_memshare.vllm.redundancy import PageReports
from trtllm_memshare.vllm.surprisal import SampledSurprisal
from trtllm_memshare.vllm.update import MemShareUpdate

SIZE, BLOCKS, VOCABULARY = 4, 12, 10
RUNNERS = [FakeRunnerV1, FakeRunnerV2]


def watched(runner):
    surprisal = SampledSurprisal(BLOCKS * SIZE, SIZE, runner.device)
    opened = open_runner(runner, "0.32")
    opened.check_sampler()
    opened.watch_sampler(surprisal)
    return surprisal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fake", RUNNERS)
def test_a_page_has_the_surprisal_of_its_own_tokens_and_no_others(fake, dtype):
    """Prompt of 3 tokens in block 5, then 6 tokens: one row among others, in changing places."""
    runner = fake()
    surprisal = watched(runner)
    table = np.array([5, 2, 9])
    slots = [table[p // SIZE] * SIZE + p % SIZE for p in range(9)]
    draw = torch.Generator().manual_seed(0)
    nats = []
    for step, chunk in enumerate([slots[:3], *([s] for s in slots[3:])]):
        logits = torch.randn(2, VOCABULARY, generator=draw).to(dtype)
        row, before = step % 2, logits.float().log_softmax(-1)
        other = [[40 + step % 4]]
        chosen = runner.step([chunk, *other] if row == 0 else [*other, chunk], logits)
        nats.append(-float(before[row, chosen[row]]))
    # Token 3 was chosen by the first step; page 1 holds tokens 4 to 7.
    assert surprisal.of_pages(table, [1])[0] == pytest.approx(sum(nats[1:5]), rel=1e-5)
    # Its neighbour is retired, so the choice of its first token is not known any more.
    assert surprisal.of_pages(np.array([0, 2, 9]), [1])[0] == pytest.approx(sum(nats[2:5]) * 4 / 3, rel=1e-5)
    # The blocks go to a request that reads its text: what was there is gone.
    runner.step([slots[4:8]], torch.randn(1, VOCABULARY, generator=draw))
    assert np.isnan(surprisal.of_pages(table, [1])[0])


@pytest.mark.parametrize("fake", RUNNERS)
def test_what_vllm_discards_is_not_known(fake):
    runner = fake()
    surprisal = watched(runner)
    for slot in range(7):
        runner.step([[slot]], torch.zeros(1, VOCABULARY), discarded=slot in (4, 5))
    # Of the page's four tokens two are known, each one in ten.
    assert surprisal.of_pages(np.array([0, 1]), [1])[0] == pytest.approx(4 * np.log(VOCABULARY), rel=1e-5)


def test_what_had_no_probability_is_not_known():
    runner = FakeRunnerV1()  # whose sampler takes the least likely token
    surprisal = watched(runner)
    for slot in range(7):
        logits = torch.zeros(1, VOCABULARY)
        if slot in (4, 5):
            logits[0, 3] = -torch.inf
        runner.step([[slot]], logits)
    assert surprisal.of_pages(np.array([0, 1]), [1])[0] == pytest.approx(4 * np.log(VOCABULARY), rel=1e-5)


def test_reports_have_surprisal_of_what_was_asked_about():
    source = SimpleNamespace(of_pages=lambda table, pages: np.array([table[p] for p in pages], np.float32))
    reports = PageReports(None, source, SIZE)
    update = MemShareUpdate(asked={"a": [1, 3], "gone": [2]}, null_entries={"a": {1: 0}})
    answer = reports.answer(update, {"a": np.array([10, 11, 12, 13])}, set())
    assert list(answer) == ["a"]
    np.testing.assert_array_equal(answer["a"].surprisal, np.array([np.nan, 11, np.nan, 13], np.float32))
    assert answer["a"].redundancy is None


@pytest.mark.parametrize("fake", RUNNERS)
def test_a_runner_without_a_sampler_is_refused_by_name(fake):
    runner = fake()
    del runner.sampler
    with pytest.raises(UserError, match=rf"0\.33's {fake.__name__} has no sampler.*choose need redundancy"):
        open_runner(runner, "0.33").check_sampler()


def test_a_sampler_of_which_each_rank_has_some_requests_is_refused():
    """The rank that reports would know nothing of the others' requests."""
    runner = FakeRunnerV2()
    runner.batch_sharder = object()
    with pytest.raises(UserError, match=r"got vLLM's --enable-batch-sharded-sampling .leave it out, or choose need"):
        open_runner(runner, "0.32").check_sampler()


def test_the_sampler_of_runner_v2_keeps_its_parts():
    runner = FakeRunnerV2()
    watched(runner)
    assert runner.sampler.sampling_states == "the sampler's own"
