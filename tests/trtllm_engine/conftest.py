"""Fixtures: the bundled model as an engine on the stand-in for TensorRT, and the torch runner beside it."""

from __future__ import annotations

import pytest
from fakes.fake_tensorrt import FakeTensorRT, write_engine
from fakes.host_device import HostDevice

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.search.rotary import rotary_inv_freq
from trtllm_memshare.trtllm.engine.spec import engine_spec

SIZES = {"tokens_per_block": 16, "max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": 1024}


@pytest.fixture
def make_runner(tmp_path):
    """Makes a runner over a stand-in engine; keyword arguments go to the runner, ``sizes`` to the engine."""

    def make(model_dir, num_blocks=400, runner_class=TensorRTRunner, sizes=None, max_pairs=64, **options):
        build = BuildConfig(**{**SIZES, **(sizes or {})})
        spec = engine_spec(read_checkpoint(model_dir), build, max_pairs=max_pairs)
        module = FakeTensorRT(HostDevice())
        module.registry.libraries.append("loaded")
        path = tmp_path / "rank0.engine"
        write_engine(path, model_dir, max_pairs=max_pairs, **{**SIZES, **(sizes or {})})
        engine = module.Runtime(module.Logger()).deserialize_cuda_engine(path.read_bytes())
        runner = runner_class(engine, spec, num_blocks, module.device, rotary_inv_freq(model_dir), **options)
        runner.fake = engine
        return runner

    return make
