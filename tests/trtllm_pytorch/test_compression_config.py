"""TensorRT-LLM's arguments take our algorithm where they refused it, and everything else is as it was."""

from __future__ import annotations

import json
import pickle
import sys
from types import ModuleType

import pytest
from pydantic import ValidationError
from trtllm_pytorch.fake_llm_args import FORMS, make_llm_args
from trtllm_pytorch.fake_package import write_fake_package
from trtllm_pytorch.test_parts import run_python

from trtllm_memshare.trtllm.pytorch.compression_config import ALGORITHM, allow_algorithm

OURS = {"algorithm": ALGORITHM}


@pytest.fixture(params=FORMS)
def llm_args(request, monkeypatch):
    """The module, where pickle finds its classes, with our algorithm allowed."""
    module = make_llm_args(request.param)
    for name in ("tensorrt_llm", "tensorrt_llm.llmapi"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert allow_algorithm(module)
    module.form = request.param
    return module


def test_main_refuses_an_algorithm_that_it_does_not_know_and_an_early_release_says_that_lengths_stay():
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        make_llm_args("refuses others").TorchLlmArgs(model="m", kv_cache_compression_config=OURS)
    early = make_llm_args("accepts others").TorchLlmArgs(model="m", kv_cache_compression_config=OURS)
    assert not early.kv_cache_compression_config.changes_physical_kv_length


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["BaseLlmArgs", "TorchLlmArgs", "a class that comes later"])
def test_ours_is_taken_says_that_lengths_change_and_survives_what_is_done_to_arguments(name, llm_args):
    arguments_class = getattr(llm_args, name, None) or type("Later", (llm_args.TorchLlmArgs,), {})
    arguments = arguments_class(model="m", kv_cache_compression_config=OURS)
    config = arguments.kv_cache_compression_config
    assert type(config) is llm_args.MemShareKvCacheCompressionConfig
    assert config.changes_physical_kv_length
    assert not config.supports_block_reuse()
    assert not config.supports_speculative_decoding()
    assert arguments.model_dump()["kv_cache_compression_config"] == OURS
    assert arguments_class.model_validate(arguments.model_dump()) == arguments
    assert arguments_class(model="m", kv_cache_compression_config=config) == arguments
    if name == "TorchLlmArgs":
        assert pickle.loads(pickle.dumps(arguments)) == arguments
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        arguments_class(model="m", kv_cache_compression_config={**OURS, "budget": 3})


@pytest.mark.filterwarnings("error")
def test_others_are_taken_and_refused_as_before(llm_args):
    def parsed(value):
        return llm_args.TorchLlmArgs(model="m", kv_cache_compression_config=value).kv_cache_compression_config

    assert parsed(None) is None
    theirs = parsed({"algorithm": "triattention", "budget": 3})
    assert type(theirs) is llm_args.TriAttentionKvCacheCompressionConfig
    assert theirs.model_dump() == {"algorithm": "triattention", "budget": 3}
    if llm_args.form == "refuses others":
        with pytest.raises(ValidationError, match="triattention"):
            parsed({"algorithm": "future_method"})
    else:
        assert type(parsed({"algorithm": "future_method"})) is llm_args.KvCacheCompressionConfig


def test_a_release_without_the_framework_is_left_as_it_is():
    module = make_llm_args("refuses others")
    del module.KvCacheCompressionConfig
    before = dict(vars(module))
    assert not allow_algorithm(module)
    assert vars(module) == before


def test_a_failure_does_not_end_the_import(caplog):
    module = make_llm_args("refuses others")
    module.KvCacheCompressionConfig = object
    assert not allow_algorithm(module)
    assert "route framework cannot be configured: " in caplog.text


@pytest.mark.parametrize("route", ["framework", "overlay"])
def test_in_every_process_once_the_settings_choose_the_route(route, tmp_path):
    write_fake_package(tmp_path)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"preset": "pressure", "null_pages": "unused", "route": route}))
    code = """
        from pydantic import ValidationError
        from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
        try:
            print(type(TorchLlmArgs(kv_cache_compression_config={"algorithm": "memshare"}).kv_cache_compression_config))
        except ValidationError:
            print("refused")
        """
    done = run_python(tmp_path, code, TRTLLM_MEMSHARE_ENABLE="1", TRTLLM_MEMSHARE_CONFIG=str(settings))
    expected = "tensorrt_llm.llmapi.llm_args.MemShareKvCacheCompressionConfig" if route == "framework" else "refused"
    assert expected in done.stdout, done.stderr
