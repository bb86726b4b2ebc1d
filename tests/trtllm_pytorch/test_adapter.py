"""Where sharing gets into TensorRT-LLM, what it refuses, and that nothing changes where it cannot."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from trtllm_pytorch.conftest import TextlessFacts, make_settings, make_sharing_class, sharing_class
from trtllm_pytorch.fake_attention import make_attention_module
from trtllm_pytorch.fake_executor import FakeExecutor, make_cache_config, make_manager, make_mapping, repetitive_text
from trtllm_pytorch.fake_requests import FakeLlmRequest, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_util import FakeKvCacheCreator, make_util_module
from trtllm_pytorch.fake_v1 import (
    FakeKVCacheManager,
    FakeMainKVCacheManager,
    FakeReusingKVCacheManager,
)
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2, FakeMainKVCacheManagerV2

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.facts import ModelFacts
from trtllm_memshare.trtllm.pytorch.probe import install
from trtllm_memshare.trtllm.pytorch.sharing import Sharing

RELEASES = ("1.1", "1.2", "main V1", "main V2")


@pytest.mark.parametrize("name", RELEASES)
def test_managers_share_and_keep_their_type(name, release, model_config):
    module, attention = release(name), make_attention_module(name == "1.1")
    metadata = attention.TrtllmAttentionMetadata
    before = metadata.prepare
    assert install(module, make_settings(), lambda: attention)
    creator = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8, use_kv_cache_manager_v2="V2" in name))
    manager = creator.create()
    assert isinstance(manager.memshare, Sharing)
    assert type(manager) in (module.KVCacheManager, getattr(module, "KVCacheManagerV2", None))
    assert creator.estimated is None or getattr(creator.estimated, "memshare", None) is None
    assert (metadata.prepare is not before) == (name == "1.1")
    assert attention.TrtllmAttention.support_fused_rope()
    manager.shutdown()
    assert "prepare_resources" not in vars(manager)


def test_the_manager_that_1_1_measures_memory_with_shares_nothing(release, model_config):
    module = release("1.1")
    assert install(module, make_settings(), lambda: make_attention_module(True))
    creator = module.KvCacheCreator(FakeKvCacheCreator(module, model_config, make_cache_config(40, 8)).create)
    measured, served = {}, {}
    creator.build_managers(measured, True)
    creator.build_managers(served)
    assert not hasattr(measured["kv_cache_manager"], "memshare")
    assert isinstance(served["kv_cache_manager"].memshare, Sharing)


@pytest.mark.parametrize("arguments", [{"kv_connector_manager": None, "max_beam_width": 2}, {"max_beam_width": 1}])
def test_the_manager_that_main_falls_back_to_is_seen_as_well(arguments, release, model_config, caplog):
    """V2 gives way to V1, by the name of the class, for beams and connectors: refused, or shared, but not silent."""
    module = release("main V2")
    assert install(module, make_settings(on_unsupported="warn"))
    creator = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8, use_kv_cache_manager_v2=True))
    manager = creator.create(**arguments)
    falls_back = arguments["max_beam_width"] > 1
    assert type(manager) is (module.KVCacheManager if falls_back else module.KVCacheManagerV2)
    assert (manager.memshare is None) == falls_back
    assert ("beam search, got max_beam_width 2" in caplog.text) == falls_back


def test_what_a_request_may_need_is_still_told_at_admission(release, model_config):
    module = release("main V1")
    install(module, make_settings())
    manager = FakeKvCacheCreator(module, model_config, make_cache_config(30, 8)).create(max_seq_len=256)
    assert type(manager) is FakeMainKVCacheManager
    assert manager.get_request_kv_block_budget(FakeLlmRequest(1, [1] * 60, max_new_tokens=100)) == (20, 30)


def test_a_manager_of_another_geometry_is_no_model_that_was_asked_about(release, model_config, caplog):
    module = release("1.2")
    install(module, make_settings(on_unsupported="warn"))
    manager = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8)).create(num_layers=1)
    assert manager.memshare is None
    assert "sharing knows no model of this KV cache's geometry {'num_layers': 1" in caplog.text


def test_the_latest_model_of_a_geometry_counts(release, model_config):
    """A draft model is asked about between the target's question and the making of its cache."""
    module = release("main V1")
    install(module, make_settings())
    config = make_cache_config(40, 8)
    creator = FakeKvCacheCreator(module, model_config, config)
    draft = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1, head_dim=4)
    module.get_kv_cache_manager_cls(SimpleNamespace(pretrained_config=draft), config)
    assert creator.create().memshare is not None


def test_a_compression_method_of_tensorrt_llms_own_excludes_sharing(release, model_config, caplog):
    module = release("main V2")
    install(module, make_settings(on_unsupported="warn"))
    creator = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8, use_kv_cache_manager_v2=True))
    assert creator.create(compression=SimpleNamespace(algorithm="triattention")).memshare is None
    assert "sharing excludes KV cache compression" in caplog.text


