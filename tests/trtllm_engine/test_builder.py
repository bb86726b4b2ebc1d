"""Engines built by the stand-in for TensorRT-LLM: what goes into the graph, what is written, and that it runs."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_random_checkpoint
from fakes import fake_tensorrt_llm
from fakes.fake_network import LayerType
from run_script import run_script

import trtllm_memshare.trtllm.engine.builder as builder_module
from trtllm_memshare.__main__ import main
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, describe_plan, plan_build
from trtllm_memshare.builder.summary import summarize
from trtllm_memshare.engine.tensorrt_record import file_sha256
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.trtllm.engine.build_plan import describe
from trtllm_memshare.trtllm.engine.builder import make_build_config
from trtllm_memshare.trtllm.engine.directory import spec_of
from trtllm_memshare.trtllm.engine.io_table import DISTANCES
from trtllm_memshare.trtllm.engine.signatures import BUILDER, PARALLEL, check_signatures

ROOT = Path(__file__).parents[2]


def serve(runner, boundaries, prompts):
    config = make_config("aligned", protected_tokens=16, protected_steps=0)
    executor = Executor(runner, config, boundaries, 1024, 8, 64)
    handles = [executor.submit(p, SamplingParams(230, stop_token_ids=(1,))) for p in prompts]
    executor.run_until_idle()
    return [h.result(0).token_ids for h in handles], executor.manager.stats().shared


@pytest.mark.parametrize("search_engine", [None, "separate"])
def test_a_built_engine_runs_and_shares_as_the_torch_runner_does(
    trtllm, plan, bundled_model, boundaries, prompts, search_engine
):
    engine = build_engine(plan(search_engine=search_engine))
    assert engine == load_engine(engine.engine_dir)
    got = serve(open_runner(engine, 200), boundaries, prompts[:3])
    torch_runner = TorchRunner(load_model(bundled_model), 200, 16, torch.float16, fold_aliases=False)
    assert got == serve(torch_runner, boundaries, prompts[:3])
    assert got[1] > 0


def test_the_search_waits_for_every_layer_and_has_the_described_tensors(trtllm, plan):
    planned = plan()
    build_engine(planned)
    (engine,) = fake_tensorrt_llm.built
    search = engine.network.search
    attention = [layer for layer in engine.network.layers if layer.type is LayerType.PLUGIN_V2]
    assert len(attention) == 4
    assert all(layer in search.ancestors() for layer in attention)
    described = describe(planned.tensorrt)["ranks"][0]
    assert [i.name for i in search.inputs[1:]] == [t.partition(":")[0] for t in described["extra_inputs"]]
    for text in described["extra_inputs"]:
        name, _, rest = text.partition(": ")
        shape = [-1 if d == "pairs" else int(d) for d in rest[rest.index("[") + 1 : rest.index("]")].split(", ")]
        assert engine.network.inputs[name].shape == tuple(shape)
    assert search.plugin.fields == described["plugin_fields"]
    assert set(engine.network.outputs) == {"logits", DISTANCES}


def test_the_dry_run_prints_what_the_builder_is_given(trtllm, plan, tmp_path):
    planned = plan(build={"tokens_per_block": 32})
    printed = json.loads(describe_plan(planned))["tensorrt"]["build_config"]
    config = make_build_config(planned.tensorrt, tmp_path)
    plugins = printed.pop("plugin_config")
    assert plugins["paged_kv_cache"]  # what the build takes kv_cache_type PAGED from
    assert {k: getattr(config, k) for k in printed} == printed
    assert {k: getattr(config.plugin_config, k) for k in plugins} == plugins


def test_the_dry_run_needs_no_tensorrt_llm(bundled_model, tmp_path):
    assert "tensorrt_llm" not in sys.modules
    options = ["--memshare", "--backend", "tensorrt", "--dry-run", "--tp-size", "2", "--pp-size", "2"]
    script = ROOT / "build_scripts" / "build_engine.py"
    done = run_script(script, *options, "--output-dir", str(tmp_path / "engine"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend: tensorrt (asked for)\n")
    document = json.loads(done.stdout.partition("\n")[2])
    assert any("runs with: this project's executor" in line for line in document["summary"])
    ranks = document["tensorrt"]["ranks"]
    assert [r["file"] for r in ranks] == [f"rank{i}.engine" for i in range(4)]
    assert ranks[0]["plugin_fields"]["num_layers"] == 2  # of 4, on 2 stages
    assert ranks[0]["plugin_fields"]["num_kv_heads"] == 1  # of 2, on 2 ranks
    assert any(t.startswith("hidden_states_output") for t in ranks[1]["outputs"])
    assert any(t.startswith("hidden_states_input") for t in ranks[2]["inputs"])
    assert any(t.startswith("logits") for t in ranks[3]["outputs"])
    assert not list(tmp_path.iterdir())


def test_what_is_written_beside_the_engines(trtllm, plan):
    planned = plan()
    engine = build_engine(planned)
    names = {p.name for p in engine.engine_dir.iterdir()}
    assert names == {"config.json", "memshare.json", "rank0.engine", "libtrtllm_memshare_plugin.so", "model"}
    assert engine.record.plugin_sha256 == file_sha256(planned.tensorrt.plugin_library)
    assert (engine.record.tensorrt_version, engine.record.compute_capability) == ("10.14.1.48", "9.0")
    assert not (engine.engine_dir / "model" / "model.safetensors").exists()
    assert engine.kv_dtype == "float16"
    assert engine.bytes_per_block == 4 * 2 * 2 * 16 * 32 * 2
    assert "know neither its extra inputs" in summarize(engine)


def test_ranks_of_two_stages_and_two_halves(trtllm, plan):
    engine = build_engine(plan(build={"tp_size": 2, "pp_size": 2}))
    assert [e.config["pretrained_config"]["mapping"]["rank"] for e in fake_tensorrt_llm.built] == [0, 1, 2, 3]
    for built, rank in zip(fake_tensorrt_llm.built, range(4), strict=True):
        spec = spec_of(engine, rank)
        assert built.network.search.plugin.fields["num_layers"] == spec.num_layers == 2
        assert built.network.search.plugin.fields["num_kv_heads"] == spec.num_kv_heads == 1
        last = "logits" if spec.is_last_pp_rank else "hidden_states_output"
        assert set(built.network.outputs) == {last, DISTANCES}


def test_fp8_weights_and_cache_go_through_a_calibrated_checkpoint(trtllm, plan):
    planned = plan(build={"quantization": "fp8", "kv_cache_dtype": "fp8"})
    engine = build_engine(planned)
    (built,) = fake_tensorrt_llm.built
    assert built.network.search.plugin.fields["kv_dtype"] == 3  # KvDtype of fp8 e4m3
    assert built.config["build_config"]["plugin_config"]["use_fp8_context_fmha"] is True
    assert (engine.kv_dtype, spec_of(engine).kv_dtype) == ("fp8", "float8_e4m3fn")
    assert engine.bytes_per_block == 4 * 2 * 2 * 16 * 32
    assert spec_of(engine).logits_dtype == planned.tensorrt.spec(0).logits_dtype == "float16"  # as ModelOpt writes it
    assert open_runner(engine, 40).num_blocks == 40


def test_null_pages_come_before_the_engines_and_are_for_their_cache(trtllm, plan, monkeypatch):
    def calibrated(folder, model_dir, max_seq_len, kv_dtype, memshare, skips_entries):
        asked.append((max_seq_len, kv_dtype, len(fake_tensorrt_llm.built)))

    asked = []
    monkeypatch.setattr(builder_module, "add_null_pages", calibrated)
    build_engine(plan(preset="pressure", build={"quantization": "fp8", "kv_cache_dtype": "fp8"}))
    build_engine(plan(preset="pressure", force=True))
    assert asked == [(1024, "fp8", 0), (1024, "float16", 1)]


def test_a_build_leaves_nothing_where_the_command_runs(trtllm, plan, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    build_engine(plan())
    assert not list(here.iterdir())


def test_without_a_search_the_engine_is_tensorrt_llm_s_own(trtllm, plan):
    for options in ({"memshare": False}, {"preset": "lexical"}):
        engine = build_engine(plan(**options, force=True))
        assert engine.record.search_engine == "none"
        assert fake_tensorrt_llm.built[-1].network.search is None


def test_an_unknown_layer_type_would_stop_the_build(trtllm, plan, monkeypatch):
    """The trap that ``allow_plugin_v3_layers`` is for; and nothing is left when a build fails."""
    monkeypatch.setattr(builder_module, "allow_plugin_v3_layers", lambda: None)
    planned = plan()
    with pytest.raises(UserError, match="NotImplementedError: Unknown layer type"):
        build_engine(planned)
    assert not planned.engine.engine_dir.exists()


def test_signatures_of_the_stand_in_are_the_recorded_ones(trtllm):
    check_signatures(BUILDER)
    check_signatures(PARALLEL)


def test_the_doctor_compares_every_signature(trtllm, monkeypatch, capsys):
    main(["doctor", "--signatures"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len({(e.module, e.name) for e in (*BUILDER, *PARALLEL)})
    assert all(line.startswith("ok  tensorrt_llm.") for line in lines)
    monkeypatch.setattr(sys.modules["tensorrt_llm.builder"], "build", with_one_more)
    monkeypatch.setattr(sys.modules["tensorrt_llm.mapping"], "Mapping", without_pp_size)
    with pytest.raises(SystemExit):
        main(["doctor", "--signatures", "--strict", "--surface", "torch"])
    differing = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--  ")]
    assert [line.split()[1] for line in differing] == [
        "tensorrt_llm.builder.build",
        "tensorrt_llm.mapping.Mapping",
        "tensorrt_llm.mapping.Mapping.pp_layers",  # gone with the class
    ]


def without_pp_size(world_size=1, rank=0, *, tp_size=1):
    pass


def with_one_more(model, build_config, device):
    pass


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        ("builder", "build", with_one_more, r"tensorrt_llm.builder.build .* which demands device"),
        ("builder", "build", None, r"tensorrt_llm.builder.build .* something without a signature"),
        (
            "mapping",
            "Mapping",
            without_pp_size,
            r"tensorrt_llm.mapping.Mapping .* without pp_size \(install tensorrt_llm",
        ),
        ("models", "MODEL_MAP", {"LlamaForCausalLM": 1}, r"tensorrt_llm.models.MODEL_MAP .* no Qwen2ForCausalLM in it"),
    ],
)
def test_another_signature_is_named_and_refused(trtllm, plan, monkeypatch, module, name, value, message):
    monkeypatch.setattr(sys.modules[f"tensorrt_llm.{module}"], name, value)
    with pytest.raises(UserError, match=message):
        build_engine(plan())
    monkeypatch.delattr(sys.modules[f"tensorrt_llm.{module}"], name)
    with pytest.raises(UserError, match=rf"tensorrt_llm.{module}.{name} .* got nothing of that name"):
        build_engine(plan())
    assert fake_tensorrt_llm.built == []


def test_model_classes_for_trtllm_build(trtllm, plan, monkeypatch, tmp_path):
    """Loaded the way ``trtllm-build --model_cls_file`` does it."""
    from importlib.machinery import SourceFileLoader

    monkeypatch.setenv("TRTLLM_MEMSHARE_PLUGIN", str(plan().tensorrt.plugin_library))
    path = ROOT / "trtllm_memshare" / "trtllm" / "engine" / "model_cls.py"
    for pairs in ("many", "0", "4097"):
        monkeypatch.setenv("TRTLLM_MEMSHARE_MAX_PAIRS", pairs)
        with pytest.raises(UserError, match=rf"TRTLLM_MEMSHARE_MAX_PAIRS must be from 1 to 4096, got {pairs}"):
            SourceFileLoader("models", str(path)).load_module()
    monkeypatch.setenv("TRTLLM_MEMSHARE_MAX_PAIRS", "32")
    module = SourceFileLoader("models", str(path)).load_module()
    for name, base in (
        ("MemShareQWenForCausalLM", "QWenForCausalLM"),
        ("MemShareLLaMAForCausalLM", "LLaMAForCausalLM"),
    ):
        model_class = getattr(module, name)
        assert model_class.__name__ == name
        assert issubclass(model_class, getattr(fake_tensorrt_llm, base))
        model = model_class.from_hugging_face(str(plan().tensorrt.checkpoint.model_dir), "float16",
                                              fake_tensorrt_llm.Mapping(), fake_tensorrt_llm.QuantConfig())  # fmt: skip
        engine = fake_tensorrt_llm.build(model, make_build_config(plan().tensorrt, tmp_path))
        assert json.loads(engine.engine)["max_pairs"] == 32


def test_a_converter_that_makes_its_own_class_is_noticed(trtllm, plan, monkeypatch):
    """As TensorRT-LLM's Qwen does when its unified converter is switched off."""
    own = fake_tensorrt_llm.QWenForCausalLM
    stock = own.from_hugging_face.__func__
    monkeypatch.setattr(
        own,
        "from_hugging_face",
        classmethod(functools.wraps(stock)(lambda cls, *args, **kw: stock(own, *args, **kw))),
    )
    with pytest.raises(UserError, match=r"made a QWenForCausalLM without the search.*TRTLLM_DISABLE_UNIFIED_CONVERTER"):
        build_engine(plan())


