"""Surprisal is what the sampler chose from, whatever the sampler does to its logits and the batch to its rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.redundancy import PageReports
from trtllm_memshare.vllm.surprisal import SampledSurprisal
from trtllm_memshare.vllm.update import MemShareUpdate

SIZE, BLOCKS, VOCABULARY = 4, 12, 10


class Runner:
    """The parts of vLLM 0.32's model runner V1 that are read, one step at a time; 27 November 2026."""

    device = torch.device("cpu")

    def __init__(self):
        self.sampler = SimpleNamespace(forward=self._sample)
        self.query_start_loc = self._buffer(9)
        self.slots = self._buffer(16)
        discarded = torch.zeros(8, dtype=torch.bool)
        self.discard_request_mask = SimpleNamespace(gpu=discarded, np=discarded.numpy())
        self.input_batch = SimpleNamespace(block_table=[SimpleNamespace(slot_mapping=self.slots)])

    @staticmethod
    def _buffer(length):
        values = torch.full((length,), 7, dtype=torch.int32)  # left by steps before
        return SimpleNamespace(gpu=values, np=values.numpy())

    def _sample(self, logits, sampling_metadata):
        logits.div_(0.01)  # in place, as temperature is applied
        return SimpleNamespace(sampled_token_ids=logits.argmin(-1, keepdim=True).int())

    def step(self, chunks, logits):
        """``chunks``: slots of each row's tokens; the last ones' queries choose."""
        lengths = [len(chunk) for chunk in chunks]
        self.query_start_loc.np[: len(chunks) + 1] = np.cumsum([0, *lengths])
        self.slots.np[: sum(lengths)] = [slot for chunk in chunks for slot in chunk]
        self.sampler.forward(logits, None)


def test_a_page_has_the_surprisal_of_its_own_tokens_and_no_others():
    """Prompt of 3 tokens in block 5, then 6 tokens: one row among others, in changing places."""
    runner = Runner()
    surprisal = SampledSurprisal(runner, BLOCKS * SIZE, SIZE, "0.32")
    table = [5, 2, 9]
    slots = [table[p // SIZE] * SIZE + p % SIZE for p in range(9)]
    draw = torch.Generator().manual_seed(0)
    nats = []
    for step, chunk in enumerate([slots[:3], *([s] for s in slots[3:])]):
        logits = torch.randn(2, VOCABULARY, generator=draw)
        row = step % 2
        nats.append(-float(logits.log_softmax(-1)[row].min()))
        other = [[40 + step % 4]]
        runner.step([chunk, *other] if row == 0 else [*other, chunk], logits)
    # Token 3 was chosen by the first step; page 1 holds tokens 4 to 7.
    assert surprisal.of_pages(table, [1])[0] == pytest.approx(sum(nats[1:5]), rel=1e-5)
    # Its neighbour is retired, so the choice of its first token is not known any more.
    assert surprisal.of_pages([0, 2, 9], [1])[0] == pytest.approx(sum(nats[2:5]) * 4 / 3, rel=1e-5)
    # The blocks go to a request that reads its text: what was there is gone.
    runner.step([slots[4:8]], torch.randn(1, VOCABULARY, generator=draw))
    assert np.isnan(surprisal.of_pages(table, [1])[0])


def test_what_vllm_discards_and_what_had_no_probability_is_not_known():
    runner = Runner()
    surprisal = SampledSurprisal(runner, BLOCKS * SIZE, SIZE, "0.32")
    for slot in range(7):
        logits = torch.zeros(1, VOCABULARY)
        if slot == 5:
            logits[0, 3] = -torch.inf  # and the sampler takes the least likely one
        runner.discard_request_mask.np[0] = slot == 4
        runner.step([[slot]], logits)
    # Of the page's four tokens two are known, each one in ten.
    assert surprisal.of_pages([0, 1], [1])[0] == pytest.approx(4 * np.log(VOCABULARY), rel=1e-5)


def test_reports_have_surprisal_of_what_was_asked_about():
    source = SimpleNamespace(of_pages=lambda table, pages: np.array([table[p] for p in pages], np.float32))
    reports = PageReports(None, source, SIZE)
    update = MemShareUpdate(asked={"a": [1, 3], "gone": [2]}, null_entries={"a": {1: 0}})
    answer = reports.answer(update, {"a": [10, 11, 12, 13]}, set())
    assert list(answer) == ["a"]
    np.testing.assert_array_equal(answer["a"].surprisal, np.array([np.nan, 11, np.nan, 13], np.float32))
    assert answer["a"].redundancy is None


def test_a_runner_without_a_sampler_is_refused_by_name():
    runner = Runner()
    del runner.sampler
    with pytest.raises(UserError, match=r"0\.33's Runner has no sampler.*choose need redundancy"):
        SampledSurprisal(runner, 8, SIZE, "0.33")