def without(cls: type, name: str) -> type:
    """A class like ``cls`` that lacks a method."""
    members = {k: v for base in reversed(cls.__mro__[:-1]) for k, v in vars(base).items()}
    return type(cls.__name__, (), {k: v for k, v in members.items() if k != name and not k.startswith("__")})


@pytest.mark.parametrize("name", ["prepare_resources", "get_batch_cache_indices", "get_unique_primary_pool"])
def test_a_probe_that_fails_leaves_everything_and_says_why(name, caplog):
    module = make_util_module("1.2")
    module.KVCacheManager = without(FakeKVCacheManager, name)
    before = dict(vars(module))
    with caplog.at_level(logging.WARNING, logger="trtllm_memshare"):
        assert not install(module, make_settings())
    assert vars(module) == before
    assert len(caplog.records) == 1
    assert f"has no {name}" in caplog.text


def test_another_parameter_of_a_method_is_found_before_anything_is_changed(caplog):
    module = make_util_module("1.2")
    module.KVCacheManager = type(
        "KVCacheManager", (FakeKVCacheManager,), {"copy_batch_block_offsets": lambda self, table, ids: None}
    )
    before = dict(vars(module))
    assert not install(module, make_settings())
    assert vars(module) == before
    assert "KVCacheManager.copy_batch_block_offsets takes no dst_tensor" in caplog.text


def test_another_signature_of_the_selector_is_left_alone(caplog):
    module = make_util_module("1.2")
    module.get_kv_cache_manager_cls = lambda llm_args: FakeKVCacheManager
    assert not install(module, make_settings())
    assert "must take model_config first, got llm_args" in caplog.text


def test_another_manager_is_refused_or_left_as_it_is(release, model_config, caplog):
    other = type("MambaHybridCacheManager", (FakeKVCacheManager,), {})
    for on_unsupported in ("stop", "warn"):
        module = release("1.2")
        module.get_kv_cache_manager_cls = lambda model_config: other
        assert install(module, make_settings(on_unsupported=on_unsupported))
        if on_unsupported == "stop":
            with pytest.raises(UserError, match="excludes the KV cache manager MambaHybridCacheManager"):
                module.get_kv_cache_manager_cls(model_config)
        else:
            chosen = module.get_kv_cache_manager_cls(model_config)
            assert chosen is other
            assert not hasattr(make_manager(chosen, 40, 8), "memshare")
            assert "MemShare is off, requests run unshared" in caplog.text


@pytest.mark.parametrize("arguments", [{"is_disagg": True}, {"cache_transceiver_config": object()}])
def test_disaggregated_serving_is_refused(arguments, release, model_config):
    module = release("main V1")
    install(module, make_settings())
    with pytest.raises(UserError, match="disaggregated serving"):
        module.get_kv_cache_manager_cls(model_config, make_cache_config(40, 8), **arguments)


def test_disaggregated_serving_runs_unshared_where_the_start_goes_on(release, model_config, caplog):
    module = release("main V1")
    install(module, make_settings(on_unsupported="warn"))
    creator = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8))
    module.get_kv_cache_manager_cls(model_config, make_cache_config(40, 8), cache_transceiver_config=object())
    assert creator.create().memshare is None
    assert caplog.text.count("MemShare is off, requests run unshared: sharing excludes disaggregated serving") == 1


def test_a_transceiver_without_a_backend_is_none(release, model_config):
    """Main's arguments may hold one that says nothing."""
    module = release("main V1")
    install(module, make_settings())
    config, none = make_cache_config(40, 8), SimpleNamespace(backend=None)
    creator = FakeKvCacheCreator(module, model_config, config)
    module.get_kv_cache_manager_cls(model_config, config, cache_transceiver_config=none)
    assert creator.create().memshare is not None


@pytest.mark.parametrize("on_unsupported", ["stop", "warn"])
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("llm_request_type", "LLMREQUEST_TYPE_GENERATION_ONLY", "disaggregated serving, got a request of type LLM"),
        ("py_num_compressed_tokens", 64, "KV cache compression, got a request that was shortened"),
    ],
)
def test_a_request_that_cannot_share_runs_unshared_beside_one_that_does(
    attribute, value, message, on_unsupported, caplog
):
    """What only shows while serving stops no server, whatever the start-up would do."""
    manager = make_manager(make_sharing_class(on_unsupported=on_unsupported), 200, 8)
    executor = FakeExecutor(manager, True)
    text = repetitive_text(random.Random(1), 150)
    setattr(executor.submit(0, text[:5], text), attribute, value)
    executor.submit(1, text[:6], text)
    while executor.active:
        executor.step()
    assert f"requests run unshared: sharing excludes {message}" in caplog.text
    assert not hasattr(executor.requests[0], "py_memshare_generated_blocks")
    assert executor.requests[1].py_memshare_retired_blocks > 0