@pytest.mark.parametrize("error", [AssertionError("Engine building failed"), RuntimeError("not supported on SM>=100")])
def test_what_tensorrt_llm_raises_becomes_one_sentence(trtllm, plan, monkeypatch, error):
    def fails(*_, **__):
        raise error

    stock = sys.modules["tensorrt_llm.builder"].build
    monkeypatch.setattr(sys.modules["tensorrt_llm.builder"], "build", functools.wraps(stock)(fails))
    with pytest.raises(UserError, match=f"built no engine for rank 0: {type(error).__name__}: {error}"):
        build_engine(plan())


def test_a_disk_or_a_network_that_tensorrt_llm_wants(trtllm, plan, monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("cnn_dailymail cannot be reached")

    monkeypatch.setattr(builder_module, "_load_model", fails)
    text = r"for rank 0: cnn_dailymail cannot be reached \(it writes its own files{}: see that it can\)"
    with pytest.raises(UserError, match=text.format(" and downloads text to calibrate fp8 with")):
        build_engine(plan(build={"quantization": "fp8"}))
    with pytest.raises(UserError, match=text.format("")):
        build_engine(plan())


@pytest.mark.parametrize(
    ("options", "build", "message"),
    [
        ({"search_engine": "separate", "memshare": False}, {}, r"for presets that compare blocks, got no --memshare"),
        ({"search_engine": "separate", "preset": "pressure"}, {}, r"compare blocks, got preset pressure \(take"),
        ({"search_engine": "separate", "preset": "lexical"}, {}, r"compare blocks, got preset lexical"),
        (
            {"preset": "drop-duplicate"},
            {},
            r"got preset drop-duplicate, which counts aliases once, which",
        ),
        ({"settings": {"preset": "pressure", "retired_becomes": "dropped"}}, {}, r"got retired_becomes dropped which"),
        ({"settings": {"control": "streaming"}}, {}, r"got control streaming which needs our own"),
        ({"settings": {"preset": "pressure", "need": "attention-redundancy"}}, {}, r"got need attention-redundancy wh"),
        ({"search_engine": "embeded"}, {}, r"unknown search engine embeded \(did you mean embedded\?\)"),
        ({}, {"kv_cache_dtype": "int8"}, r"must be auto or fp8 .*, got int8, which switches off the paged context"),
        ({}, {"kv_cache_dtype": "fp8"}, r"fp8 needs fp8 weights .*, got quantization None \(add --quantization fp8\)"),
        ({}, {"kv_cache_dtype": "float32"}, r"must be auto or fp8 on the tensorrt backend, got float32"),
        ({}, {"quantization": "int4"}, r"quantization must be one of fp8, w8a16, w4a16 .*, got int4"),
        ({}, {"pp_size": 3}, r"pp_size must divide the model's 4 layers, got 3"),
        ({}, {"tp_size": 3}, r"tp_size must divide the model's 4 attention heads, .* got 3"),
        ({}, {"max_num_tokens": 8}, r"max_num_tokens must be at least tokens_per_block 16, got 8"),
    ],
)
def test_plans_that_tensorrt_llm_would_build_wrongly(plan, tmp_path, options, build, message):
    options = dict(options)
    if (settings := options.pop("settings", None)) is not None:
        options["config_file"] = tmp_path / "settings.json"
        options["config_file"].write_text(json.dumps({"memshare": settings}))
    with pytest.raises(UserError, match=message):
        plan(build=build, **options)


def test_a_model_whose_conversion_is_untried(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", "phi3")
    with pytest.raises(UserError, match=r"architecture must be one of .*, got Phi3ForCausalLM, whose conversion is"):
        plan_build(BuildOptions(checkpoint, tmp_path / "e", backend="tensorrt"))


def test_a_pool_that_no_kernel_takes(tiny_checkpoint, tmp_path):
    options = BuildOptions(tiny_checkpoint, tmp_path / "e", memshare=True, backend="tensorrt")
    with pytest.raises(UserError, match=r"MemShareBlockSearch cannot be built: head_dim must be even and between"):
        plan_build(options)
    assert plan_build(replace(options, memshare=False)).tensorrt.search_engine == "none"
