"""The whole of benchmarks/inflight_batching.py over the stand-in engine, beside the torch backend."""

from __future__ import annotations

import json

import pytest
from trtllm_engine.conftest import SIZES, write_engine_dir

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
from trtllm_memshare.evaluation.benchmark_run import run_benchmark
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.torch.runner import load_model
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.token_model import make_executor

VARIANTS = ("full", "aligned", "paper", "lexical", "random")
EXACT = ("accuracy", "mean_output_tokens", "peak_used_blocks", "shared_block_fraction", "refused", "rejected",
         "paused_requests", "block_steps_per_request", "same_tokens_as_full", "shadow_decisions")  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"task_id": i, "input_ids": p, "output_tokens": 210} for i, p in enumerate(prompts[:3])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory, bundled_model, dataset):
    folder = tmp_path_factory.mktemp("torch") / "engine"
    build_engine(plan_build(BuildOptions(bundled_model, folder, memshare=True, preset="aligned", build=SIZES)))
    return benchmark(folder, dataset)


def benchmark(folder, dataset, **options):
    texts = folder.parent / "texts.jsonl"
    report = run_benchmark(
        BenchmarkOptions(
            folder,
            dataset,
            VARIANTS,
            kv_cache_blocks=40,
            settings=(("protected_tokens", 16), ("protected_steps", 0), ("max_distance", 0.2)),
            output_texts=texts,
            read_aliases="repeat",
            device="auto",
            **options,
        ),
        "command",
    )
    return report, texts.read_text()


@pytest.mark.parametrize("search_engine", ["embedded", "separate"])
def test_every_variant_gives_the_figures_of_the_torch_backend(
    tmp_path, bundled_model, dataset, expected, fake_tensorrt, search_engine
):
    folder = write_engine_dir(tmp_path / "engine", bundled_model, search_engine)
    report, texts = benchmark(folder, dataset, engine_cuda_graphs=search_engine == "embedded")
    assert texts == expected[1]
    for got, wanted in zip(report["variants"], expected[0]["variants"], strict=True):
        assert {k: got.get(k) for k in EXACT} == {k: wanted.get(k) for k in EXACT}
    aligned = report["variants"][1]
    assert aligned["shared_block_fraction"] > 0
    assert sum(aligned["rejected"].values()) > 0
    assert report["engine"]["backend"] == "tensorrt"
    assert ("CUDA graphs" in report["decode_attention"]) == (search_engine == "embedded")
    assert report["block_distances"].startswith("MemShareBlockSearch in")
    assert len(fake_tensorrt.engines) == (2 if search_engine == "separate" else 1)


@pytest.mark.parametrize("control", ["drop-duplicate", "streaming"])
def test_controls_that_need_attention_of_our_own_are_refused(tmp_path, bundled_model, dataset, fake_tensorrt, control):
    folder = write_engine_dir(tmp_path / "engine", bundled_model)
    variants, settings = ("full", "aligned", control), (("protected_tokens", 16),)
    options = BenchmarkOptions(folder, dataset, variants, num_requests=1, settings=settings)
    with pytest.raises(UserError, match=rf"{control}.* \(run this variant on an engine of --backend torch"):
        run_benchmark(options, "command")


def test_triton_s_executor_runs_on_an_engine(tmp_path, bundled_model, prompts, fake_tensorrt):
    engine = load_engine(write_engine_dir(tmp_path / "engine", bundled_model))
    executor, description = make_executor(engine, 70, "GUARANTEED_NO_EVICT")
    with executor:
        result = executor.submit(prompts[0], SamplingParams(8)).result(30)
    assert len(result.token_ids) == 8
    assert "MemShareBlockSearch inside the engine" in description
    with pytest.raises(UserError, match=r"needs model.safetensors, found no weights"):
        load_model(engine.model_dir)  # what scripts for the torch backend do
