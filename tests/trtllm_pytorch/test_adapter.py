"""Where sharing gets into TensorRT-LLM, what it refuses, and that nothing changes where it cannot."""

from __future__ import annotations

import logging
import random
from types import ModuleType, SimpleNamespace

import pytest
import torch
from trtllm_pytorch.conftest import TextlessFacts, make_settings, make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_cache_config, make_manager, make_mapping, repetitive_text
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_v1 import (
    FakeKVCacheManager,
    FakeOldAttentionMetadata,
    FakeOldKVCacheManager,
    FakeReusingKVCacheManager,
)
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2, FakeLateKVCacheManagerV2

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.attach import ModelFacts
from trtllm_memshare.trtllm.pytorch.probe import install
from trtllm_memshare.trtllm.pytorch.tail_swap import TailSwap


def make_util_module(v1=FakeKVCacheManager, v2=None) -> ModuleType:
    """Stands for ``tensorrt_llm._torch.pyexecutor._util``."""
    module = ModuleType("tensorrt_llm._torch.pyexecutor._util")
    module.KVCacheManager = v1
    if v2 is not None:
        module.KVCacheManagerV2 = v2

    def get_kv_cache_manager_cls(model_config, kv_cache_config=None, is_disagg=False, cache_transceiver_config=None):
        return v2 if v2 is not None and getattr(kv_cache_config, "use_kv_cache_manager_v2", False) else v1

    module.get_kv_cache_manager_cls = get_kv_cache_manager_cls
    return module


@pytest.fixture
def model_config(bundled_model):
    from transformers import AutoConfig

    return SimpleNamespace(pretrained_config=AutoConfig.from_pretrained(bundled_model))


@pytest.mark.parametrize(
    ("v1", "v2", "selected"),
    [
        (FakeKVCacheManager, None, FakeKVCacheManager),
        (FakeOldKVCacheManager, None, FakeOldKVCacheManager),
        (FakeKVCacheManager, FakeKVCacheManagerV2, FakeKVCacheManagerV2),
        (FakeKVCacheManager, FakeLateKVCacheManagerV2, FakeLateKVCacheManagerV2),
    ],
)
def test_the_class_that_tensorrt_llm_selects_is_subclassed(v1, v2, selected, model_config):
    module = make_util_module(v1, v2)
    metadata = type("Metadata", (FakeOldAttentionMetadata,), {})
    assert install(module, make_settings(), lambda: metadata)
    config = make_cache_config(40, 8, use_kv_cache_manager_v2=v2 is not None)
    chosen = module.get_kv_cache_manager_cls(model_config, config)
    assert issubclass(chosen, selected)
    manager = make_manager(chosen, 40, 8)
    assert isinstance(manager.memshare, TailSwap)
    assert (metadata.prepare is not FakeOldAttentionMetadata.prepare) == (v1 is FakeOldKVCacheManager)


def without(cls: type, name: str) -> type:
    """A class like ``cls`` that lacks a method."""
    members = {k: v for base in reversed(cls.__mro__[:-1]) for k, v in vars(base).items()}
    return type(cls.__name__, (), {k: v for k, v in members.items() if k != name and not k.startswith("__")})


@pytest.mark.parametrize("name", ["prepare_resources", "get_batch_cache_indices", "get_unique_primary_pool"])
def test_a_probe_that_fails_leaves_everything_and_says_why(name, caplog):
    module = make_util_module(without(FakeKVCacheManager, name))
    before = dict(vars(module))
    with caplog.at_level(logging.WARNING, logger="trtllm_memshare"):
        assert not install(module, make_settings())
    assert vars(module) == before
    assert len(caplog.records) == 1
    assert f"has no {name}" in caplog.text


def test_another_signature_of_the_selector_is_left_alone(caplog):
    module = make_util_module()
    module.get_kv_cache_manager_cls = lambda llm_args: FakeKVCacheManager
    assert not install(module, make_settings())
    assert "must take model_config first, got llm_args" in caplog.text


