"""The harm of one remap: nothing changed is nothing harmed, and the real executor agrees on what one remap does."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.studies.distances.block_pairs import KINDS, pairs_of_kind
from benchmarks.studies.distances.harm import ReadText, Remap
from trtllm_memshare.evaluation.teacher_forced import TeacherForcing
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.policy import SharingPolicy
from trtllm_memshare.search.types import Decision
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams

SIZE, NUM_TOKENS = 16, 700
PROMPT = "Q: 443 - 73 - 44 - 185 + 514 + 280 = ?\n"


@pytest.fixture(scope="module")
def runner(bundled_model) -> TorchRunner:
    return TorchRunner(load_model(bundled_model), 60, SIZE)


@pytest.fixture(scope="module")
def text(bundled_model, runner, boundaries) -> tuple[list[int], list[int]]:
    """A prompt and what the full cache makes of it, as token ids."""
    prompt = AutoTokenizer.from_pretrained(bundled_model)(PROMPT)["input_ids"]
    executor = Executor(runner, make_config("off"), boundaries, 800, 1)
    handle = executor.submit(prompt, SamplingParams(NUM_TOKENS))
    executor.run_until_idle()
    return prompt, handle.result().token_ids


@pytest.fixture(scope="module")
def read(bundled_model, text) -> ReadText:
    model = AutoModelForCausalLM.from_pretrained(bundled_model).double().eval()
    return ReadText(model, text[0] + text[1], SIZE)


@pytest.fixture(scope="module")
def without_any(runner, boundaries, text):
    """Runs that take no pair, one for each kind that is asked for."""
    return functools.cache(lambda kind: run_with_one(runner, boundaries, kind, text, Remap(-1, -1, 0)))


class TakesOne(SharingPolicy):
    """Accepts nothing but one pair of blocks, and notes everything it was offered."""

    def __init__(self, executor: Executor, retired: int, donor: int) -> None:
        super().__init__(executor.config)
        self._executor, self._wanted = executor, (retired, donor)
        self.offered: list[tuple[int, int, int]] = []

    def decide(self, candidates, sums):
        # Decided after the step beside which the search ran: one token more is computed by now.
        ((_, _, computed),) = self._executor.manager.generating_sequences()
        self.offered += [(c.block, c.donor, computed - 1) for c in candidates]
        return [Decision(c, 0.0) for c in candidates if (c.block, c.donor) == self._wanted]


def run_with_one(runner, boundaries, kind, text, remap, reference=None):
    """The executor over the same text, with one remap; its sampler, its policy and where the remap was applied."""
    prompt, output = text
    sampler = TeacherForcing(reference, keep=reference is None)
    executor = Executor(runner, KINDS[kind][0], boundaries, 800, 1, sampler=sampler)
    policy = executor.sharing.policy = TakesOne(executor, remap.retired, remap.donor)
    remaps = []
    executor.manager.watch_remaps(lambda d: remaps.append(executor.manager.generating_sequences()[0][2]))
    sampler.add_script(executor.submit(prompt, SamplingParams(len(output))).request_id, output)
    executor.run_until_idle()
    return sampler, policy, remaps


def test_an_unchanged_cache_does_no_harm(read):
    for reads_from in (48, 131, 300):
        assert read.divergences(None, reads_from, 128).abs().max() < 1e-12
        assert read.divergences(Remap(1, 1, reads_from), reads_from, 128).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["repeat", "similar", "repeat-earliest", "similar-earliest"])
def test_one_pair_does_the_harm_that_it_does_in_the_executor(runner, boundaries, text, read, without_any, kind):
    remaps = [pair.remap for pair in pairs_of_kind(kind, *text, SIZE, boundaries)]
    harms = [read.harm(remap, NUM_TOKENS) for remap in remaps[:: len(remaps) // 20 + 1]]
    # The most harmful of some: most pairs do less than the executor's float32 can show.
    remap = remaps[:: len(remaps) // 20 + 1][harms.index(max(harms))]
    full, *_ = without_any("repeat")  # where nothing is taken, all kinds give the same
    reference = [torch.stack(full.log_probs[0])]
    sampler, _, applied_at = run_with_one(runner, boundaries, kind, text, remap, reference)
    assert applied_at == [remap.reads_from]
    first = remap.reads_from - len(text[0]) + 1  # the distribution after position p is for output p - prompt + 1
    divergences = torch.tensor(sampler.divergences[0])
    assert divergences[:first].abs().max() < 1e-6
    expected = read.divergences(remap, remap.reads_from, NUM_TOKENS)
    assert expected.max() > 1e-5
    torch.testing.assert_close(divergences[first:].double(), expected, rtol=1e-3, atol=2e-6)
    assert read.harm(remap, 64) == pytest.approx(float(divergences[first : first + 64].mean()), rel=1e-2, abs=1e-6)


def test_v_alone_leaves_k_where_it_is(read, monkeypatch):
    retired, donor, start = 6, 20, 400
    remap = Remap(retired, donor, start, tuple(range(donor * SIZE, (donor + 1) * SIZE)))
    assert read.harm(remap, 64) > 1e-9
    assert read.harm(Remap(retired, donor, start, tuple(range(retired * SIZE, (retired + 1) * SIZE))), 64) < 1e-12
    same_values = read.values.clone()
    same_values[:, :, retired * SIZE : (retired + 1) * SIZE] = same_values[:, :, donor * SIZE : (donor + 1) * SIZE]
    monkeypatch.setattr(read, "values", same_values)
    both = read.divergences(Remap(retired, donor, start), start, 64)
    assert (read.divergences(remap, start, 64) - read.divergences(None, start, 64)).abs().max() < 1e-12
    assert (both - read.divergences(None, start, 64)).abs().max() > 1e-9


@pytest.mark.parametrize("kind", ["repeat", "similar"])
def test_pairs_are_what_the_executors_searches_find(boundaries, text, without_any, kind):
    _, policy, _ = without_any(kind)
    found = {
        (p.remap.retired, p.remap.donor): p.remap.reads_from - 1 for p in pairs_of_kind(kind, *text, SIZE, boundaries)
    }
    offered = {(retired, donor): computed for retired, donor, computed in reversed(policy.offered)}
    assert found
    assert all(offered[blocks] == computed for blocks, computed in found.items())
    if kind == "repeat":
        assert offered.keys() == found.keys()


def test_a_remap_needs_full_blocks_and_a_reader(read):
    with pytest.raises(ValueError, match="blocks 3 and 9 must both be among the 6 that are full before position 100"):
        read.harm(Remap(3, 9, 100), 16)
    with pytest.raises(ValueError, match="no token reads the remap"):
        read.harm(Remap(3, 4, read.num_tokens - 1), 16)


def test_near_pairs_differ_in_a_few_tokens_and_random_ones_are_reproducible(boundaries, text):
    prompt, output = text
    near = pairs_of_kind("near", prompt, output, SIZE, boundaries)
    assert {p.differing_tokens for p in near} <= {1, 2, 3, 4}
    assert len(near) > 2
    assert all(p.candidate.kept_rows[0] > p.candidate.retired_rows[-1] for p in near)
    one, same, other = (
        [p.remap for p in pairs_of_kind("random", prompt, output, SIZE, boundaries, seed)] for seed in (1, 1, 2)
    )
    assert len(one) > 3
    assert one == same != other
    for remap in one + [p.remap for p in near]:
        assert remap.donor != remap.retired
        assert remap.retired * SIZE >= len(prompt)
        assert (remap.retired + 1) * SIZE <= remap.reads_from - 64
        assert (remap.donor + 1) * SIZE < remap.reads_from