UNSUPPORTED = [
    ({"spec_config": object()}, {}, {}, "speculative decoding"),
    ({"max_beam_width": 4}, {}, {}, "beam search, got max_beam_width 4"),
    ({}, {"max_attention_window": [64]}, {}, r"sliding window, got max_attention_window \[64\]"),
    ({}, {"host_cache_size": 1 << 30}, {}, "offload to the host with KVCacheManager"),
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
    assert [list(blocks) for blocks in manager.get_batch_cache_indices([1])] == [[0]]


@pytest.mark.parametrize(
    ("kind", "message"), [("SELFKONLY", "one latent instead of K and V"), ("CROSS", "models with an encoder")]
)
def test_a_cache_of_another_kind_is_refused(kind, message):
    with pytest.raises(UserError, match=message):
        construct(make_sharing_class(), {"kv_cache_type": kind}, {}, {})


@pytest.mark.parametrize(("host_cache_size", "shares"), [(None, True), (1 << 20, True), (0, False)])
def test_v2_keeps_its_host_tier(host_cache_size, shares, caplog):
    """Without one, TensorRT-LLM comes to a standstill when memory is full."""
    make = make_sharing_class(FakeMainKVCacheManagerV2, on_unsupported="warn")
    manager = make_manager(make, 40, 8, config={"host_cache_size": host_cache_size})
    assert (manager.memshare is not None) == shares
    assert ("KVCacheManagerV2 without a host tier" in caplog.text) == (not shares)


@pytest.mark.parametrize("name", ["is_draft", "is_estimating_kv_cache"])
def test_the_dry_run_and_draft_models_have_no_sharing(name, release, model_config):
    module = release("1.2")
    install(module, make_settings())
    manager = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8)).create(**{name: True})
    assert not hasattr(manager, "memshare")


@pytest.mark.parametrize(("v2", "has_switch"), [(FakeKVCacheManagerV2, False), (FakeMainKVCacheManagerV2, True)])
def test_generated_tokens_stay_removable_on_v2(v2, has_switch):
    manager = make_manager(make_sharing_class(v2), 200, 8)
    executor = FakeExecutor(manager, True)
    text = repetitive_text(random.Random(1), 150)
    executor.submit(0, text[:5], text)
    for _ in range(100):
        executor.step()
    assert manager.kv_cache_map[0].history_length == 5
    assert getattr(manager, "kv_compression_manages_history", has_switch) is has_switch


def test_a_pool_of_another_layout_is_refused(monkeypatch):
    monkeypatch.setattr(
        FakeKVCacheManager, "get_unique_primary_pool", lambda self: self.impl.pool.transpose(0, 1).contiguous()
    )
    with pytest.raises(UserError, match="lays its pool out differently"):
        make_manager(make_sharing_class(), 40, 8)


def test_of_a_head_that_is_turned_in_part_only_that_part_is_turned_back():
    """As of Phi-4-mini: 24 of 32 dimensions."""
    facts = ModelFacts(
        transformers.Phi3Config(
            hidden_size=64, num_attention_heads=2, num_key_value_heads=1, partial_rotary_factor=0.75
        )
    )
    assert facts.inv_freq().shape == (12,)


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
        ({"attention_chunk_size": 8192}, "chunked attention, got chunks of 8192 tokens"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked attention in some layers"),
        ({"attention_chunk_size": None}, None),
    ],
)
def test_models_whose_attention_depends_on_more_than_the_position(values, reason):
    found = ModelFacts(SimpleNamespace(**values)).reasons()
    assert (reason in found[0]) if reason else not found


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("SmolLM3Config", {}, "models whose layers are not all rotated"),
        ("SmolLM3Config", {"no_rope_layers": [1] * 36}, None),
        ("CohereConfig", {}, "rotated in neighbouring pairs, got a model of type cohere (take preset lexical"),
        ("Glm4Config", {}, "rotated in neighbouring pairs, got a model of type glm4"),
        ("Qwen3Config", {}, None),
    ],
)
def test_keys_are_compared_only_where_stage_2_turns_them_as_the_model_does(name, changes, reason, caplog):
    config = getattr(transformers, name)(**changes)
    found = ModelFacts(config).comparison_reasons()
    assert (reason in found[0]) if reason else not found
    assert not ModelFacts(config).reasons()

    class Facts(TextlessFacts):
        def reasons(self):
            return ModelFacts.reasons(self)

    for preset, compares in (("aligned", True), ("lexical", False), ("paper", False)):
        settings = make_settings(preset=preset, on_unsupported="warn", count_aliases=True)
        manager = make_manager(sharing_class(FakeKVCacheManager, Facts(config), settings), 40, 8)
        assert (manager.memshare is None) == (compares and reason is not None)
    assert reason is None or reason in caplog.text


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