def test_another_manager_is_refused_or_left_as_it_is(model_config, caplog):
    other = type("MambaHybridCacheManager", (FakeKVCacheManager,), {})
    for on_unsupported in ("stop", "warn"):
        module = make_util_module()
        module.get_kv_cache_manager_cls = lambda model_config: other
        assert install(module, make_settings(on_unsupported=on_unsupported))
        if on_unsupported == "stop":
            with pytest.raises(UserError, match="excludes the KV cache manager MambaHybridCacheManager"):
                module.get_kv_cache_manager_cls(model_config)
        else:
            assert module.get_kv_cache_manager_cls(model_config) is other
            assert "MemShare is off, requests run unshared" in caplog.text


@pytest.mark.parametrize("arguments", [{"is_disagg": True}, {"cache_transceiver_config": object()}])
def test_disaggregated_serving_is_refused(arguments, model_config):
    module = make_util_module()
    install(module, make_settings())
    with pytest.raises(UserError, match="disaggregated serving"):
        module.get_kv_cache_manager_cls(model_config, make_cache_config(40, 8), **arguments)


@pytest.mark.parametrize("on_unsupported", ["stop", "warn"])
def test_a_request_of_disaggregated_serving_is_refused_or_runs_unshared(on_unsupported, caplog):
    manager = make_manager(make_sharing_class(on_unsupported=on_unsupported), 200, 8)
    executor = FakeExecutor(manager, True)
    text = repetitive_text(random.Random(1), 150)
    executor.submit(0, text[:5], text).llm_request_type = "LLMREQUEST_TYPE_GENERATION_ONLY"
    executor.submit(1, text[:6], text)
    if on_unsupported == "stop":
        executor.step()  # the prompts
        with pytest.raises(UserError, match="disaggregated serving, got a request of type LLMREQUEST_TYPE_GENER"):
            executor.step()
        return
    while executor.active:
        executor.step()
    assert "requests run unshared: sharing excludes disaggregated serving" in caplog.text
    assert not hasattr(executor.requests[0], "py_memshare_generated_blocks")
    assert executor.requests[1].py_memshare_retired_blocks > 0


UNSUPPORTED = [
    ({"spec_config": object()}, {}, {}, "speculative decoding"),
    ({"max_beam_width": 4}, {}, {}, "beam search, got max_beam_width 4"),
    ({}, {"max_attention_window": [64]}, {}, r"sliding window, got max_attention_window \[64\]"),
    ({}, {"host_cache_size": 1 << 30}, {}, "offload to the host"),
    ({"kv_connector_manager": object()}, {}, {}, "KV cache connector"),
    ({}, {}, {"enable_attention_dp": True}, "attention data parallelism"),
    ({}, {}, {"pp_size": 2}, "pipeline parallelism, got pp_size 2"),
    ({}, {}, {"cp_size": 2}, "context parallelism"),
    ({"dtype": SimpleNamespace(name="NVFP4")}, {}, {}, "NVFP4"),
]


def construct(manager_class, arguments, config, mapping):
    values = {
        "num_layers": 2, "num_kv_heads": 1, "head_dim": 2, "tokens_per_block": 8, "max_seq_len": 256,
        "max_batch_size": 4, "mapping": make_mapping(**mapping), **arguments,
    }  # fmt: skip
    return manager_class(make_cache_config(40, 8, **config), values.pop("kv_cache_type", "SELF"), **values)


@pytest.mark.parametrize(("arguments", "config", "mapping", "message"), UNSUPPORTED)
def test_what_sharing_excludes_stops_the_start_or_runs_unshared(arguments, config, mapping, message, caplog):
    with pytest.raises(UserError, match=message) as error:
        construct(make_sharing_class(), arguments, config, mapping)
    assert "\n" not in str(error.value)
    manager = construct(make_sharing_class(on_unsupported="warn"), arguments, config, mapping)
    assert manager.memshare is None
    assert str(error.value) in caplog.text
    request = FakeLlmRequest(1, [1, 2, 3])
    manager.prepare_resources(ScheduledRequests([request], []))
    assert manager.get_batch_cache_indices([1]) == [[0]]


