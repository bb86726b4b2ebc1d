"""The table of TensorRT-LLM's names: the stand-ins have them, and an installation is held against them."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from trtllm_pytorch.fake_attention import (
    FakeAttentionMetadata,
    FakeOldAttentionMetadata,
    FakeTrtllmAttention,
    KVCacheParams,
)
from trtllm_pytorch.fake_executor import make_manager
from trtllm_pytorch.fake_framework import FakeKVCacheCompressionManager
from trtllm_pytorch.fake_package import write_fake_package
from trtllm_pytorch.fake_requests import FakeLlmRequest, FinishReason
from trtllm_pytorch.fake_util import make_util_module
from trtllm_pytorch.fake_v1 import (
    FakeKVCacheManager,
    FakeMainKVCacheManager,
    FakeOldKVCacheManager,
)
from trtllm_pytorch.fake_v2 import FakeMainKVCacheManagerV2

from trtllm_memshare.report import doctor
from trtllm_memshare.report.components import find_components
from trtllm_memshare.trtllm.pytorch.contracts import check_installed, differences
from trtllm_memshare.trtllm.pytorch.names import STATES, TABLE

V1 = {"1.1": FakeOldKVCacheManager, "1.2": FakeKVCacheManager, "main V1": FakeMainKVCacheManager}


def stand_in(owner: str, state: str, is_made: bool):
    """The stand-in of a class in a state of the sources, or an object of it; None where that state has none."""
    if owner == "":
        return make_util_module(state)
    if owner == "LlmRequest":
        return FakeLlmRequest(1, [1])
    if owner == "FinishReason":
        return FinishReason
    if owner == "KVCacheCompressionManager":
        return FakeKVCacheCompressionManager if state == "main V2" else None
    if owner == "TrtllmAttention":
        return FakeTrtllmAttention
    if owner == "TrtllmAttentionMetadata":
        cls = FakeOldAttentionMetadata if state == "1.1" else FakeAttentionMetadata
        return engine_sets(cls(make_manager(V1.get(state, FakeMainKVCacheManagerV2), 8, 8))) if is_made else cls
    manager = V1.get(state) if owner in ("KVCacheManager", "impl") else None
    if owner == "KVCacheManagerV2" and state == "main V2":
        manager = FakeMainKVCacheManagerV2
    if manager is None or not is_made:
        return manager
    made = make_manager(manager, 8, 8)
    return made.impl if owner == "impl" else made


def engine_sets(metadata):
    """What the model engine sets before each ``prepare``."""
    metadata.request_ids = metadata.prompt_lens = []
    metadata.kv_cache_params = KVCacheParams(True, [])
    return metadata


@pytest.mark.parametrize("state", STATES)
def test_each_name_is_in_the_stand_in_of_each_state_that_has_it_and_in_no_other(state):
    for name in TABLE:
        target = stand_in(name.owner, state, name.on_instance)
        if state in name.states:
            assert list(differences(target, [name])) == [], name
        elif target is not None and name.owner == "KVCacheManager":
            assert not hasattr(target, name.name), (state, name)


def test_the_old_metadata_has_its_table_on_the_instance_only():
    assert not hasattr(FakeOldAttentionMetadata, "kv_cache_block_offsets")


def modules(release: str, **changes):
    """What importing TensorRT-LLM's modules of a release gives."""
    util = make_util_module(release)
    resources = SimpleNamespace(KVCacheManager=util.KVCacheManager, **changes)
    found = {
        "tensorrt_llm._torch.pyexecutor._util": util,
        "tensorrt_llm._torch.pyexecutor.resource_manager": resources,
        "tensorrt_llm._torch.pyexecutor.llm_request": SimpleNamespace(LlmRequest=FakeLlmRequest),
        "tensorrt_llm.bindings.executor": SimpleNamespace(FinishReason=FinishReason),
        "tensorrt_llm._torch.attention_backend.trtllm": SimpleNamespace(
            TrtllmAttentionMetadata=FakeOldAttentionMetadata, TrtllmAttention=FakeTrtllmAttention
        ),
    }
    if release.startswith("main"):
        found["tensorrt_llm._torch.pyexecutor.kv_cache.kv_cache_manager_v2"] = util

    def load(name: str):
        if name not in found:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found[name]

    return load


@pytest.mark.parametrize("release", ["1.1", "1.2", "main V1", "main V2"])
def test_an_installation_of_each_release_lacks_nothing(release):
    installed = check_installed(modules(release))
    assert installed.missing == installed.cannot_skip == []
    assert installed.found["KVCacheManager"] == "tensorrt_llm._torch.pyexecutor.resource_manager"
    assert ("KVCacheManagerV2" in installed.found) == installed.has_framework == release.startswith("main")


def test_what_an_installation_lacks_is_named():
    class Renamed(FakeKVCacheManager):
        get_batch_cache_indices = property()

        def free_resources(self, req):
            pass

    load = modules("1.2")
    load("tensorrt_llm._torch.pyexecutor.resource_manager").KVCacheManager = Renamed
    missing = check_installed(load).missing
    assert "Renamed.free_resources takes no request (lets go of a request)" in missing
    assert (
        check_installed(lambda name: 1 / 0).missing[0].startswith("tensorrt_llm._torch.pyexecutor._util: ZeroDivision")
    )


@pytest.mark.parametrize("release", ["1.1", "1.2"])
def test_what_skipping_alone_needs_is_missed_by_nothing_else(release):
    load = modules(release)
    module = load("tensorrt_llm._torch.attention_backend.trtllm")
    del module.TrtllmAttention
    installed = check_installed(load)
    assert installed.missing == []
    assert "tensorrt_llm._torch.attention_backend.trtllm has no TrtllmAttention" in installed.cannot_skip[0]
    del module.TrtllmAttentionMetadata
    installed = check_installed(load)
    assert (len(installed.missing), len(installed.cannot_skip)) == ((1, 1) if release == "1.1" else (0, 2))


def test_hooks_and_reasons_that_are_missing_are_named(monkeypatch):
    load = modules("main V2")
    monkeypatch.delattr(FakeKVCacheCompressionManager, "on_generation_step_end")
    del load("tensorrt_llm._torch.pyexecutor._util").create_kv_cache_compression_manager
    load("tensorrt_llm.bindings.executor").FinishReason = SimpleNamespace(__name__="FinishReason", LENGTH=3)
    assert check_installed(load).missing == [
        "FinishReason has no CANCELLED (ends a request alone)",
        "FakeKVCacheCompressionManager has no on_generation_step_end (when to drop)",
        "tensorrt_llm._torch.pyexecutor._util has no create_kv_cache_compression_manager (makes the method)",
    ]


def test_doctor_prints_what_an_installation_lacks_and_starts_no_server(tmp_path, monkeypatch):
    """The fake package has V1 alone, and no module of requests."""
    write_fake_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        components = [replace(c, found=True) for c in find_components(tmp_path / "none.so")]
        diagnosis = next(d for d in doctor.diagnose(components) if d.surface.name == "pytorch")
        text = doctor.describe(components, [diagnosis])
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]
    assert (
        "pytorch  TensorRT-LLM's PyTorch backend: lacks tensorrt_llm._torch.pyexecutor.resource_manager: Module" in text
    )
    assert "take a release that docs/pytorch_backend.md lists" in text
    assert "tensorrt_llm.bindings.executor: ModuleNotFoundError" in text
    assert "no KVCacheCompressionManager, so route framework cannot be taken (it comes with 1.4" in text
