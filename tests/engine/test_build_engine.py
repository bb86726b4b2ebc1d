"""`build_engine.py` and engine directories: what is written, and one clear sentence for each bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from trtllm_memshare.engine.engine_dir import load_engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.config import PRESETS, make_config

ROOT = Path(__file__).parents[2]


def build(*options: object, script: str = "build_scripts/build_engine.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def edit_json(path: Path, **changes) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({k: v for k, v in document.items() if v != "REMOVE"}))


def assert_one_sentence(done: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for phrase in phrases:
        assert phrase in done.stderr


@pytest.fixture
def engine_dir(tiny_checkpoint, tmp_path) -> Path:
    done = build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "engine", "--memshare")
    assert done.returncode == 0, done.stderr
    return tmp_path / "engine"


def test_an_engine_is_whole_and_its_summary_adds_up(engine_dir, tiny_checkpoint):
    engine = load_engine(engine_dir)
    assert engine.memshare == make_config("aligned")
    assert engine.bytes_per_block == 2 * 2 * 2 * 16 * 8 * 4  # layers, K and V, heads, tokens, head_dim, bytes
    config = json.loads((engine_dir / "config.json").read_text())
    assert config["build_config"]["plugin_config"]["tokens_per_block"] == 16
    assert config["pretrained_config"]["num_key_value_heads"] == 2
    weights = tiny_checkpoint / "model.safetensors"
    assert os.path.samefile(engine_dir / "model" / "model.safetensors", weights)
    with safe_open(engine_dir / "model" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10


def test_summary_and_dry_run(tiny_checkpoint, tmp_path):
    done = build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "e", "--memshare", "--preset", "paper")
    assert "backend: torch (tensorrt_llm is not installed)" in done.stdout
    assert "4,096 bytes per block of 16 tokens (float32)" in done.stdout
    assert "262,144 blocks or 4,194,304 tokens per GiB" in done.stdout
    assert "preset paper shares the blocks of repeats: similar steps" in done.stdout
    done = build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "d", "--memshare", "--dry-run")
    document = json.loads(done.stdout.partition("\n")[2])
    assert document["memshare"]["preset"] == "aligned"
    assert not (tmp_path / "d").exists()


def test_without_memshare_nothing_is_shared(tiny_checkpoint, tmp_path):
    build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "e")
    assert load_engine(tmp_path / "e").memshare.preset == "off"


def test_options_win_over_the_config_file(tiny_checkpoint, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"build": {"tokens_per_block": 32}, "memshare": {"max_distance": 0.25}}))
    build(
        "--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "e", "--memshare", "--config", file,
        "--tokens-per-block", 8,
    )  # fmt: skip
    engine = load_engine(tmp_path / "e")
    assert (engine.build.tokens_per_block, engine.memshare.max_distance) == (8, 0.25)


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        (["--tokens-per-block", 24], ["must be a power of two between 8 and 128", "got 24"]),
        (["--memshare", "--preset", "alligned"], ["unknown preset alligned", "did you mean aligned?"]),
        (["--preset", "paper"], ["--preset needs --memshare"]),
        (["--backend", "tensorrt"], ["tensorrt_llm 1.2.1 and TensorRT 10.14 are missing", "--backend torch"]),
        (["--tp-size", 2], ["--tp-size must be 1", "got 2"]),
        (["--quantization", "fp8"], ["--quantization is not available", "got fp8"]),
        (["--kv-cache-dtype", "fp8"], ["kv_cache_dtype", "got 'fp8'"]),
        (["--max-seq-len", 600], ["at most the model's max_position_embeddings 512", "got 600"]),
        (["--max-batch-size", 0], ["max_batch_size", "got 0"]),
        (["--config", "nowhere.json"], ["missing nowhere.json"]),
    ],
)
def test_bad_options(tiny_checkpoint, tmp_path, options, phrases):
    assert_one_sentence(
        build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "out" / "e", *options), *phrases
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        ({"memshare": {"max_distanse": 1}}, ["unknown key max_distanse", "did you mean max_distance?"]),
        ({"memshare": {"max_distance": -1}}, ["max_distance", "got -1"]),
        ({"build": {"tokens_per_blok": 8}}, ["unknown key tokens_per_blok", "did you mean tokens_per_block?"]),
        ({"memshar": {}}, ["unknown key memshar", "did you mean memshare?"]),
    ],
)
def test_bad_config_files(tiny_checkpoint, tmp_path, content, phrases):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(content))
    done = build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "e", "--memshare", "--config", file)
    assert_one_sentence(done, *phrases)


def _truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garble(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 40)


def _only_pickle(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")


def _missing_shard(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "phrases"),
    [
        (_truncate, ["is half-written or damaged", "copy or download the checkpoint again"]),
        (_garble, ["its header cannot be read"]),
        (_only_pickle, ["needs model.safetensors", "found pytorch_model.bin"]),
        (_missing_shard, ["lacks model-00001-of-00002.safetensors"]),
        (lambda c: (c / "config.json").unlink(), ["missing", "config.json", "--model-dir"]),
        (lambda c: (c / "config.json").write_text("{"), ["config.json is damaged: not JSON"]),
        (lambda c: (c / "tokenizer.json").unlink(), ["has no tokenizer"]),
        (lambda c: edit_json(c / "config.json", use_sliding_window=True), ["uses a sliding window"]),
        (lambda c: edit_json(c / "config.json", architectures=["GPT2LMHeadModel"]), ["architecture GPT2LMHeadModel"]),
        (lambda c: edit_json(c / "config.json", is_encoder_decoder=True), ["is an encoder-decoder"]),
        (lambda c: edit_json(c / "config.json", rope_scaling={"rope_type": "dynamic"}), ["rope_type dynamic"]),
        (lambda c: edit_json(c / "config.json", hidden_size="REMOVE"), ["config.json lacks hidden_size"]),
    ],
)
def test_bad_checkpoints(tiny_checkpoint, tmp_path, damage, phrases):
    damage(tiny_checkpoint)
    done = build("--model-dir", tiny_checkpoint, "--output-dir", tmp_path / "out" / "e", "--memshare")
    assert_one_sentence(done, *phrases)
    assert not (tmp_path / "out").exists()


def test_existing_directories_are_not_overwritten(engine_dir, tiny_checkpoint, tmp_path):
    done = build("--model-dir", tiny_checkpoint, "--output-dir", engine_dir)
    assert_one_sentence(done, "holds an engine already", "--force")
    assert build("--model-dir", tiny_checkpoint, "--output-dir", engine_dir, "--force").returncode == 0
    assert load_engine(engine_dir).memshare.preset == "off"
    done = build("--model-dir", tiny_checkpoint, "--output-dir", tiny_checkpoint, "--force")
    assert_one_sentence(done, "exists and is no engine directory")
    assert (tiny_checkpoint / "model.safetensors").is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "memshare.json").unlink(), r"is missing .*memshare.json .*--force"),
        (lambda e: (e / "config.json").write_text("no"), r"config.json is damaged: not JSON"),
        (lambda e: edit_json(e / "memshare.json", extra=1), r"unknown key extra"),
        (lambda e: edit_json(e / "memshare.json", backend="REMOVE"), r"memshare.json lacks backend"),
        (lambda e: edit_json(e / "memshare.json", format_version=9), r"format_version 9, expected 1"),
        (lambda e: edit_json(e / "memshare.json", backend="tensorrt"), r"names backend 'tensorrt', expected torch"),
        (lambda e: edit_json(e / "memshare.json", memshare={"presett": "off"}), r"unknown key presett .*mean preset"),
        (lambda e: (e / "model" / "model.safetensors").unlink(), r"needs model.safetensors, found no weights"),
        (lambda e: edit_json(e / "config.json", build_config="REMOVE"), r"lacks pretrained_config or build_config"),
    ],
)
def test_damaged_engines_are_refused(engine_dir, damage, message):
    damage(engine_dir)
    with pytest.raises(UserError, match=message):
        load_engine(engine_dir)


def test_no_engine_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no engine directory at .* \(build one: python build_scripts/build_engine.py"):
        load_engine(tmp_path / "none")


def test_every_preset_is_valid_and_carries_its_name():
    assert {name: make_config(name).preset for name in PRESETS} == {name: name for name in PRESETS}
