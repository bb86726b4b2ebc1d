"""The second route: pages are dropped through TensorRT-LLM's own framework, and the rest is what an oracle keeps."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtllm_pytorch.conftest import make_settings
from trtllm_pytorch.fake_attention import FakeAttentionModule, make_attention_module
from trtllm_pytorch.fake_executor import make_cache_config, make_manager, make_mapping, repetitive_text
from trtllm_pytorch.fake_framework import (
    FakeKVCacheCompressionManager,
    FrameworkExecutor,
)
from trtllm_pytorch.fake_llm_args import make_llm_args
from trtllm_pytorch.fake_requests import FakeLlmRequest, FinishReason, LlmRequestState, ScheduledRequests
from trtllm_pytorch.fake_util import FakeKvCacheCreator
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2
from trtllm_pytorch.test_tail_swap import NUM_SCHEDULES

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.compression_config import allow_algorithm
from trtllm_memshare.trtllm.pytorch.framework import make_compression_manager
from trtllm_memshare.trtllm.pytorch.page_dropper import PageDropper
from trtllm_memshare.trtllm.pytorch.probe import install
from trtllm_memshare.trtllm.pytorch.totals import NOTHING

LLM_ARGS = make_llm_args("refuses others")
assert allow_algorithm(LLM_ARGS)
CONFIG = LLM_ARGS.MemShareKvCacheCompressionConfig()
SHORT = {"preset": "pressure", "need": "random", "min_kept": 0.25, "high_watermark": 0.8, "low_watermark": 0.7}


def bound(values, num_blocks=40, prepare=None, **arguments):
    """A method of the framework and the KV cache manager that TensorRT-LLM has bound to it."""
    compression = make_compression_manager(FakeKVCacheCompressionManager, CONFIG, values, lambda arguments: [])
    manager = make_manager(FakeMainKVCacheManagerV2, num_blocks, 8, **arguments)
    manager.memshare_made_with = make_cache_config(num_blocks, 8, **arguments.get("config", {})), {}
    if prepare is not None:
        prepare(manager)
    compression.bind_kv_cache_managers(manager)
    return compression, manager


def make_executor(num_blocks: int, overlap: bool, **config) -> FrameworkExecutor:
    """Nobody is there yet. What its ``dropper`` drops an oracle drops too."""
    values = make_settings(**{**SHORT, "null_pages": "unused", **config})
    compression, manager = bound(values, num_blocks, config={"host_cache_size": 1 << 30})
    executor, dropper = FrameworkExecutor(manager, overlap, compression), compression.memshare
    executor.dropper, drop = dropper, dropper._drop

    def dropping(request, pages):
        drop(request, pages)
        rows = executor.expected[request.py_request_id]
        for page in sorted(pages, reverse=True):
            assert page * 8 >= request.prompt_len, "a prompt's page was dropped"
            assert page * 8 + 8 <= len(rows) - 8, "a recent page was dropped"
            del rows[page * 8 : page * 8 + 8]

    dropper._drop = dropping
    return executor


def serve(seed: int, overlap: bool, num_blocks=60, count=4, prepare=None, num_errors=0, **config) -> FrameworkExecutor:
    """Requests to their end; after every step each row is what an oracle keeps that drops the same pages.

    ``prepare``: called with the dropper and the requests before the first step.
    """
    rng, executor = random.Random(seed), make_executor(num_blocks, overlap, **config)
    dropper = executor.dropper
    requests = [
        executor.submit(request_id, repetitive_text(rng, rng.randrange(1, 30)), repetitive_text(rng, 180))
        for request_id in range(count)
    ]
    if prepare is not None:
        prepare(dropper, requests)
    for _ in range(3000):
        executor.step()
        for request in executor.active:
            has_ended = request.state is LlmRequestState.GENERATION_COMPLETE  # alone: nobody reads its rows again
            if (
                request.py_request_id in executor.processed
                and executor.is_running(request.py_request_id)
                and not has_ended
            ):
                assert executor.held(request.py_request_id) == executor.expected[request.py_request_id]
        if not executor.active:
            break
    assert not executor.active
    assert len(executor.manager.impl.free) == num_blocks
    assert dropper.failures.num_errors == num_errors
    executor.manager._compression.shutdown()
    return executor


@settings(max_examples=max(4, NUM_SCHEDULES // 10), deadline=None)
@given(seed=st.integers(0, 10**6), overlap=st.booleans())
def test_any_schedule_keeps_what_an_oracle_keeps(seed, overlap):
    serve(seed, overlap)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_is_computed_anew_is_as_long_as_its_text_again(overlap):
    """Main frees it first, then resets lengths, but not by how much the sequence was shorter."""
    shortened = []

    def watch(dropper, requests):
        forget = dropper.forget

        def forgetting(request):
            if request.state is not LlmRequestState.GENERATION_COMPLETE:
                shortened.append(request.py_num_compressed_tokens)
            forget(request)

        dropper.forget = forgetting

    executor = serve(3, overlap, num_blocks=45, min_kept=0.75, prepare=watch)  # holds rows against an oracle's
    num_again = sum(request.num_lives - 1 for request in executor.requests)
    assert 0 < sum(count > 0 for count in shortened) <= num_again  # prompts that found no room come by too


def test_it_drops_and_nobody_is_suspended_where_floors_allow_it():
    executor = serve(3, True)
    assert executor.dropper.num_dropped > 20
    assert executor.num_pauses == 0


def test_shadow_counts_each_page_once_and_drops_none(caplog):
    caplog.set_level("INFO", logger="trtllm_memshare")
    executor = serve(3, True, shadow=True)
    assert executor.num_pauses > 0
    assert executor.dropper.num_dropped == 0
    assert 20 < executor.dropper.num_shadowed < 4 * 180 // 8
    assert f"shadow counted {executor.dropper.num_shadowed}, 0 errors" in caplog.text


def test_a_file_stops_dropping_for_as_long_as_it_exists(tmp_path, caplog):
    switch = tmp_path / "off"
    switch.touch()
    assert serve(3, True, off_file=switch).dropper.num_dropped == 0
    assert f"shares nothing new: {switch} exists" in caplog.text
    switch.unlink()
    assert serve(3, True, off_file=switch).dropper.num_dropped > 20


@pytest.mark.parametrize("need", ["redundancy", "age"])
def test_other_needs_rank_pages_too(need):
    assert serve(4, False, need=need).dropper.num_dropped > 20


def test_an_error_stops_dropping_and_nothing_else(monkeypatch, caplog):
    monkeypatch.setattr(PageDropper, "_relieve", lambda self, requests: 1 / 0)
    serve(3, True, num_errors=1)
    assert caplog.text.count("shares nothing new from now on") == 1


class FailingPool:
    """A pool of which one access fails, in the midst of the moves of a request."""

    def __init__(self, pool, after: int) -> None:
        self._pool, self._left = pool, after

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def __getitem__(self, index):
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("a copy failed")
        return self._pool[index]


def fail_a_copy(dropper, requests):
    dropper._backend.pool = FailingPool(dropper._backend.pool, 20)


def refuse_a_cut(dropper, requests):
    shrink, left = dropper._backend.shrink, [1]

    def refusing(request_id, num_pages):
        if left and left.pop():
            raise RuntimeError(f"request {request_id} could not be cut")
        shrink(request_id, num_pages)

    dropper._backend.shrink = refusing


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("break_it", [fail_a_copy, refuse_a_cut])
def test_a_drop_that_fails_half_way_ends_its_request_alone_and_no_other_drops_more(break_it, overlap, caplog):
    dropped_when_off = []

    def prepare(dropper, requests):
        break_it(dropper, requests)
        drop = dropper._drop

        def dropping(request, pages):
            dropped_when_off.append(dropper.failures.is_off)
            drop(request, pages)

        dropper._drop = dropping

    executor = serve(3, overlap, prepare=prepare, num_errors=1)
    assert dropped_when_off
    assert not any(dropped_when_off)
    ended = [r for r in executor.requests if r.finish_reason is FinishReason.CANCELLED]
    assert len(ended) == executor.dropper.failures.num_failed_requests == 1
    assert f"request {ended[0].py_request_id} is ended alone" in caplog.text
    assert caplog.text.count("shares nothing new from now on") == 1
    for request in executor.requests:
        assert request in ended or request.max_beam_num_tokens == len(executor.scripts[request.py_request_id])


def test_a_wish_that_means_nothing_is_said_once_and_harms_nobody(caplog):
    def wish(dropper, requests):
        requests[1].py_memshare_min_kept, requests[2].py_memshare_min_kept = float("nan"), "half"

    assert serve(3, True, prepare=wish).dropper.num_dropped > 20
    assert caplog.text.count("py_memshare_min_kept must be a number between 0 and 1, got nan on request 1") == 1
    assert caplog.text.count("py_memshare_min_kept") == 1


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}])
def test_several_ranks_are_refused_since_each_would_drop_pages_of_its_own(sizes, caplog):
    def bind(on_unsupported):
        values = make_settings(**SHORT, null_pages="unused", on_unsupported=on_unsupported)
        return bound(values, prepare=lambda manager: setattr(manager, "mapping", make_mapping(**sizes)))

    name = next(iter(sizes))
    with pytest.raises(UserError, match=f"route framework serves one rank, got .*{name} 2.*take route overlay"):
        bind("stop")
    compression, manager = bind("warn")
    assert "requests run unshared: route framework serves one rank" in caplog.text
    assert not manager.kv_compression_manages_history
    FrameworkExecutor(manager, True, compression).step()
    compression.shutdown()


def test_it_serves_v2_alone():
    values = make_settings(**SHORT, null_pages="unused")
    compression = make_compression_manager(FakeKVCacheCompressionManager, CONFIG, values, lambda arguments: [])
    with pytest.raises(TypeError, match="requires KVCacheManagerV2"):
        compression.bind_kv_cache_managers(make_manager(FakeKVCacheManager, 40, 8))


@pytest.fixture
def served(release, model_config):
    """Starts TensorRT-LLM with our algorithm; returns ``_util``, the method and the KV cache manager it is bound to."""

    def start(on_unsupported="stop", config=None, draft=None, disaggregated=False, rope_fusion=False, **arguments):
        module, attention = release("main V2"), make_attention_module()
        values = make_settings(**SHORT, null_pages="unused", route="framework", on_unsupported=on_unsupported)
        assert install(module, values, lambda: attention)
        assert attention.TrtllmAttention.support_fused_rope()  # TensorRT-LLM knows from our configuration
        FakeAttentionModule(attention.TrtllmAttention, 0, rope_fusion=rope_fusion)
        made = module.create_kv_cache_compression_manager(CONFIG, model_engine=None)
        cache_config = make_cache_config(40, 8, use_kv_cache_manager_v2=True, **(config or {}))
        creator = FakeKvCacheCreator(module, model_config, cache_config)
        if disaggregated:
            module.get_kv_cache_manager_cls(model_config, cache_config, is_disagg=True)
        manager = creator.create(**arguments)
        made.bind_kv_cache_managers(manager, draft)
        return module, made, manager

    return start


def test_the_factory_makes_it_for_our_algorithm_and_the_overlay_stays_off(served):
    module, made, manager = served()
    assert not hasattr(manager, "memshare")
    assert manager.kv_compression_manages_history
    assert made.memshare is not None
    other = LLM_ARGS.TriAttentionKvCacheCompressionConfig()
    assert module.create_kv_cache_compression_manager(other, model_engine=None).config is other


def test_nothing_is_dropped_in_the_manager_that_memory_is_measured_with(served):
    module, made, manager = served()
    assert made.memshare is not None
    measuring = module.create_kv_cache_compression_manager(CONFIG, model_engine=None, estimating_kv_cache=True)
    measuring.bind_kv_cache_managers(manager)
    assert measuring.memshare is None
    _, early, _ = served(is_estimating_kv_cache=True)  # early factories are told nothing, the KV cache manager is
    assert early.memshare is None
    assert module.create_kv_cache_compression_manager(None, model_engine=None) is None


EXCLUDED = [
    ({"spec_config": object()}, "speculative decoding"),
    ({"draft": make_manager(FakeMainKVCacheManagerV2, 8, 8)}, "speculative decoding"),
    ({"config": {"max_attention_window": [64]}}, r"sliding window, got max_attention_window \[64\]"),
    ({"config": {"host_cache_size": 0}}, "KVCacheManagerV2 without a host tier"),
    ({"mapping": make_mapping(enable_attention_dp=True)}, "attention data parallelism"),
    ({"dtype": SimpleNamespace(name="NVFP4")}, "NVFP4"),
    ({"num_layers": 7}, "knows no model of this KV cache's geometry"),
    ({"disaggregated": True}, "disaggregated serving"),
    ({"rope_fusion": True}, "route framework excludes models whose attention kernels rotate keys, got 1 such layers"),
]


@pytest.mark.parametrize(("changes", "message"), EXCLUDED)
def test_what_sharing_excludes_stops_the_start_or_nothing_is_dropped(changes, message, served, caplog):
    with pytest.raises(UserError, match=message) as error:
        served(**changes)
    _, made, manager = served("warn", **changes)
    assert made.memshare is None
    assert not manager.kv_compression_manages_history
    assert f"requests run unshared: {error.value}" in caplog.text
    for hook in (made.prepare_resources, made.update_resources):
        hook(ScheduledRequests([], [FakeLlmRequest(1, [1])]))
    made.free_resources(FakeLlmRequest(1, [1]))
    made.shutdown()


def test_a_model_with_a_window_is_refused_and_one_with_any_rotation_served(served, model_config):
    model_config.pretrained_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert served()[1].memshare is not None
    model_config.pretrained_config.sliding_window = 512
    model_config.pretrained_config.use_sliding_window = True
    with pytest.raises(UserError, match="models with a sliding window, got one of 512 tokens"):
        served()


def test_requests_of_disaggregated_serving_are_left_whole_and_said_once(caplog):
    shrunk = set()

    def disaggregate(dropper, requests):
        requests[0].llm_request_type = "LLMREQUEST_TYPE_GENERATION_ONLY"
        drop = dropper._drop
        dropper._drop = lambda request, pages: (drop(request, pages), shrunk.add(request.py_request_id))

    executor = serve(3, True, prepare=disaggregate)
    assert shrunk
    assert executor.requests[0].py_request_id not in shrunk
    assert caplog.text.count("excludes disaggregated serving, got a request of type LLMREQUEST_TYPE_GEN") == 1


def test_metrics_are_those_of_the_other_route(tmp_path, caplog):
    caplog.set_level("INFO", logger="trtllm_memshare.pressure")
    seen = []

    def watch(dropper, requests):
        relieve = dropper._relieve
        dropper._relieve = lambda running: (relieve(running), seen.append(dropper.totals()))

    dropper = serve(3, True, stats_file=tmp_path / "totals.json", prepare=watch).dropper
    written = json.loads((tmp_path / "totals.json").read_text())
    assert written.keys() - {"iterations"} == NOTHING.keys()
    assert written["iterations"] >= 180
    assert written["blocks_forgotten"] == dropper.num_dropped == sum(written["retired_pages"].values())
    assert written["retired_pages"]["repeated"] == written["pauses"] == written["retired_now"] == 0
    assert written["pages_copied"] > 0
    assert written["pauses_avoided"] == 2  # of four requests of 24 pages in 60
    assert max(t["retired_now"] for t in seen) > 20
    assert max(t["bytes_saved_now"] for t in seen) == 256 * max(t["retired_now"] for t in seen)
    assert any(t["pressure_active"] for t in seen)
    events = [json.loads(r.message)["event"] for r in caplog.records if r.name == "trtllm_memshare.pressure"]
    assert events == ["pressure_begins", "pressure_ends"] * written["pressure_episodes"]


def test_suspended_requests_count_as_pauses_and_floors_are_seen():
    seen = []

    def watch(dropper, requests):
        relieve = dropper._relieve
        dropper._relieve = lambda running: (relieve(running), seen.append(dropper.totals()["requests_at_floor"]))

    executor = serve(3, True, min_kept=0.8, prepare=watch)
    assert 0 < executor.dropper.totals()["pauses"] <= executor.num_pauses
    assert max(seen) > 0


def test_a_base_class_without_a_hook_leaves_the_factory_as_it_was(release, monkeypatch, caplog):
    module = release("main V2")
    monkeypatch.delattr(FakeKVCacheCompressionManager, "on_request_finish")
    factory = module.create_kv_cache_compression_manager
    assert not install(module, make_settings(**SHORT, null_pages="unused", route="framework"), make_attention_module)
    assert module.create_kv_cache_compression_manager is factory
    assert "KVCacheCompressionManager has no on_request_finish (lets go of a request)" in caplog.text


def test_a_release_without_the_framework_has_this_route_not(release, caplog):
    assert not install(
        release("1.2"), make_settings(**SHORT, null_pages="unused", route="framework"), make_attention_module
    )
    assert "route framework needs KVCacheCompressionManager" in caplog.text
