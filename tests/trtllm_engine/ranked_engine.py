"""One rank of an engine on the stand-in for TensorRT; run by test_ranked_engine.py in a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from fakes.fake_tensorrt import FakeTensorRT
from fakes.host_device import HostDevice

import trtllm_memshare.runners.tensorrt.open as open_module
import trtllm_memshare.runners.tensorrt.parallel as parallel_module
from build_scripts.tiny_reasoner.tokenizer import VOCAB_SIZE, build_tokenizer
from trtllm_memshare.ranks.torch_communicator import TorchCommunicator
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.serving.ranked_executor import Ranks
from trtllm_memshare.serving.request import SamplingParams

SETTINGS = {"protected_tokens": 16, "protected_steps": 0, "search_interval": 3, "max_distance": 0.2}
NUM_BLOCKS, NEW_TOKENS = 50, 210


class Links:
    """See ``fakes.numpy_decoder.Alone``: TensorRT-LLM's communication inside its engines, over gloo."""

    def __init__(self, rank, tp_size, pp_size):
        self.tp_size, self.pp_size, self._rank = tp_size, pp_size, rank
        self.pp_rank, self.tp_rank = divmod(rank, tp_size)
        stages = [dist.new_group(list(range(s * tp_size, (s + 1) * tp_size))) for s in range(pp_size)]
        self._stage = stages[self.pp_rank]

    def add(self, partial):
        total = torch.from_numpy(partial.copy())
        dist.all_reduce(total, group=self._stage)
        return total.numpy()

    def send(self, states):
        dist.send(torch.from_numpy(states.copy()), self._rank + self.tp_size)

    def receive(self, shape):
        states = torch.empty(shape)
        dist.recv(states, self._rank - self.tp_size)
        return states.numpy()


def serve_engine(engine_dir: str, rank: int, size: int, rendezvous: str, prompts: list[list[int]]) -> dict:
    """Serves ``prompts`` with the engine's ranks."""
    communicator = TorchCommunicator(rank, size, f"file://{rendezvous}")
    engine = load_engine(Path(engine_dir))
    module = FakeTensorRT(HostDevice())
    module.links = Links(rank, engine.build.tp_size, engine.build.pp_size)
    workspace = parallel_module.aligned_copy(torch.arange(7 * engine.build.tp_size + 3))
    open_module.import_tensorrt = lambda: module
    open_module._open_device = lambda _: module.device
    open_module.load_trtllm_plugins = lambda _: None
    # Part of the stand-in's memory, as if it had been allocated through it.
    module.device.adopt(workspace)
    parallel_module._all_reduce_workspace = lambda *_: (workspace, None)
    runner = open_runner(engine, NUM_BLOCKS, communicator=communicator)
    ranks = Ranks(communicator, engine.build.tp_size, engine.build.pp_size)
    boundaries = BoundaryTokens.from_tokenizer(build_tokenizer(4096), VOCAB_SIZE)
    executor = ranks.executor(runner, make_config("aligned", **SETTINGS), boundaries, 1024, 8, 64, "MAX_UTILIZATION")
    outputs = []
    if ranks.is_leader:
        handles = [executor.submit(p, SamplingParams(NEW_TOKENS, stop_token_ids=(1,))) for p in prompts]
        executor.run_until_idle()
        executor.close()
        outputs = [h.result(0).token_ids for h in handles]
    else:
        executor.follow()
    stats = executor.manager.stats()
    state = executor.manager.state_digest().hex()
    return {"outputs": outputs, "shared": stats.shared, "state": state, "rejected": executor.rejected}
