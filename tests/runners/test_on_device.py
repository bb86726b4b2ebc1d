"""A pool on another GPU than the thread's own: everything that launches there finds its device the current one."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runners import fake_flashinfer
from runners.test_torch_runner import SIZE, batch_of, make_manager

from trtllm_memshare.evaluation.graph_clock import GraphClock
from trtllm_memshare.runners.torch import runner as runner_module
from trtllm_memshare.runners.torch.on_device import on_device
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model

OWN, OTHER = 0, 1


class PlayedCuda:
    """``torch.cuda`` as far as a runner asks for it: what it was asked on which current device."""

    def __init__(self) -> None:
        self.current, self.seen = OWN, []

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def note(self, what: str) -> None:
        self.seen.append((what, self.current))

    def stream(self, *_):
        self.note("stream")
        return SimpleNamespace(wait_stream=lambda other: None)

    def graph(self, graph, **_):
        self.note("capture")
        return contextlib.nullcontext()

    def event(self, **_):
        return SimpleNamespace(record=lambda: self.note("event"))

    def watched(self, kind: type, *names: str) -> type:
        """A class whose methods are noted."""

        def noted(name):
            def method(instance, *arguments, **named):
                self.note(name)
                return getattr(kind, name)(instance, *arguments, **named)

            return method

        return type(kind.__name__, (kind,), {name: noted(name) for name in names})


@pytest.fixture
def played(monkeypatch):
    cuda = PlayedCuda()
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch.cuda, "Stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: cuda.note("replay")))
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    return cuda


def test_a_cuda_device_becomes_the_current_one_and_another_changes_nothing(played):
    with on_device(torch.device("cuda", OTHER)):
        assert played.current == OTHER
    assert played.current == OWN
    with on_device(torch.device("cpu")):
        assert played.current == OWN


def test_graphs_attention_searches_and_the_clock_run_on_the_device_of_the_pool(played, family_checkpoint, monkeypatch):
    """Steps of a thread that has chosen no device, of a runner whose pool is on the second one."""
    monkeypatch.setattr(runner_module, "on_device", lambda device: on_device(torch.device("cuda", OTHER)))
    search = SimpleNamespace(compare=lambda pairs: played.note("compare"))
    monkeypatch.setattr(runner_module, "make_block_search", lambda *_: played.note("make_block_search") or search)
    wrapper = played.watched(fake_flashinfer.BatchDecodeWithPagedKVCacheWrapper, "__init__", "plan", "run")
    clock = GraphClock()
    runner = TorchRunner(
        load_model(family_checkpoint), 40, SIZE, new_graph=clock.new_graph,
        flashinfer=SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=wrapper),
    )  # fmt: skip
    manager, tokens = make_manager(runner), {0: np.arange(4, 24)}
    assert manager.add_sequence(0, tokens[0].astype(np.int32))
    steps = [([10], [10], 1), ([11], [1], 0), ([12], [1], 0)]

    def run() -> None:
        for lengths, chunks, contexts in steps:
            batch = batch_of(manager, [0], lengths, chunks, tokens, contexts, pairs=object())
            runner.step(runner.prepare(batch))
        runner.compare(object())

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()
    asked = [what for what, _ in played.seen]
    assert {device for _, device in played.seen} == {OTHER}
    counts = {"make_block_search": 1, "__init__": 2, "plan": 2, "capture": 1, "replay": 2, "event": 4, "compare": 4}
    assert {what: asked.count(what) for what in counts} == counts
    assert {"run", "stream"} <= set(asked)
    assert played.current == OWN
