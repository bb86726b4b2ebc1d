"""Engines, plugins and machines that do not fit: each refused with one sentence that says what to change."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fakes.fake_tensorrt as fake_module
import pytest
import torch
from engine.test_engine_dir import edit_json
from fakes import fake_tensorrt_llm
from fakes.fake_tensorrt import FakeEngine, FakeTensorRT, write_engine
from fakes.host_device import HostDevice
from trtllm_engine.conftest import SIZES, write_engine_dir

import trtllm_memshare.runners.tensorrt.open as open_module
from trtllm_memshare.engine.tensorrt_record import PLUGIN_FILE
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine, replace_memshare
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.trtllm.engine.installed import check_tensorrt, import_tensorrt, import_tensorrt_llm
from trtllm_memshare.trtllm.engine.plugins import load_memshare_plugin, load_trtllm_plugins


@pytest.fixture
def folder(tmp_path, bundled_model) -> Path:
    return write_engine_dir(tmp_path / "engine", bundled_model)


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        open_runner(load_engine(folder), 40)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build_config__max_beam_width": 4}, r"has max_beam_width 4, expected 1 \(.*build with --max_beam_width 1\)"),
        ({"build_config__max_draft_len": 3}, r"has max_draft_len 3 and mode None, expected no speculative decoding"),
        ({"build_config__speculative_decoding_mode": 4}, r"mode 4, expected no speculative decoding"),
        ({"pretrained_config__sliding_window": 256}, r"attention window of \[256\] tokens, expected max_seq_len 1024"),
        (
            {"pretrained_config__runtime_defaults": {"max_attention_window": [4096, 512]}},
            r"attention window of \[512\]",
        ),
        ({"build_config__plugin_config__streamingllm": True}, r"has streamingllm, .* without --streamingllm"),
        ({"build_config__enable_block_reuse": True}, r"enable_block_reuse on, expected KV-cache reuse off .* to false"),
        ({"kv_cache_config": {"enable_block_reuse": True}}, r"enable_block_reuse on, expected KV-cache reuse off"),
        ({"build_config__kv_cache_type": "CONTINUOUS"}, r"kv_cache_type CONTINUOUS, expected PAGED"),
        ({"build_config__plugin_config__remove_input_padding": False}, r"remove_input_padding off, expected packed"),
        ({"build_config__plugin_config__use_paged_context_fmha": False}, r"use_paged_context_fmha off, .* in chunks"),
        ({"build_config__gather_context_logits": True}, r"gather_context_logits on, expected logits of last tokens"),
        ({"version": "1.1.0"}, r"has version '1.1.0', expected '1.2.1'"),
        ({"pretrained_config__num_hidden_layers": 6}, r"num_hidden_layers is 6, expected 4 for the model"),
        ({"pretrained_config__dtype": "fp4"}, r"has dtype 'fp4', expected one of float32, float16, bfloat16"),
        (
            {"pretrained_config__quantization__kv_cache_quant_algo": "NVFP4"},
            r"kv_cache_quant_algo 'NVFP4', expected none",
        ),
        # Damaged files.
        ({"pretrained_config__sliding_window": "many"}, r"an attention window 'many', expected tokens"),
        ({"pretrained_config__dtype": ["float16"]}, r"has dtype \['float16'\], expected one of float32"),
        ({"pretrained_config__quantization__kv_cache_quant_algo": ["FP8"]}, r"algo \['FP8'\], expected none"),
        ({"pretrained_config__quantization": "FP8"}, r"kv_cache_quant_algo 'FP8', expected none"),
    ],
)
def test_engines_that_sharing_cannot_work_with(folder, fake_tensorrt, changes, message):
    edit_json(folder / "config.json", **changes)
    refused(folder, message)


def test_a_window_as_long_as_the_sequences_is_none(folder, fake_tensorrt):
    edit_json(folder / "config.json", pretrained_config__sliding_window=4096)
    assert open_runner(load_engine(folder), 40).num_blocks == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tensorrt__tensorrt_version": "10.13.3.9"},
            r"built by TensorRT 10.13.3.9, got TensorRT 10.14.1.48 \(install",
        ),
        (
            {"tensorrt__compute_capability": "8.9"},
            r"compute capability 8.9, got a GPU of 9.0 \(run it on such a GPU, or",
        ),
        (
            {"tensorrt__plugin_sha256": "0" * 64},
            r"of another build than the engine: SHA-256 \w{12}\.\.\., expected 0000",
        ),
        ({"tensorrt__search_engine": "inside"}, r"memshare.json: tensorrt: search_engine .*got 'inside'"),
        ({"tensorrt__plugin": 1}, r"tensorrt has an unknown key plugin \(did you mean plugin_sha256\?\)"),
        ({"tensorrt": ...}, r"memshare.json lacks tensorrt"),
        ({"format_version": 3}, r"format_version 3, expected 1"),
        ({"torch": {}}, r"unknown key torch"),
    ],
)
def test_records_of_another_machine_or_build(folder, fake_tensorrt, changes, message):
    edit_json(folder / "memshare.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("search_engine", "settings", "message"),
    [
        ("none", {}, r"has preset aligned, which compares blocks, got an engine that was built without a search"),
        ("embedded", {"max_pairs": 65}, r"has max_pairs 65, expected at most 64, for which the engine was built"),
    ],
)
def test_a_search_that_the_engine_was_not_built_for(tmp_path, bundled_model, search_engine, settings, message):
    """It ended the executor in the middle of its requests."""
    folder = write_engine_dir(tmp_path / "engine", bundled_model, search_engine)
    before = (folder / "memshare.json").read_text()
    with pytest.raises(UserError, match=message):
        replace_memshare(folder, make_config("aligned", **settings))
    assert (folder / "memshare.json").read_text() == before
    edit_json(folder / "memshare.json", memshare=make_config("aligned", **settings).model_dump())
    with pytest.raises(UserError, match=message):
        load_engine(folder)
    edit_json(folder / "memshare.json", memshare=make_config("lexical").model_dump())  # it compares nothing
    assert load_engine(folder).memshare.preset == "lexical"


def test_a_missing_or_other_plugin_library(folder, fake_tensorrt):
    (folder / PLUGIN_FILE).write_bytes(b"another build")
    refused(folder, r"is of another build than the engine: .* \(put the engine's own library there, or build it again")
    (folder / PLUGIN_FILE).unlink()
    refused(
        folder, r"the plugin library of the engine is missing, expected .*libtrtllm_memshare_plugin.so \(copy it back"
    )


def test_a_library_that_does_not_load_and_a_second_one(tmp_path, fake_tensorrt, monkeypatch):
    first, second = tmp_path / "a.so", tmp_path / "b.so"
    first.write_bytes(b"one build")
    second.write_bytes(b"another build")
    load_memshare_plugin(fake_tensorrt, first)
    load_memshare_plugin(fake_tensorrt, first)
    with pytest.raises(
        UserError, match=r"another build .* loaded already, .* \(run each engine in a process of its own"
    ):
        load_memshare_plugin(fake_tensorrt, second)
    other = FakeTensorRT(HostDevice())
    monkeypatch.setattr(other.registry, "load_library", lambda _: None)
    with pytest.raises(
        UserError, match=r"TensorRT could not load the plugin library .*build_plugins.py against the head"
    ):
        load_memshare_plugin(other, first)


@pytest.mark.parametrize("num_blocks", [0, 2**31])
def test_a_pool_that_no_table_addresses(folder, fake_tensorrt, num_blocks):
    with pytest.raises(UserError, match=rf"the KV pool must have between 1 and .*, got {num_blocks} \(set --kv-cache"):
        open_runner(load_engine(folder), num_blocks)


@pytest.mark.parametrize("search_engine", ["embedded", "separate"])
def test_a_pool_that_leaves_no_room_for_a_context(tmp_path, bundled_model, fake_tensorrt, monkeypatch, search_engine):
    """TensorRT gives None in place of a context where memory is short."""
    folder = write_engine_dir(tmp_path / "short", bundled_model, search_engine)
    made = FakeEngine.create_execution_context
    kind = "search" if search_engine == "separate" else "decoder"
    monkeypatch.setattr(FakeEngine, "create_execution_context", lambda e: None if e.plan["kind"] == kind else made(e))
    with pytest.raises(UserError, match=r"a KV pool of 40 blocks needs .* which the GPU does not have \(give fewer"):
        open_runner(load_engine(folder), 40)


def test_a_pool_takes_no_more_than_its_share_of_the_memory_that_the_plan_leaves(folder, fake_tensorrt, monkeypatch):
    engine = load_engine(folder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * engine.bytes_per_block, 1 << 40))
    assert open_runner(engine, 40, free_memory_share=0.5).num_blocks == 30
    assert open_runner(engine, 20, free_memory_share=0.5).num_blocks == 20
    monkeypatch.setattr(FakeEngine, "create_execution_context", lambda engine: None)
    with pytest.raises(UserError, match="a KV pool of 30 blocks needs"):
        open_runner(engine, 40, free_memory_share=0.5)


def test_an_engine_without_the_plugin(folder, bundled_model, fake_tensorrt):
    write_engine(folder / "rank0.engine", bundled_model, max_pairs=0, **SIZES)
    refused(
        folder, r"built without the plugin MemShareBlockSearch: it lacks memshare_pool_pointers \(build it with --mem"
    )


def test_plans_that_are_not_what_the_files_say(folder, bundled_model, fake_tensorrt):
    write_engine(folder / "rank0.engine", bundled_model, max_pairs=64, **{**SIZES, "max_batch_size": 4})
    refused(folder, r"takes at most \[4\], expected \[8\] from config.json")
    (folder / "rank0.engine").write_bytes(b"no plan")
    refused(folder, r"TensorRT could not load .*rank0.engine; its log says why \(build it again")
    (folder / "rank0.engine").unlink()
    refused(folder, r"is missing rank0.engine")


def test_tensors_of_another_name_or_type(folder, fake_tensorrt, monkeypatch):
    tensors = fake_module.engine_tensors

    def changed(change):
        def make(plan, decoder):
            table = tensors(plan, decoder)
            change(table)
            return table

        monkeypatch.setattr(fake_module, "engine_tensors", make)

    changed(lambda t: t.update(lora_ranks=("int32", ("B",), "host", False)))
    refused(folder, r"inputs and outputs of TensorRT-LLM 1.2.1, got none named \[\] and unknown ones \['lora_ranks'\]")
    changed(lambda t: t.update(position_ids=("int64", ("T",), "device", False)))
    refused(folder, r"position_ids is an input of int64, expected an input of int32")
    changed(lambda t: t.pop("host_sink_token_length"))
    refused(folder, r"got none named \['host_sink_token_length'\]")


def test_more_pairs_than_the_search_was_built_for(folder, bundled_model, fake_tensorrt, boundaries, prompts):
    plain = write_engine_dir(folder.parent / "plain", bundled_model, "none")
    executor = Executor(
        open_runner(load_engine(plain), 200), make_config("aligned", protected_tokens=16), boundaries, 1024, 8
    )
    executor.submit(prompts[0], SamplingParams(300))
    with pytest.raises(
        UserError, match=r"search compares none, got \d+ pairs \(build it with --memshare and max_pairs"
    ):
        executor.run_until_idle()


class Broken:
    """A wheel of bindings whose library is not there."""

    def find_spec(self, name, path, target=None):
        if name == "tensorrt":
            raise FileNotFoundError("libnvinfer.so.10: cannot open shared object file")


def test_without_a_gpu_tensorrt_or_tensorrt_llm(folder, monkeypatch, fake_tensorrt):
    with pytest.raises(UserError, match=r"runs on cuda, got --device cpu \(leave out --device\)"):
        open_runner(load_engine(folder), 40, device="cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(UserError, match=r"needs TensorRT 10.14, got .*tensorrt.* \(pip install tensorrt_llm==1.2.1"):
        import_tensorrt()
    with pytest.raises(UserError, match=r"TensorRT-LLM 1.2.1 is needed, got .* \(pip install tensorrt_llm==1.2.1"):
        import_tensorrt_llm()
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"needs TensorRT 10.14, got libnvinfer.so.10: cannot open"):
        import_tensorrt()
    with pytest.raises(UserError, match=r"TensorRT must be 10.14, got 11.1.0 \(pip install 'tensorrt~=10.14.1'"):
        check_tensorrt(FakeTensorRT(HostDevice(), "11.1.0"))


def test_tensorrt_llm_of_another_version_or_without_its_plugins(fake_tensorrt, monkeypatch):
    fake_tensorrt_llm.install(monkeypatch, fake_tensorrt)
    fake_tensorrt.registry.has_attention = False
    with pytest.raises(UserError, match=r"did not register GPTAttention, expected it on import \(unset TRT_LLM_NO_LIB"):
        load_trtllm_plugins(fake_tensorrt)
    monkeypatch.setattr(sys.modules["tensorrt_llm"], "__version__", "1.3.0")
    with pytest.raises(UserError, match=r"must be 1.2.1, the last series with an engine backend, got 1.3.0"):
        load_trtllm_plugins(fake_tensorrt)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu_is_said(tmp_path):
    with pytest.raises(UserError, match=r"needs a CUDA GPU, got none \(run it on one, or build for --backend torch\)"):
        open_module._open_device(tmp_path)


def test_a_damaged_memshare_json(folder):
    (folder / "memshare.json").write_text(json.dumps({"backend": "tensorrt", "format_version": 1}))
    with pytest.raises(
        UserError, match=r"memshare.json lacks memshare \(the engine directory is damaged: build it again"
    ):
        load_engine(folder)
