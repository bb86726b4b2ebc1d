"""What the tests of the PyTorch backend share: a model's facts, a module that stands for TensorRT-LLM's ``_util``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from effective_settings import make_effective
from safetensors.torch import save_file
from trtllm_pytorch.fake_requests import FinishReason
from trtllm_pytorch.fake_util import make_util_module
from trtllm_pytorch.fake_v1 import FakeKVCacheManager

from trtllm_memshare.search.config import HOST_NEED
from trtllm_memshare.search.steps import BoundaryTokens
from trtllm_memshare.trtllm.pytorch import failures
from trtllm_memshare.trtllm.pytorch.attach import attach
from trtllm_memshare.trtllm.pytorch.facts import ModelFacts
from trtllm_memshare.trtllm.pytorch.settings import AdapterOptions, Settings


class TextlessFacts(ModelFacts):
    """A model of 50 tokens without step boundaries and with a rotation of one frequency."""

    def boundaries(self, tokenizer_dir):
        return BoundaryTokens.from_texts([chr(97 + i % 26) for i in range(50)])

    def fits(self, arguments):
        return True

    def reasons(self):
        return []

    def inv_freq(self):
        return torch.tensor([0.5])


def make_settings(
    preset="lexical",
    on_unsupported="stop",
    off_file=None,
    null_pages=None,
    null_entries="read",
    route="overlay",
    stats_file=None,
    **config,
):
    values = {"shingle_tokens": 4, "min_run_tokens": 8, "protected_tokens": 8, "protected_steps": 0}
    values |= {"need": HOST_NEED} if preset == "pressure" else {}
    memshare = make_effective(preset, **{**values, "search_interval": 2, **config})
    return Settings(
        memshare,
        AdapterOptions(
            on_unsupported=on_unsupported,
            stats_interval=1000,
            null_pages=null_pages,
            null_entries=null_entries,
            route=route,
        ),
        off_file=off_file,
        stats_file=stats_file,
    )


def sharing_class(manager_class, facts, settings):
    """Makes managers as TensorRT-LLM does once the probe has wrapped their class, without wrapping it."""

    def construct(kv_cache_config, *arguments, **keywords):
        manager = manager_class(kv_cache_config, *arguments, **keywords)
        attach(manager, kv_cache_config, keywords, lambda arguments: facts, settings)
        return manager

    return construct


def make_sharing_class(manager_class=FakeKVCacheManager, **settings):
    return sharing_class(manager_class, TextlessFacts(SimpleNamespace()), make_settings(**settings))


def write_null_pages(folder, bands, num_layers=2, num_kv_heads=1, head_dim=2, weights=None):
    """Null pages as calibration writes them; keys that name their band, layer and head."""
    keys = torch.arange(1.0, 1 + (len(bands) - 1) * num_layers * num_kv_heads * head_dim)
    keys = -keys.view(len(bands) - 1, num_layers, num_kv_heads, head_dim)
    tensors = {"keys": keys, "bands": torch.tensor(bands, dtype=torch.int32)}
    save_file(tensors, Path(folder) / "null_pages.safetensors", {"weights": weights} if weights else None)
    return str(folder)


@pytest.fixture(scope="session")
def null_pages(tmp_path_factory):
    """A folder with null pages for 256 positions in bands of 40."""
    return write_null_pages(tmp_path_factory.mktemp("null"), [0, 40, 80, 120, 160, 200, 240, 280])


@pytest.fixture
def model_config(bundled_model):
    from transformers import AutoConfig

    return SimpleNamespace(pretrained_config=AutoConfig.from_pretrained(bundled_model))


@pytest.fixture
def release(monkeypatch):
    """Makes ``_util`` of a release; classes and functions that are wrapped are as before after the test."""

    def make(name: str):
        module = make_util_module(name)
        for manager in (module.KVCacheManager, getattr(module, "KVCacheManagerV2", None)):
            if manager is not None:
                monkeypatch.setattr(manager, "__init__", manager.__init__)
        return module

    return make


@pytest.fixture(autouse=True)
def finish_reasons(monkeypatch):
    """TensorRT-LLM's enumeration, which a test has no module for."""
    monkeypatch.setattr(failures, "finish_reason", lambda name: FinishReason[name])
