"""Several ranks: distances put together, the same tables everywhere, and a stop where one rank differs."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import write_random_checkpoint
from fakes.counting_runner import CountingRunner, expected
from nightly import at_night
from ranks import ranked_worker

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.errors import UserError
from trtllm_memshare.ranks import torch_communicator
from trtllm_memshare.ranks.agreement import RankAgreement, RankDisagreementError, combine_distances
from trtllm_memshare.ranks.torch_communicator import TorchCommunicator
from trtllm_memshare.search.block_distance import block_distance
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.types import Candidate, Decision
from trtllm_memshare.serving.ranked_executor import RankedExecutor, RankedSampler
from trtllm_memshare.serving.request import RequestHandle, RequestState, SamplingParams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "checkpoint"
    return write_random_checkpoint(folder, num_key_value_heads=4, num_hidden_layers=1)


@pytest.fixture(scope="module")
def run_alone(checkpoint):
    """What the model gives with its heads together, worked out once for each number of rounds."""
    return functools.cache(lambda rounds, preset: ranked_worker.run(str(checkpoint), 0, 1, "", rounds, preset, -1))


def run_ranks(function, place, tmp_path, size, *arguments, within_s=240):
    """What ``function(place, rank, size, rendezvous, *arguments)`` returned on every rank.

    The processes are forked from one that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks.ranked_worker"])
    paths = [tmp_path / f"rank{r}.json" for r in range(size)]
    processes = [
        context.Process(
            target=ranked_worker.run_into,
            args=(str(p), function, str(place), r, size, str(tmp_path / "rendezvous"), *arguments),
        )
        for r, p in enumerate(paths)
    ]
    # The server of forks imports before it is told any path.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        for process in processes:
            process.start()
    for process in processes:
        process.join(within_s)
        assert process.exitcode == 0
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize(("size", "rounds", "preset"), [(2, 3, "aligned"), at_night(4, 2, "aligned")])
def test_ranks_hold_identical_tables_over_thousands_of_steps(checkpoint, run_alone, tmp_path, size, rounds, preset):
    results = run_ranks(ranked_worker.run, checkpoint, tmp_path, size, rounds, preset, -1)
    assert all(r == results[0] for r in results)
    assert results[0]["steps"] >= 400 * rounds
    assert results[0]["shared"] > 20 * rounds
    assert results[0] == run_alone(rounds, preset)  # the tables of a model whose heads are together


def test_every_rank_stops_when_one_differs(checkpoint, tmp_path):
    for result in run_ranks(ranked_worker.run, checkpoint, tmp_path, 2, 1, "aligned", 50):
        assert "block tables or candidates of ranks [1] differ from those of rank 0 at decision " in result["error"]
        assert "restart all ranks" in result["error"]


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_parts_put_together_are_the_distances_of_the_whole_pool(tp_size, pp_size):
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(rng.standard_normal((6, 4, 2, 4, 8, 32), np.float32))
    rows = torch.from_numpy(rng.integers(0, 48, (2, 5, 8)).astype(np.int32))
    delta = torch.from_numpy(rng.integers(-50, 50, (5, 8)).astype(np.int32))
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 32, 2) / 32)
    parts = [
        block_distance(heads.contiguous(), *rows, delta, inv_freq).numpy()
        for layers in pool.chunk(pp_size, dim=1)
        for heads in layers.chunk(tp_size, dim=3)
    ]
    whole = block_distance(pool, *rows, delta, inv_freq).numpy()
    np.testing.assert_allclose(combine_distances(parts, tp_size), whole, rtol=1e-5)
    with pytest.raises(ValueError, match=r"without distances: \[0\]"):
        combine_distances([None, *parts[1:]], tp_size)


