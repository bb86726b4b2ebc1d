"""A pool that takes a share of the memory that the weights leave free, on a GPU that is played."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners import open as open_module
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.pool_memory import blocks_that_fit
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION
from trtllm_memshare.triton.repository import RepositoryOptions, memory_share_of, write_repository
from trtllm_memshare.triton.token_model import make_executor

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def engine_dir(tiny_checkpoint, tmp_path_factory) -> Path:
    build = {"max_seq_len": 128, "max_batch_size": 4, "tokens_per_block": 16}
    options = BuildOptions(tiny_checkpoint, tmp_path_factory.mktemp("engine") / "engine", memshare=True, build=build)
    build_engine(plan_build(options))
    return options.output_dir


def test_the_pool_is_what_was_asked_for_or_what_fits(engine_dir, monkeypatch):
    engine = load_engine(engine_dir)
    free = 100 * engine.bytes_per_block + 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert blocks_that_fit(engine, 90, 1.0, CUDA) == 90
    assert blocks_that_fit(engine, 110, 1.0, CUDA) == 100
    assert blocks_that_fit(engine, 110, 0.255, CUDA) == 25
    assert blocks_that_fit(engine, 110, 0.001, CUDA) == 1  # what is too few is said by who knows how many it takes
    assert blocks_that_fit(engine, 110, None, CUDA) == 110


def test_an_executor_takes_what_fits_and_refuses_what_holds_nobody(engine_dir, monkeypatch):
    engine = load_engine(engine_dir)
    asked = []

    def fit(engine, num_blocks, share, device):
        asked.append((num_blocks, share))
        return fits

    monkeypatch.setattr(open_module, "blocks_that_fit", fit)
    fits = 20
    executor, description = make_executor(engine, 32, MAX_UTILIZATION, 0.5)
    assert executor.status().max_blocks == 20
    assert description.startswith("20 KV blocks, ")
    fits = 7
    with pytest.raises(
        UserError, match=r"0\.5 of the GPU's free memory must hold .* 8 blocks .*got 7 .build with a lower"
    ):
        make_executor(engine, 32, MAX_UTILIZATION, 0.5)
    assert asked == [(32, 0.5)] * 2


def test_a_repository_hands_the_share_on(engine_dir, tmp_path):
    options = {"kv_cache_blocks": 32, "kv_cache_free_gpu_mem_fraction": 0.85}
    parameters = write_repository(RepositoryOptions(engine_dir, tmp_path / "with", **options))
    assert memory_share_of(parameters) == 0.85
    assert parameters["max_tokens_in_paged_kv_cache"] == str(32 * 16)
    assert memory_share_of(write_repository(RepositoryOptions(engine_dir, tmp_path / "without"))) is None


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(engine_dir, tmp_path, share):
    with pytest.raises(UserError, match="mem-fraction must be above 0 and at most 1, got"):
        write_repository(RepositoryOptions(engine_dir, tmp_path / "r", kv_cache_free_gpu_mem_fraction=share))


def test_a_cpu_has_no_gpu_memory(engine_dir):
    with pytest.raises(UserError, match=r"needs a GPU, got device cpu .set --kv-cache-blocks instead"):
        make_executor(load_engine(engine_dir), 32, MAX_UTILIZATION, 0.9)
