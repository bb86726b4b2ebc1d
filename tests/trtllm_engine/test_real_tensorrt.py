"""With TensorRT itself, a GPU and the built plugin library: memshare.engine against the specification."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import FLOAT32_SUM

from trtllm_memshare.runners.tensorrt.separate_search import SeparateEngineSearch
from trtllm_memshare.search.block_distance import block_distance, pairs_on
from trtllm_memshare.search.types import PairBatch
from trtllm_memshare.trtllm.engine.spec import EngineSpec

LIBRARY = Path(__file__).parents[2] / "build" / "plugins" / "libtrtllm_memshare_plugin.so"
pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not LIBRARY.is_file(), reason="the plugin library is not built (build_plugins.py)"),
]


def test_the_search_engine_gives_the_distances_of_the_specification():
    from trtllm_memshare.runners.tensorrt.device import CudaDevice
    from trtllm_memshare.trtllm.engine.installed import import_tensorrt
    from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin
    from trtllm_memshare.trtllm.engine.search_engine import build_search_engine

    trt, device = import_tensorrt(), CudaDevice()
    load_memshare_plugin(trt, LIBRARY)
    spec = EngineSpec("float32", "float32", "float32", 3, 2, 64, 128, 80, 16, 4, 64, 256, max_pairs=8)
    plan = trt.Runtime(trt.Logger()).deserialize_cuda_engine(build_search_engine(trt, spec, 8))
    pool = device.device_tensor((20, 3, 2, 2, 16, 64), torch.float32).normal_()
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 320, (2, 5, 16)).astype(np.int32)
    pairs = PairBatch(*rows, rng.integers(-99, 99, (5, 16)).astype(np.int32))
    torch.cuda.synchronize()
    search = SeparateEngineSearch(plan, spec, pool, device, inv_freq)
    sums, seconds = search.compare(pairs).read()
    expected = block_distance(pool, *pairs_on(pool.device, pairs), inv_freq.to(pool.device))
    torch.testing.assert_close(torch.from_numpy(sums), expected.cpu(), **FLOAT32_SUM)
    assert seconds > 0