class OneOf:
    """Ranks in one process, called one after the other: rank 0 last, since it answers."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self._shared = rank, size, shared

    def gather(self, value):
        self._shared.setdefault("values", {})[self.rank] = value
        return [self._shared["values"][r] for r in range(self.size)] if self.rank == 0 else None

    def broadcast(self, value, root=0):
        if self.rank == root:
            self._shared["answer"] = self._shared["change"](value) if "change" in self._shared else value
        return self._shared["answer"]


def make_candidate(block):
    rows = np.arange(8, dtype=np.int32)
    return Candidate(0, 0, block, block, 0, block + 1, block * 8 + rows, (block + 1) * 8 + rows, np.zeros(8, np.int32))


def accept_second(candidates, sums):
    return [Decision(candidates[1], float(sums[1, 0, 0]))]


def test_the_decision_is_taken_with_the_sums_of_all_ranks():
    shared = {"values": {1: None}}
    ranks = [RankAgreement(OneOf(r, 2, shared), 2) for r in (0, 1)]
    candidates = [make_candidate(2), make_candidate(5)]
    own = np.ones((2, 3, 4), np.float32)
    report = type(ranks[1]).decide
    with pytest.raises(KeyError, match="answer"):  # rank 1 leaves its report and finds no answer yet
        report(ranks[1], candidates, 2 * own, b"tables", accept_second)
    (decision,) = ranks[0].decide(candidates, own, b"tables", accept_second)
    assert decision.candidate is candidates[1]
    assert decision.distance == 3.0


@pytest.mark.parametrize(
    "change",
    [lambda v: replace(v, sequence=7), lambda v: replace(v, chosen=[(0, 1.0)]), lambda v: replace(v, digest=b"")],
)
def test_a_decision_that_is_not_the_one_announced_is_refused(change):
    agreement = RankAgreement(OneOf(0, 1, {"change": change}), 1)
    candidates = [make_candidate(2), make_candidate(5)]
    with pytest.raises(RankDisagreementError, match="another digest than that of its own decision 1"):
        agreement.decide(candidates, np.ones((2, 3, 4), np.float32), b"tables", accept_second)


def test_an_error_of_the_policy_reaches_every_rank():
    def fail(candidates, sums):
        raise ZeroDivisionError("no layers")

    agreement = RankAgreement(OneOf(0, 1, {}), 1)
    with pytest.raises(RankDisagreementError, match="rank 0 could not decide: ZeroDivisionError: no layers"):
        agreement.decide([make_candidate(2)], np.ones((1, 1, 4), np.float32), b"", fail)


def test_a_policy_that_names_no_candidate_of_its_own_leaves_nobody_waiting():
    def copied(candidates, sums):
        return [Decision(replace(candidates[0]), 0.1)]

    shared = {}
    agreement = RankAgreement(OneOf(0, 1, shared), 1)
    with pytest.raises(RankDisagreementError, match="rank 0 could not decide: KeyError"):
        agreement.decide([make_candidate(2)], np.ones((1, 1, 4), np.float32), b"", copied)
    assert "could not decide" in shared["answer"].error


def test_a_port_that_another_program_has_is_no_lost_rank():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"must listen on tcp://127.0.0.1:{port}, got a port .*set MASTER_PORT"):
            TorchCommunicator(0, 2, f"tcp://127.0.0.1:{port}", max_wait_s=5.0)


@pytest.mark.parametrize("port", ["abc", "0", "65536", ""])
def test_a_port_that_is_none(monkeypatch, port):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_PORT must be a port from 1 to 65535, got .*\(set it to the same"):
        TorchCommunicator.from_environment()


def test_tokens_come_from_the_rank_that_has_the_logits():
    """Two pipeline stages: rank 1 has logits, rank 0 has none."""
    shared = {}
    states = [RequestState(0, [1], SamplingParams(), RequestHandle(0))]
    last, first = (RankedSampler(OneOf(r, 2, shared), root=1) for r in (1, 0))
    assert last.sample(torch.tensor([[0.0, 3.0, 1.0]]), states) == [1]
    assert first.sample(torch.empty((1, 0)), states) == [1]
    (found,) = last.log_probs_of(torch.tensor([[0.0, 3.0, 1.0]]), [1]).tolist()
    assert found == pytest.approx(3.0 - np.log(1 + np.exp(3.0) + np.exp(1.0)), abs=1e-5)
    assert first.log_probs_of(torch.empty((1, 0)), [1]).tolist() == [found]


def test_what_goes_wrong_on_the_rank_that_samples_is_known_to_all(monkeypatch):
    shared = {}
    states = [RequestState(0, [1], SamplingParams(temperature=0.5), RequestHandle(0))]
    last, first = (RankedSampler(OneOf(r, 2, shared), root=1) for r in (1, 0))
    monkeypatch.setattr(last, "_uniform", lambda *_: 1 / 0)
    for sampler in (last, first):
        assert sampler.sample(torch.tensor([[0.0, 3.0]]), states) == [-1]
        assert "ZeroDivisionError" in str(sampler.errors[0])
    for sampler in (last, first):
        with pytest.raises(RuntimeError, match="rank 1 could not choose the next tokens: IndexError"):
            sampler.log_probs_of(torch.tensor([[0.0, 3.0]]), [7])


def test_requests_reach_rank_0_and_run_on_all(checkpoint, tmp_path, prompts):
    first, second = run_ranks(ranked_worker.serve, checkpoint, tmp_path, 2, prompts[:4])
    assert all(len(tokens) == 60 for tokens in first["outputs"])
    assert first["steps"] >= 60
    for key in ("shared", "state", "steps"):
        assert first[key] == second[key]


def test_the_benchmark_runs_on_every_rank_and_rank_0_reports(checkpoint, tmp_path, prompts):
    engine_dir = tmp_path / "engine"
    build_engine(plan_build(BuildOptions(checkpoint, engine_dir, memshare=True)))
    dataset = tmp_path / "data.jsonl"
    rows = [{"task_id": i, "input_ids": p, "output_tokens": 20} for i, p in enumerate(prompts[:3])]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = run_ranks(ranked_worker.benchmark, engine_dir, tmp_path, 2, str(dataset))
    assert first == {"full": 20.0, "lexical": 20.0}
    assert second == {}


@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_on_one_rank_ends_all_of_them_with_every_waiter_answered(tmp_path, victim):
    first, second = run_ranks(ranked_worker.interrupted, "", tmp_path, 2, victim, within_s=60)
    cause = "KeyboardInterrupt" if victim == 0 else "RankLostError: rank 0 of 2 has lost another one"
    assert len(first["ends"]) == 6
    assert all(end.startswith(f"the executor stopped: {cause}") for end in first["ends"]), first
    if victim == 1:
        assert second == {"error": "KeyboardInterrupt"}
    else:
        assert second["error"].startswith(
            "rank 1 of 2 has lost another one: it has ended, or did not answer for 1800 s"
        )


def test_nobody_waits_for_ever_for_a_rank_that_never_answers(tmp_path):
    first, second, _ = run_ranks(ranked_worker.silent, "", tmp_path, 3, within_s=60)
    for rank, result in enumerate((first, second)):
        assert result["error"].startswith(
            f"rank {rank} of 3 has lost another one: it has ended, or did not answer for 2 s (see the other ranks' "
            f"logs, start all of them again): "
        )


def test_nobody_waits_for_ever_for_a_rank_that_never_comes(tmp_path):
    (alone,) = run_ranks(ranked_worker.never_met, "", tmp_path, 1, within_s=60)
    assert alone["error"].startswith("rank 0 of 2 has lost another one: it has ended, or did not answer for 0.3 s")


def test_without_requests_rank_0_speaks_before_the_others_give_it_up(boundaries):
    turns: list = []

    class Alone(OneOf):
        def broadcast(self, value, root=0):
            turns.append(value)
            return super().broadcast(value, root)

    communicator = Alone(0, 1, {})
    executor = RankedExecutor(CountingRunner(), make_config("off"), boundaries, 400, communicator, 1, 1)
    assert executor.max_idle_s < torch_communicator.MAX_WAIT_S / 10
    executor.max_idle_s = 0.01
    with executor:
        deadline = time.monotonic() + 20
        while len(turns) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        idle = len(turns)
        assert executor.submit([5], SamplingParams(4)).result(20).token_ids == expected([5], 4)
    assert idle >= 3
    assert not any(turn.new or turn.ends for turn in turns[:idle])
    assert turns[-1].ends


def test_a_process_that_nobody_started_with_others_is_told_how(monkeypatch):
    for pair in torch_communicator._LAUNCHERS:
        for name in pair:
            monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"several ranks need mpirun or torchrun, .* \(start with mpirun -n RANKS\)"):
        TorchCommunicator.from_environment()
