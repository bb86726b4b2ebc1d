"""Triton beside the executor alone: the executor's process, the load on it, and how loads are summed up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.triton_load import executor_alone, streamed
from benchmarks.triton_load.aiperf import LoadFigures
from benchmarks.triton_load.cost import Alone, run_round
from benchmarks.triton_load.executor_alone import ExecutorAlone
from benchmarks.triton_load.streamed import Streams, streamed_lines, streamed_summary
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.errors import UserError

ITEMS = [SimpleNamespace(input_ids=[4, 5, 6 + i], output_tokens=20) for i in range(6)]
TEXTS = [""] * len(ITEMS)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    options = BuildOptions(model_dir=tiny_checkpoint, output_dir=folder / "engine", memshare=True,
                           build={"max_seq_len": 64, "max_batch_size": 4})  # fmt: skip
    build_engine(plan_build(options))
    executor = ExecutorAlone(options.output_dir, folder, 16)
    yield executor
    executor.stop()
    assert executor._process.returncode == 0  # SIGTERM ends it in good order


def test_the_executor_alone_is_asked_as_triton_is(alone):
    before = alone.cpu_s()
    found = asyncio.run(run_round(Alone(alone), ITEMS, TEXTS, clients=3, singles=2))  # type: ignore[arg-type]
    assert found.ttft_ms > 0
    assert found.req_s > 0
    assert 0 < found.server_cpu_ms * len(ITEMS) <= (alone.cpu_s() - before) * 1e3 + 1


def test_our_own_streams_time_each_first_token(alone, tmp_path):
    streams = Streams(ITEMS, TEXTS, 3, tmp_path, tmp_path)  # type: ignore[arg-type]
    found = asyncio.run(streams.run_own(Alone(alone)))
    assert (found.num_requests, found.num_errors) == (6, 0)
    assert 0 < found.ttft_p50_ms <= found.ttft_p99_ms < 6 / found.req_s * 1e3  # within the load's own time


def test_the_side_whose_streams_begin_changes_each_round(tmp_path, monkeypatch):
    """AIPerf, which has no other side, comes last."""
    figures, order = LoadFigures(1.0, 1.0, 1.0, 6, 0, 1.0), []

    async def own(_, side):
        order.append(side)
        return figures

    monkeypatch.setattr(Streams, "run_own", own)
    monkeypatch.setattr(streamed, "run_aiperf", lambda *_: order.append("aiperf") or figures)
    streams = Streams(ITEMS, TEXTS, 3, tmp_path, tmp_path)  # type: ignore[arg-type]
    sides = {"executor": "executor", "triton": "triton"}
    rounds = [streams.run(sides, "http://localhost", tmp_path, number) for number in range(3)]  # type: ignore[arg-type]
    assert order == ["executor", "triton", "aiperf", "triton", "executor", "aiperf", "executor", "triton", "aiperf"]
    assert all(each.keys() == {*sides, "aiperf"} for each in rounds)


def test_an_executor_that_ends_at_once_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(executor_alone.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="the executor's process did not start"):
        ExecutorAlone(tmp_path / "no engine", tmp_path, 16)


def test_an_executor_that_never_listens_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(executor_alone, "START_TIMEOUT_S", 0.0)
    with pytest.raises(UserError, match="the executor's process did not start"):
        ExecutorAlone(tmp_path / "no engine", tmp_path, 16)


def test_loads_are_summed_up_and_shown_one_a_line():
    rates = ({"executor": 10.0, "triton": 9.0, "aiperf": 8.0}, {"executor": 20.0, "triton": 14.0, "aiperf": 12.0})
    rounds = [
        {load: LoadFigures(rate, 20.0 * number, 40.0, 96, 0, 2.0) for load, rate in each.items()}
        for number, each in enumerate(rates, 1)
    ]
    found = streamed_summary(rounds)
    assert found["throughput_ratio"] == pytest.approx(0.8)  # of 0.9 and 0.7
    assert (found["triton"]["req_s"], found["triton"]["ttft_p50_ms"]) == (11.5, 30.0)
    assert len(found["rounds"]) == 2
    lines = streamed_lines(found)
    assert [line.partition(":")[0] for line in lines] == ["streamed, executor", "streamed, triton", "streamed, aiperf"]
    assert "10.00 requests per second, first token after 30 ms (p99 40), 0 errors" in lines[2]
