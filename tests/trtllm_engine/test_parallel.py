"""Ranks of an engine: which inputs each of them gets, and who may open one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from fakes import fake_tensorrt_llm
from fakes.host_device import HostDevice
from trtllm_engine.conftest import write_engine_dir

from trtllm_memshare.cache.offsets import encode_block_offsets
from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.tensorrt.parallel import _all_reduce_workspace, aligned_copy
from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.trtllm.engine.spec import engine_spec

EVERYWHERE = {
    "sequence_length", "context_lengths", "host_context_lengths", "host_request_types", "host_past_key_value_lengths",
    "cache_indirection", "host_max_attention_window_sizes", "host_sink_token_length", "kv_cache_block_offsets",
    "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping",
    "host_runtime_perf_knobs", "host_context_progress", "all_reduce_workspace", "memshare_pool_pointers",
    "memshare_num_blocks", "memshare_new_rows", "memshare_old_rows", "memshare_position_delta", "memshare_inv_freq",
}  # fmt: skip
FIRST = {"input_ids", "position_ids"}


@dataclass
class Recorder:
    """An engine that takes what it is given."""

    num_optimization_profiles: int = 1

    def __post_init__(self):
        self.shapes, self.addresses = {}, {}

    def create_execution_context(self):
        return self

    def get_tensor_profile_shape(self, name, index):
        return ((1,), (256,), (256,))

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        return True


def make_spec(bundled_model, rank):
    build = BuildConfig(tp_size=2, pp_size=2, max_seq_len=256, max_batch_size=4, max_num_tokens=64)
    return engine_spec(read_checkpoint(bundled_model), build, rank, max_pairs=8)


@pytest.mark.parametrize(
    ("rank", "inputs", "output"),
    [
        (0, FIRST, "hidden_states_output"),
        (1, FIRST, "hidden_states_output"),
        (2, {"hidden_states_input", "last_token_ids"}, "logits"),
        (3, {"hidden_states_input", "last_token_ids"}, "logits"),
    ],
)
def test_inputs_of_two_stages_of_two_ranks(bundled_model, rank, inputs, output):
    spec, engine = make_spec(bundled_model, rank), Recorder()
    workspace = aligned_copy(torch.arange(17))
    runner = TensorRTRunner(
        engine, spec, 12, HostDevice(), torch.ones(16), use_graphs=False, all_reduce_workspace=workspace
    )
    assert runner.pool.shape == (12, 2, 2, 1, 16, 32)  # half of 4 layers, half of 2 KV heads
    count = np.array([5], np.int32)
    offsets = encode_block_offsets(np.array([[3]], np.int32), spec.num_layers)
    ids = np.arange(5, dtype=np.int32)
    result = runner.step(runner.prepare(StepBatch(ids, ids, 1, count, count, offsets, context_lengths=count)))
    assert set(engine.shapes) == EVERYWHERE | inputs
    assert set(engine.addresses) == EVERYWHERE | inputs | {output, "memshare_block_distances"}
    assert engine.addresses["all_reduce_workspace"] == workspace.data_ptr()
    assert engine.shapes["host_kv_cache_pool_mapping"] == (2, 2)
    if spec.is_first_pp_rank:
        assert result.logits.shape == (1, 0)
    else:
        assert engine.shapes["hidden_states_input"] == (5, 128)
        assert result.logits.shape == (1, 80)


def test_each_rank_needs_a_gpu_of_its_own(tmp_path, bundled_model, fake_tensorrt, monkeypatch):
    engine_dir = write_engine_dir(tmp_path / "engine", bundled_model, tp_size=2)
    (engine_dir / "rank1.engine").write_bytes((engine_dir / "rank0.engine").read_bytes())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "two")  # somebody else's
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    second = type("Second", (), {"rank": 1, "size": 2})()
    with pytest.raises(UserError, match=r"a GPU of its own, got 2 ranks and 1 GPUs on this machine \(start fewer"):
        open_runner(load_engine(engine_dir), 20, communicator=second)


def test_graphs_are_replayed_for_one_rank_alone(tmp_path, bundled_model, fake_tensorrt):
    engine = load_engine(write_engine_dir(tmp_path / "engine", bundled_model))
    alone = type("Alone", (), {"rank": 0, "size": 1})()
    with pytest.raises(UserError, match=r"--engine-cuda-graphs is for TensorRT engines of one rank, got several ranks"):
        open_runner(engine, 20, communicator=alone, use_graphs=True)
    with pytest.raises(UserError, match=r"of one rank, got an engine of torch \(leave it out"):
        open_runner(replace(engine, backend="torch"), 20, use_graphs=True)


def test_an_engine_for_several_ranks_needs_as_many_processes(tmp_path, bundled_model, fake_tensorrt):
    engine_dir = write_engine_dir(tmp_path / "engine", bundled_model, tp_size=2)
    with pytest.raises(UserError, match=r"is missing rank1.engine"):
        load_engine(engine_dir)
    (engine_dir / "rank1.engine").write_bytes((engine_dir / "rank0.engine").read_bytes())
    engine = load_engine(engine_dir)
    with pytest.raises(UserError, match=r"is for 2 ranks, got one process \(start it with mpirun -n 2\)"):
        open_runner(engine, 20)
    alone = type("Alone", (), {"rank": 0, "size": 1})()
    with pytest.raises(UserError, match=r"is for 2 ranks, got 1 processes \(start it with mpirun -n 2\)"):
        open_runner(engine, 20, communicator=alone)


def test_the_workspace_keeps_its_values_at_an_address_that_tensorrt_takes(
    tmp_path, bundled_model, fake_tensorrt, monkeypatch
):
    fake_tensorrt_llm.install(monkeypatch, fake_tensorrt)
    pointers, buffers = torch.arange(17) * 1000, [object()]
    seen = []

    def allocate_workspace(mapping, size):
        seen.append((mapping.rank, mapping.tp_size, size))
        return buffers, pointers

    monkeypatch.setattr(fake_tensorrt_llm.CustomAllReduceHelper, "allocate_workspace", staticmethod(allocate_workspace))
    engine_dir = write_engine_dir(tmp_path / "engine", bundled_model, tp_size=2)
    (engine_dir / "rank1.engine").write_bytes(b"")
    workspace, kept = _all_reduce_workspace(load_engine(engine_dir), 1)
    assert seen == [(1, 2, 16_000_000)]
    assert torch.equal(workspace, pointers)
    assert workspace.data_ptr() % 256 == 0
    assert kept[0] is buffers


@pytest.mark.parametrize(
    ("sizes", "rank", "message"),
    [
        ({"tp_size": 2}, 2, r"rank must be below tp_size \* pp_size = 2, got 2"),
        ({"pp_size": 3}, 0, r"pp_size must divide the model's 4 layers, got 3"),
        ({"tp_size": 3}, 0, r"tp_size must divide the model's 4 attention heads, .* got 3"),
    ],
)
def test_layers_and_heads_divide_among_the_ranks(bundled_model, sizes, rank, message):
    with pytest.raises(UserError, match=message):
        engine_spec(read_checkpoint(bundled_model), BuildConfig(**sizes), rank)


def test_more_ranks_than_kv_heads_hold_one_each(bundled_model):
    assert engine_spec(read_checkpoint(bundled_model), BuildConfig(tp_size=4)).num_kv_heads == 1
