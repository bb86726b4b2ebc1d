"""What the tests of the PyTorch backend share: a model's facts, a module that stands for TensorRT-LLM's ``_util``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trtllm_pytorch.fake_requests import FinishReason
from trtllm_pytorch.fake_v1 import FakeKVCacheManager

from trtllm_memshare.search.config import make_config
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


def make_settings(preset="lexical", on_unsupported="stop", off_file=None, **config):
    values = {"shingle_tokens": 4, "min_run_tokens": 8, "protected_tokens": 8, "protected_steps": 0}
    memshare = make_config(preset, **{**values, "search_interval": 2, **config})
    return Settings(memshare, AdapterOptions(on_unsupported=on_unsupported, stats_interval=1000), off_file=off_file)


def sharing_class(manager_class, facts, settings):
    """Makes managers as TensorRT-LLM does once the probe has wrapped their class, without wrapping it."""

    def construct(kv_cache_config, *arguments, **keywords):
        manager = manager_class(kv_cache_config, *arguments, **keywords)
        attach(manager, kv_cache_config, keywords, lambda arguments: facts, settings)
        return manager

    return construct


def make_sharing_class(manager_class=FakeKVCacheManager, **settings):
    return sharing_class(manager_class, TextlessFacts(SimpleNamespace()), make_settings(**settings))


@pytest.fixture(autouse=True)
def finish_reasons(monkeypatch):
    """TensorRT-LLM's enumeration, which a test has no module for."""
    monkeypatch.setattr(failures, "finish_reason", lambda name: FinishReason[name])
