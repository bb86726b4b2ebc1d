"""The second route: pages are dropped through TensorRT-LLM's own framework, and the rest is what an oracle keeps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_settings
from trtllm_pytorch.fake_executor import make_cache_config, make_manager, repetitive_text
from trtllm_pytorch.fake_framework import (
    FakeKvCacheCompressionConfig,
    FakeKVCacheCompressionManager,
    FrameworkExecutor,
)
from trtllm_pytorch.fake_util import FakeKvCacheCreator
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_adapter import model_config, release  # noqa: F401
from trtllm_pytorch.test_tail_swap import NUM_SCHEDULES

from trtllm_memshare.trtllm.pytorch.framework import ALGORITHM, PageDropper, make_compression_manager
from trtllm_memshare.trtllm.pytorch.probe import install

CONFIG = FakeKvCacheCompressionConfig(algorithm=ALGORITHM)
SHORT = {"preset": "pressure", "need": "random", "min_kept": 0.25, "high_watermark": 0.8, "low_watermark": 0.7}


def serve(seed: int, overlap: bool, num_blocks=60, count=4, **config) -> FrameworkExecutor:
    """Requests to their end; after every step each row is what an oracle keeps that drops the same pages."""
    rng = random.Random(seed)
    values = make_settings(**{**SHORT, "null_pages": "unused", **config})
    compression = make_compression_manager(FakeKVCacheCompressionManager, CONFIG, values)
    manager = make_manager(FakeMainKVCacheManagerV2, num_blocks, 8, config={"host_cache_size": 1 << 30})
    compression.bind_kv_cache_managers(manager)
    executor, dropper = FrameworkExecutor(manager, overlap, compression), compression.memshare
    drop = dropper._drop

    def dropping(request, pages):
        drop(request, pages)
        rows = executor.expected[request.py_request_id]
        for page in sorted(pages, reverse=True):
            assert page * 8 >= request.py_prompt_len, "a prompt's page was dropped"
            assert page * 8 + 8 <= len(rows) - 8, "a recent page was dropped"
            del rows[page * 8 : page * 8 + 8]

    dropper._drop = dropping
    for request_id in range(count):
        executor.submit(request_id, repetitive_text(rng, rng.randrange(1, 30)), repetitive_text(rng, 180))
    for _ in range(3000):
        executor.step()
        for request in executor.active:
            if request.py_request_id in executor.processed and executor.is_running(request.py_request_id):
                assert executor.held(request.py_request_id) == executor.expected[request.py_request_id]
        if not executor.active:
            break
    assert not executor.active
    assert len(manager.impl.free) == num_blocks
    assert not dropper.failures.num_errors
    executor.dropper = dropper
    return executor


@settings(max_examples=max(4, NUM_SCHEDULES // 10), deadline=None)
@given(seed=st.integers(0, 10**6), overlap=st.booleans())
def test_any_schedule_keeps_what_an_oracle_keeps(seed, overlap):
    serve(seed, overlap)


def test_it_drops_and_nobody_is_suspended_where_floors_allow_it():
    executor = serve(3, True)
    assert executor.dropper.num_dropped > 20
    assert executor.num_pauses == 0
    assert serve(3, True, shadow=True).num_pauses > 0


@pytest.mark.parametrize("need", ["redundancy", "age"])
def test_other_needs_rank_pages_too(need):
    assert serve(4, False, need=need).dropper.num_dropped > 20


def test_an_error_stops_dropping_and_nothing_else(monkeypatch, caplog):
    monkeypatch.setattr(PageDropper, "_relieve", lambda self, requests: 1 / 0)
    with pytest.raises(AssertionError):  # the check that there were no errors
        serve(3, True)
    assert caplog.text.count("shares nothing new from now on") == 1


def test_it_serves_v2_alone():
    values = make_settings(**SHORT, null_pages="unused")
    compression = make_compression_manager(FakeKVCacheCompressionManager, CONFIG, values)
    with pytest.raises(TypeError, match="requires KVCacheManagerV2"):
        compression.bind_kv_cache_managers(make_manager(FakeKVCacheManager, 40, 8))


def test_the_factory_makes_it_for_our_algorithm_and_the_overlay_stays_off(release, model_config):  # noqa: F811
    module = release("main V2")
    module.KVCacheCompressionManager = FakeKVCacheCompressionManager
    assert install(module, make_settings(**SHORT, null_pages="unused", route="framework"))
    made = module.create_kv_cache_compression_manager(CONFIG, pretrained_config=None)
    creator = FakeKvCacheCreator(module, model_config, make_cache_config(40, 8, use_kv_cache_manager_v2=True))
    manager = creator.create(num_layers=2, num_kv_heads=1, head_dim=2)
    assert not hasattr(manager, "memshare")
    made.bind_kv_cache_managers(manager)
    assert manager.kv_compression_manages_history
    other = FakeKvCacheCompressionConfig(algorithm="triattention")
    assert module.create_kv_cache_compression_manager(other, pretrained_config=None).config is other


def test_a_release_without_the_framework_has_this_route_not(release, caplog):  # noqa: F811
    assert not install(release("1.2"), make_settings(**SHORT, null_pages="unused", route="framework"))
    assert "route framework needs KVCacheCompressionManager" in caplog.text