def test_mla_is_refused():
    with pytest.raises(UserError, match="one latent instead of K and V"):
        construct(make_sharing_class(), {"kv_cache_type": "SELFKONLY"}, {}, {})


@pytest.mark.parametrize("name", ["is_draft", "is_estimating_kv_cache"])
def test_the_dry_run_and_draft_models_have_no_sharing(name):
    assert construct(make_sharing_class(), {name: True}, {}, {}).memshare is None


def test_kv_cache_compression_beside_sharing_is_refused():
    manager = make_manager(make_sharing_class(FakeLateKVCacheManagerV2), 40, 8)
    assert manager.kv_compression_manages_history
    manager.kv_compression_manages_history = False  # a method that keeps lengths
    assert manager.kv_compression_manages_history
    with pytest.raises(UserError, match="excludes KV cache compression"):
        manager.kv_compression_manages_history = True


def test_a_pool_of_another_layout_is_refused(monkeypatch):
    monkeypatch.setattr(
        FakeKVCacheManager, "get_unique_primary_pool", lambda self: self.impl.pool.transpose(0, 1).contiguous()
    )
    with pytest.raises(UserError, match="lays its pool out differently"):
        make_manager(make_sharing_class(), 40, 8)


def test_model_facts_come_from_the_checkpoint(model_config, bundled_model, tmp_path):
    facts = ModelFacts.of(model_config)
    from trtllm_memshare.runners.torch.runner import load_model

    expected = load_model(bundled_model).model.rotary_emb.inv_freq
    torch.testing.assert_close(facts.inv_freq(), expected.float(), rtol=0, atol=0)
    assert facts.boundaries(None).ends_line.any()
    with pytest.raises(UserError, match="set tokenizer_dir"):
        facts.boundaries(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embeddings of type dynamic"),
        ({"sliding_window": 4096}, "models with a sliding window, got one of 4096 tokens"),
        ({"sliding_window": 512, "layer_types": ["sliding_attention"]}, "models with a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window in some layers"),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"layer_types": ["full_attention"]}, None),
    ],
)
def test_models_whose_attention_depends_on_more_than_the_position(values, reason):
    found = ModelFacts(SimpleNamespace(**values)).reasons()
    assert (reason in found[0]) if reason else not found


def test_something_unexpected_leaves_tensorrt_llm_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(TextlessFacts, "inv_freq", lambda self: 1 / 0)
    manager = make_manager(make_sharing_class(), 40, 8)
    assert manager.memshare is None
    assert "MemShare is off, TensorRT-LLM runs as it is: ZeroDivisionError" in caplog.text


def test_block_reuse_needs_a_way_to_free_without_registering():
    with pytest.raises(UserError, match="block reuse with this TensorRT-LLM"):
        make_manager(make_sharing_class(), 40, 8, reuse=True)
    assert make_manager(make_sharing_class(FakeReusingKVCacheManager), 40, 8, reuse=True).memshare is not None


def test_dummies_pass_through():
    """Padding of CUDA graphs and warm-up requests have ids that nobody admitted."""
    manager = make_manager(make_sharing_class(), 40, 8)
    dummy = FakeLlmRequest(99, [1] * 9, is_dummy=True)
    manager.impl.add_sequence(99, 9, 1, dummy)
    dummy.state = LlmRequestState.GENERATION_IN_PROGRESS
    for _ in range(4):
        manager.prepare_resources(ScheduledRequests([], [dummy]))
    table = torch.zeros(1, 4, 2, manager.max_blocks_per_seq, dtype=torch.int32)
    manager.copy_batch_block_offsets(table, [99], 1, 0, 1)
    assert table[0, 0, 0, :2].tolist() == [0, 4]
    manager.free_resources(dummy)
    assert manager.get_num_free_blocks() == 40
