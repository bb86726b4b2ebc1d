"""Fixtures: the bundled model as an engine on the stand-in for TensorRT, and the torch runner beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import fake_tensorrt_llm
from fakes.fake_tensorrt import FakeTensorRT, write_engine
from fakes.host_device import HostDevice

import trtllm_memshare.runners.tensorrt.open as open_module
import trtllm_memshare.trtllm.engine.adoption as adoption_module
import trtllm_memshare.trtllm.engine.builder as builder_module
from trtllm_memshare.builder.build_engine import BuildOptions, plan_build
from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.engine_dir import copy_small_files, trtllm_config
from trtllm_memshare.engine.tensorrt_record import PLUGIN_FILE, SEARCH_ENGINE_FILE, file_sha256
from trtllm_memshare.runners.tensorrt.runner import TensorRTRunner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.rotary import rotary_inv_freq
from trtllm_memshare.trtllm.engine.spec import engine_spec

SIZES = {"tokens_per_block": 16, "max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": 1024}
BUILD_SIZES = {name: size for name, size in SIZES.items() if name != "tokens_per_block"}


@pytest.fixture
def make_runner(tmp_path):
    """Makes a runner over a stand-in engine; keyword arguments go to the runner, ``sizes`` to the engine."""

    def make(
        model_dir, num_blocks=400, runner_class=TensorRTRunner, sizes=None, max_pairs=64, num_profiles=1, **options
    ):
        build = BuildConfig(**{**SIZES, **(sizes or {})})
        spec = engine_spec(read_checkpoint(model_dir), build, max_pairs=max_pairs)
        module = FakeTensorRT(HostDevice())
        module.registry.libraries.append("loaded")
        path = tmp_path / "rank0.engine"
        write_engine(path, model_dir, max_pairs=max_pairs, num_profiles=num_profiles, **{**SIZES, **(sizes or {})})
        engine = module.Runtime(module.Logger()).deserialize_cuda_engine(path.read_bytes())
        runner = runner_class(engine, spec, num_blocks, module.device, rotary_inv_freq(model_dir), **options)
        runner.fake = engine
        return runner

    return make


def write_engine_dir(folder: Path, model_dir: Path, search_engine="embedded", max_pairs=64, **sizes) -> Path:
    """An engine directory as a build leaves it, its plans for the stand-in."""
    sizes = {**SIZES, **sizes}
    (folder / "model").mkdir(parents=True)
    checkpoint = read_checkpoint(model_dir)
    copy_small_files(model_dir, folder / "model", checkpoint.dtype)
    config = trtllm_config(checkpoint, BuildConfig(**sizes))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / PLUGIN_FILE).write_bytes(b"the plugin library")
    embedded = max_pairs if search_engine == "embedded" else 0
    write_engine(folder / "rank0.engine", model_dir, max_pairs=embedded, **sizes)
    if search_engine == "separate":
        write_engine(folder / SEARCH_ENGINE_FILE, model_dir, kind="search", max_pairs=max_pairs, **sizes)
    record = {
        "tensorrt_version": "10.14.1.48",
        "compute_capability": "9.0",
        "search_engine": search_engine,
        "max_pairs": 0 if search_engine == "none" else max_pairs,
        "plugin_sha256": file_sha256(folder / PLUGIN_FILE),
    }
    memshare = make_config("off" if search_engine == "none" else "aligned").model_dump()
    document = {"format_version": 1, "backend": "tensorrt", "memshare": memshare, "tensorrt": record}
    (folder / "memshare.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def fake_tensorrt(monkeypatch) -> FakeTensorRT:
    """Puts the stand-in in the place of TensorRT, a GPU and TensorRT-LLM's plugin library."""
    module = FakeTensorRT(HostDevice())
    monkeypatch.setattr(open_module, "import_tensorrt", lambda: module)
    monkeypatch.setattr(open_module, "_open_device", lambda _: module.device)
    monkeypatch.setattr(open_module, "load_trtllm_plugins", lambda _: None)
    return module


@pytest.fixture
def trtllm(monkeypatch, fake_tensorrt):
    """Both stand-ins, and a GPU of compute capability 9.0."""
    fake_tensorrt_llm.install(monkeypatch, fake_tensorrt)
    for module in (builder_module, adoption_module):
        monkeypatch.setattr(module, "gpu_capability", lambda: (9, 0))
    return fake_tensorrt


@pytest.fixture
def plan(bundled_model, tmp_path):
    """Plans a build of the bundled model; keyword arguments go to the options, ``build`` to the build settings."""
    library = tmp_path / "plugin.so"
    library.write_bytes(b"the plugin library")

    def make(build=None, **options):
        return plan_build(
            BuildOptions(
                bundled_model,
                tmp_path / "engine",
                backend="tensorrt",
                plugin_library=library,
                build={**BUILD_SIZES, **(build or {})},
                **{"memshare": True, **options},
            )
        )

    return make
