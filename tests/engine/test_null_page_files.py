"""Null pages in a build and in an engine directory: calibrated, refused with a reason, read back, damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_random_checkpoint
from engine.centred_model import write_centred_checkpoint
from safetensors.torch import load_file, save_file

from trtllm_memshare.__main__ import main
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, describe_plan, plan_build
from trtllm_memshare.builder.summary import summarize
from trtllm_memshare.engine import checkpoint, null_page_build
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.load import load_decoder
from trtllm_memshare.engine.null_page import NullPageRefused, NullPageSet
from trtllm_memshare.engine.null_page_build import calibrate_checkpoint
from trtllm_memshare.engine.null_page_files import (
    KEYS_FILE,
    calibrated_on,
    calibration_texts,
    load_null_pages,
    read_null_pages,
    save_null_pages,
)
from trtllm_memshare.engine.weights import weights_digest
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.serving.self_check import check_engine_runs

TEXT = "\n---\n".join("Q: 12 + 345 = ?\n<think>\n12 + 345: 2+5=7, 1+4=5, 0+3=3, so 357.\n" * 3 for _ in range(4))


def plan(model_dir, output_dir, becomes="null", **memshare):
    config = output_dir.with_suffix(".json")
    config.write_text(json.dumps({"memshare": {"retired_becomes": becomes, **memshare}}))
    return plan_build(BuildOptions(model_dir, output_dir, memshare=True, backend="torch", config_file=config))


@pytest.fixture(scope="module")
def centred_dir(tmp_path_factory):
    folder = write_centred_checkpoint(tmp_path_factory.mktemp("centred"), "qwen2", max_position_embeddings=512)
    (folder / "calibration.txt").write_text(TEXT)
    return folder


def test_a_build_calibrates_pages_and_a_runner_finds_them(centred_dir, tmp_path):
    planned = plan(centred_dir, tmp_path / "engine")
    assert "null pages: will be calibrated with the build" in json.loads(describe_plan(planned))["summary"]
    engine = build_engine(planned)
    pages = load_null_pages(engine.engine_dir, engine.checkpoint, engine.build.max_seq_len)
    assert pages.bands.tolist() == [0, 512]
    (line,) = [row for row in summarize(engine).splitlines() if row.startswith("null pages")]
    assert line == f"null pages: {pages.describe()}"
    runner = open_runner(engine, 30, "cpu")
    assert runner.null_pages.blocks == [0]
    assert torch.equal(runner.pool[0, :, 0, :, 3], pages.keys[0])


def test_a_command_makes_the_pages_without_an_engine(centred_dir, tmp_path, capsys):
    folder = tmp_path / "new" / "null"
    main(["null-pages", str(centred_dir), "--max-seq-len", "400", "--output", str(folder)])
    keys, bands, _ = read_null_pages(folder / KEYS_FILE, "")
    assert (len(keys), bands.tolist()) == (1, [0, 512])
    assert capsys.readouterr().out.startswith("null pages: 1 page, one for each 512 positions; worst gap -")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # who reads the report reads the pages
    model_dir = write_random_checkpoint(tmp_path / "checkpoint", "llama")
    (model_dir / "calibration.txt").write_text(TEXT)
    with pytest.raises(
        UserError, match=r"for layer \d, head \d.* \(take --null-entries skip with memshare serve, bench or vllm serve"
    ):
        main(["null-pages", str(model_dir), "--max-seq-len", "400", "--output", str(folder)])


@pytest.mark.parametrize("output", ["", "taken"])
def test_a_folder_that_cannot_have_the_pages_is_named_before_the_work(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / KEYS_FILE).mkdir(parents=True)
    monkeypatch.setattr(null_page_build, "calibrate_checkpoint", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=f"folder that can have the file {KEYS_FILE}, got '{output}'"):
        main(["null-pages", "model", "--max-seq-len", "400", "--output", output])


def test_more_positions_than_any_model_reads_are_refused(centred_dir):
    with pytest.raises(UserError, match="from 1 to 16777216, got 3000000000"):
        calibrate_checkpoint(centred_dir, 3_000_000_000, "auto")


def test_under_pressure_with_aliases_pages_are_calibrated_for_what_finds_no_donor(centred_dir, tmp_path):
    engine = build_engine(plan(centred_dir, tmp_path / "engine", "alias", preset="pressure", need="nearest-earlier"))
    assert "null pages: 1 page" in summarize(engine)
    assert open_runner(engine, 30, "cpu").null_pages.blocks == [0]


def test_a_model_without_null_pages_is_built_all_the_same_where_the_runner_skips(tmp_path):
    model_dir = write_random_checkpoint(tmp_path / "checkpoint", "llama")
    (model_dir / "calibration.txt").write_text(TEXT)
    engine = build_engine(plan(model_dir, tmp_path / "engine"))
    assert "null pages: none: no null page is found for layer" in summarize(engine)
    assert "leaves pages that were given up out of attention" in summarize(engine)
    assert open_runner(engine, 30, "cpu").null_pages is None
    with pytest.raises(UserError, match="no null page is found for layer"):
        build_engine(plan(model_dir, tmp_path / "reads", read_null=True))
    assert not (tmp_path / "reads").exists()


def test_the_self_check_runs_beside_null_pages(centred_dir, tmp_path):
    """They are the first blocks of the pool: a check that wrote there, or had no room left, would fail."""
    engine = build_engine(plan(centred_dir, tmp_path / "engine"), check_engine_runs)
    assert "null pages" in summarize(engine)
    plain = build_engine(plan(centred_dir, tmp_path / "plain", "alias", preset="aligned"))
    assert check_engine_runs(engine, "cpu") == check_engine_runs(plain, "cpu")


def test_nothing_is_calibrated_where_nothing_becomes_null(centred_dir, tmp_path):
    engine = build_engine(plan(centred_dir, tmp_path / "engine", "alias", preset="aligned"))
    assert not list(engine.engine_dir.glob("null_pages*"))
    assert "null pages" not in summarize(engine)


def test_texts_are_the_checkpoints_own_or_the_bundled_ones(centred_dir, bundled_model, tmp_path):
    assert calibration_texts(centred_dir) == [text.strip("\n") for text in TEXT.split("\n---\n")]
    for model_dir, begins in ((bundled_model, "Q: "), (tmp_path, "Let me restate")):
        texts = calibration_texts(model_dir)
        assert texts[0].startswith(begins)
        assert len(texts) >= 4
        assert min(map(len, texts)) > 300


def test_a_text_that_is_no_utf_8_is_named(tmp_path):
    (tmp_path / "calibration.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"calibration.txt must be text in UTF-8, got .*0xef in position 2.* \(save it"):
        calibration_texts(tmp_path)


@pytest.fixture
def saved(centred_dir, tmp_path):
    checkpoint = read_checkpoint(centred_dir)
    shape = (2, checkpoint.num_layers, checkpoint.num_kv_heads, checkpoint.head_dim)
    heads = checkpoint.num_attention_heads
    pages = NullPageSet(torch.ones(shape), np.array([0, 256, 512], np.int32), torch.full((2, shape[1], heads), -25.0))
    return checkpoint, pages


def test_pages_come_back_as_they_were_written(saved, tmp_path):
    checkpoint, pages = saved
    assert load_null_pages(tmp_path, checkpoint, 512) is None
    save_null_pages(tmp_path, pages)
    again = load_null_pages(tmp_path, checkpoint, 512)
    assert torch.equal(again.keys, pages.keys)
    assert torch.equal(again.gaps, pages.gaps)
    assert again.bands.tolist() == [0, 256, 512]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.ones(2, 3, 2, 8)}, "should hold finite keys of shape"),
        ({"keys": torch.full((2, 2, 2, 8), torch.nan)}, "should hold finite keys of shape"),
        ({"gaps": torch.full((2, 2, 4), -19.9)}, "has a page 19.9 nats below the real keys, expected at least 20"),
        ({"gaps": torch.full((2, 2, 4), torch.nan)}, "has a page nan nats below"),
        ({"bands": np.array([0, 256, 500], np.int32)}, "covers positions .*500.*, expected 0 to 512"),
        ({"bands": np.array([0, 256, 256], np.int32)}, "covers positions"),
    ],
)
def test_pages_of_another_model_or_for_shorter_texts_are_refused(saved, tmp_path, change, message):
    checkpoint, pages = saved
    save_null_pages(tmp_path, dataclasses.replace(pages, **change))
    with pytest.raises(UserError, match=message):
        load_null_pages(tmp_path, checkpoint, 512)


def test_a_damaged_file_is_named(saved, tmp_path):
    (tmp_path / "null_pages.safetensors").write_bytes(b"\x07half a file")
    with pytest.raises(UserError, match=r"null_pages\.safetensors is damaged"):
        load_null_pages(tmp_path, saved[0], 512)


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_weight, r"lacks weights of the model, such as model.layers.1.self_attn.q_proj.weight \(copy or"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "has rope_type dynamic, expected one of default"),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0, "layer_types": None},
         "uses a sliding window"),
        ({"kv_lora_rank": 512}, r"has multi-head latent attention \(MLA\), whose cache holds no K and V of heads"),
        ({"layer_types": ["conv", "full_attention"] * 2}, r"has other layers than those of full attention \(conv\)"),
        ({"layer_types": None, "mamba_d_state": 16}, r"other layers than those of full attention \(mamba_d_state\)"),
    ],
)  # fmt: skip
def test_nothing_is_calibrated_for_a_model_that_is_not_what_it_would_be_served_as(
    centred_dir, tmp_path, change, message
):
    """Weights that are missing are random numbers to transformers, and null pages of these are of no model."""
    folder = shutil.copytree(centred_dir, tmp_path / "model")
    if callable(change):
        change(folder)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        calibrate_checkpoint(folder, 512, "float32")


def test_a_model_with_layers_without_attention_is_refused_whatever_its_configuration_says(centred_dir, monkeypatch):
    def load(folder):
        model, report = load_decoder(folder)
        del model.model.layers[1].self_attn
        return model, report

    monkeypatch.setattr(null_page_build, "load_decoder", load)
    with pytest.raises(NullPageRefused, match="has layers without attention"):
        calibrate_checkpoint(centred_dir, 512, "float32")


def test_architectures_that_only_other_hosts_serve_are_calibrated(centred_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(centred_dir, tmp_path / "model")
    monkeypatch.setattr(checkpoint, "SUPPORTED", ("LlamaForCausalLM",))
    with pytest.raises(UserError, match="has architecture Qwen2ForCausalLM"):
        read_checkpoint(folder)
    pages = calibrate_checkpoint(folder, 512, "float32")
    assert pages.num_bands == 1
    save_null_pages(tmp_path, pages)  # the file names the weights, for hosts that are given it beside a model
    assert calibrated_on(tmp_path / KEYS_FILE, "again") == weights_digest(folder)


def test_the_bundled_model_is_refused_by_name(bundled_model):
    with pytest.raises(NullPageRefused, match=r"no null page is found for layer 3, head \d"):
        calibrate_checkpoint(bundled_model, 4096, "float32")


def test_a_name_that_is_no_folder_is_to_be_downloaded():
    with pytest.raises(UserError, match=r"must be a folder .* got Qwen/Qwen3-8B \(download it first\)"):
        calibrate_checkpoint(Path("Qwen/Qwen3-8B"), 128, "auto")
