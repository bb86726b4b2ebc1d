"""Where a step's time goes: steps alone are watched, and what is reported adds up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_script import run_script

from trtllm_memshare.evaluation import replay_cost
from trtllm_memshare.evaluation.graph_clock import GraphClock
from trtllm_memshare.evaluation.random_model import SHAPES, make_model
from trtllm_memshare.evaluation.replay_cost import ReplaySetup, replay_setup
from trtllm_memshare.evaluation.step_profile import SKIPPED_STEPS, HostProfile, gpu_spans, summarize_kernels
from trtllm_memshare.runners.torch.runner import TorchRunner

ROOT = Path(__file__).parents[2]


def test_the_first_steps_and_what_runs_between_steps_are_not_watched():
    profile = HostProfile()

    def early() -> None:
        pass

    def late() -> None:
        sorted(range(10))

    for _ in range(SKIPPED_STEPS):
        profile(early)
    with pytest.raises(ValueError, match=f"more than {SKIPPED_STEPS} steps, got {SKIPPED_STEPS}"):
        profile.summary()
    for _ in range(4):
        profile(late)
        early()
    summary = profile.summary()
    calls = {row["function"].split()[-1]: row["calls_a_step"] for row in summary["functions"]}
    assert summary["num_steps"] == 4
    assert calls["late"] == 1
    assert "early" not in calls


def test_kernels_of_one_name_are_one_row_the_longest_first():
    summary = summarize_kernels([("copy", 500.0), ("gemm", 3000.0), ("copy", 500.0)], num_steps=2)
    assert summary == {
        "num_steps": 2,
        "ms_a_step": 2.0,
        "kernels": [
            {"kernel": "gemm", "calls_a_step": 0.5, "ms_a_step": 1.5},
            {"kernel": "copy", "calls_a_step": 1.0, "ms_a_step": 0.5},
        ],
    }


def test_calls_of_the_driver_are_not_work_of_the_gpu():
    """A profile of the GPU alone has them too (torch 2.11, CUDA 13): waiting for a step would count as one more."""
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        SimpleNamespace(name=name, device_type=where, time_range=SimpleNamespace(elapsed_us=lambda us=us: us))
        for name, where, us in (
            ("gemm", cuda, 4000),
            ("cudaStreamSynchronize", cpu, 9500),
            ("cudaGraphLaunch", cpu, 900),
        )
    ]
    assert gpu_spans(events) == [("gemm", 4000)]


class Stream:
    """A stream on which every piece of work takes 3 ms, and events that note its time."""

    def __init__(self) -> None:
        self.ms, self.waited = 0.0, 0

    def new_event(self) -> StreamEvent:
        return StreamEvent(self)


class StreamEvent:
    def __init__(self, stream: Stream) -> None:
        self._stream, self.ms = stream, float("nan")

    def record(self) -> None:
        self.ms = self._stream.ms

    def synchronize(self) -> None:
        self._stream.waited += 1

    def elapsed_time(self, end: StreamEvent) -> float:
        assert self._stream.waited, "read before the stream had come there"
        return end.ms - self.ms


class HostGraph:
    """Runs again what was captured."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def capture(self, run):
        self._run, self._out = run, run()
        return self._out

    def replay(self) -> None:
        self._out.copy_(self._run())
        self._stream.ms += 3


def test_a_clock_tells_each_replay_of_its_graphs_once():
    stream = Stream()
    clock = GraphClock(lambda: HostGraph(stream), stream.new_event)
    graph, other = clock.new_graph(), clock.new_graph()
    assert graph.capture(lambda: torch.ones(2)).tolist() == [1, 1]
    other.capture(lambda: torch.zeros(2))
    assert clock.take() == []
    for one in (graph, other, graph):
        one.replay()
    assert clock.take() == [3, 3, 3]
    assert clock.take() == []


def test_the_graph_s_share_of_a_step_is_told_and_the_rest_makes_the_whole(boundaries, monkeypatch):
    clock = GraphClock()
    left = iter([[99.0], [0.25, 0.75]])  # of an earlier run; of this one
    monkeypatch.setattr(clock, "take", lambda: next(left))
    runner = TorchRunner(make_model(SHAPES["small"], 96, "cpu"), 16, 8)
    row = replay_setup(ReplaySetup(runner, boundaries, [np.arange(20, dtype=np.int32)] * 2, 8, clock), "off")
    assert row["graph_ms_mean"] == 0.5
    assert row["graph_ms_mean"] + row["rest_ms_mean"] == pytest.approx(row["step_ms_mean"])


def test_without_graphs_no_share_is_told(boundaries):
    runner = TorchRunner(make_model(SHAPES["small"], 96, "cpu"), 16, 8)
    row = replay_cost.replay(runner, "off", boundaries, [np.arange(20, dtype=np.int32)], 8)
    assert row["graph_ms_mean"] is row["rest_ms_mean"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_the_benchmark_reports_the_host_s_functions(tmp_path):
    script, report = ROOT / "benchmarks" / "step_profile.py", tmp_path / "report.json"
    options = ["--model-shape", "small", "--batch-size", "2", "--device", "cpu", "--decode", "pytorch"]
    done = run_script(script, *options, "--output-tokens", "12", "--output-json", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["host"]["num_steps"] == 12 - SKIPPED_STEPS
    assert any("linear" in row["function"] for row in found["host"]["functions"])
    assert "gpu" not in found
    done = run_script(script, *options, "--output-tokens", str(SKIPPED_STEPS))
    assert done.returncode == 2
    assert "--output-tokens must be above 8" in done.stderr
