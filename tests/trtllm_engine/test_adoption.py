"""``--adopt``: an engine of trtllm-build gets what this project needs, or stays as it was, to the last byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_random_checkpoint
from engine.test_engine_dir import edit_json
from trtllm_engine.test_builder import serve

import trtllm_memshare.trtllm.engine.builder as builder_module
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine.null_page import NullPageRefused
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner

OURS = ("memshare.json", "libtrtllm_memshare_plugin.so", "memshare.engine", "null_pages.json")


@pytest.fixture
def stock(trtllm, plan):
    """Builds an engine and takes away what TensorRT-LLM does not write."""

    def make(**options) -> Path:
        folder = build_engine(plan(**{"memshare": False, **options})).engine_dir
        for name in OURS:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "model")
        return folder

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file beside and below, hidden ones too."""
    return {str(p.relative_to(folder.parent)): p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()}


def refused(plan, folder, message, **options):
    """One sentence, and nothing in the directory or beside it has changed."""
    before = contents(folder)
    with pytest.raises(UserError, match=message) as caught:
        build_engine(plan(adopt=True, **options))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("search_engine", [None, "separate"])
def test_an_engine_of_trtllm_build_is_adopted(stock, plan, boundaries, prompts, search_engine):
    """A stock engine gets a search beside it."""
    folder = stock(memshare=search_engine is None)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("stays")
    plans = (folder / "rank0.engine").stat().st_ino
    engine = build_engine(plan(adopt=True, search_engine=search_engine))
    assert engine == load_engine(folder)
    assert engine.record.search_engine == (search_engine or "embedded")
    assert serve(open_runner(engine, 200), boundaries, prompts[:3])[1] > 0
    assert (folder / "notes" / "mine.txt").read_text() == "stays"
    assert (folder / "rank0.engine").stat().st_ino == plans  # linked: plans take gigabytes
    assert {p.name for p in folder.parent.iterdir()} == {"engine", "plugin.so"}


def test_what_is_there_is_replaced_with_force_alone(stock, plan):
    folder = stock(memshare=True)
    engine = build_engine(plan(adopt=True))
    refused(
        plan, folder, r"engine holds memshare.json already, which --adopt would replace \(set --force", preset="paper"
    )
    (folder / "model" / "old.json").write_text("{}")
    assert build_engine(plan(adopt=True, force=True, preset="paper")).memshare.preset == "paper"
    assert not (folder / "model" / "old.json").exists()
    (folder / "memshare.json").unlink()
    refused(plan, folder, r"engine holds model already")
    assert engine.record == build_engine(plan(adopt=True, force=True)).record


def test_an_engine_of_the_torch_backend_is_not_adopted(trtllm, plan, bundled_model, tmp_path):
    """The default --output-dir is one as a rule."""
    engine = build_engine(plan_build(BuildOptions(bundled_model, tmp_path / "engine", backend="torch", memshare=True)))
    refused(plan, engine.engine_dir, r"no engine to adopt at .*engine: it has no rank0.engine", force=True)
    assert load_engine(engine.engine_dir) == engine


def test_a_working_engine_survives_being_adopted_as_another(trtllm, plan):
    engine = build_engine(plan())
    refused(plan, engine.engine_dir, r"unknown ones \['memshare_pool", search_engine="separate", force=True)
    assert load_engine(engine.engine_dir) == engine


def test_an_engine_without_the_search_is_not_adopted_as_one_with_it(stock, plan):
    refused(plan, stock(), r"rank0.engine was built without the plugin MemShareBlockSearch")


def test_an_engine_that_is_refused_its_null_pages_stays_stock(stock, plan, monkeypatch):
    def fails(*_, **__):
        raise NullPageRefused("no null page", "take alias")

    folder = stock()
    monkeypatch.setattr(builder_module, "add_null_pages", fails)
    refused(plan, folder, r"no null page", preset="pressure")


def test_null_pages_are_for_the_engine_s_sizes(stock, plan, monkeypatch):
    folder, asked = stock(build={"max_seq_len": 768}), []
    monkeypatch.setattr(builder_module, "add_null_pages", lambda *given, **_: asked.append(given[2:4]))
    edit_json(folder / "config.json", pretrained_config__dtype="bfloat16")
    build_engine(plan(adopt=True, preset="pressure", build=dict.fromkeys(("max_seq_len", "max_batch_size"))))
    assert asked == [(768, "bfloat16")]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"max_seq_len": 128}, r"max_seq_len of the engine to adopt is 1024 .*, got 128 \(leave out --max-seq-len: "),
        ({"max_batch_size": 4}, r"max_batch_size of the engine to adopt is 8"),
        ({"tokens_per_block": 32}, r"tokens_per_block of the engine to adopt is 16 by .*, got 32"),
        ({"kv_cache_dtype": "fp8"}, r"kv_cache_dtype of the engine to adopt is 'auto'"),
        ({"quantization": "fp8"}, r"quantization of the engine to adopt is None"),
        ({"tp_size": 2}, r"tp_size of the engine to adopt is 1"),
    ],
)
def test_sizes_are_the_engine_s_own(stock, plan, build, message):
    refused(plan, stock(), message, search_engine="separate", build=build)


def test_sizes_that_are_the_engine_s_may_be_given(stock, plan):
    sizes = {"quantization": "w8a16", "tokens_per_block": 32}
    folder = stock(build=sizes)
    engine = build_engine(plan(adopt=True, build={**sizes, "kv_cache_dtype": "float16"}, search_engine="separate"))
    assert (engine.engine_dir, engine.build.quantization) == (folder, "W8A16")


def test_every_rank_of_the_engine_is_checked(stock, plan, trtllm):
    folder = stock(build={"tp_size": 2})
    trtllm.links = SimpleNamespace(tp_size=2, pp_size=1, tp_rank=0, pp_rank=0)
    (folder / "rank1.engine").write_bytes(b"rubbish")
    refused(plan, folder, r"could not load .*rank1.engine", search_engine="separate")
    (folder / "rank1.engine").unlink()
    refused(plan, folder, r"is missing rank1.engine", search_engine="separate")


def test_what_cannot_be_adopted(stock, trtllm, plan, bundled_model, tmp_path):
    with pytest.raises(UserError, match=r"no engine to adopt at .*engine: it has no config.json"):
        plan(adopt=True)
    with pytest.raises(UserError, match=r"--adopt is for engines of TensorRT-LLM, got backend torch"):
        plan_build(BuildOptions(bundled_model, tmp_path / "e", backend="torch", adopt=True))
    folder = stock()
    with pytest.raises(UserError, match=r"--adopt needs --model-dir, got it without"):
        plan_build(BuildOptions(None, folder, backend="tensorrt", adopt=True))
    other = write_random_checkpoint(tmp_path / "other", "llama", hidden_size=128, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"num_hidden_layers is 4, expected 2 .*\(name the checkpoint .* --model-dir"):
        plan_build(BuildOptions(other, folder, backend="tensorrt", adopt=True))
    edit_json(folder / "config.json", build_config__max_beam_width=2)
    refused(plan, folder, "max_beam_width 2, expected 1", search_engine="separate")
    assert "memshare" not in json.loads((folder / "config.json").read_text())
