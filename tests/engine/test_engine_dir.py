"""Engine directories: written whole or not at all, and refused with one sentence when damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.engine import engine_dir as engine_dir_module
from trtllm_memshare.engine.build_config import BuildConfig, parse_build_config
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.engine_dir import Engine, write_engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine, replace_memshare
from trtllm_memshare.search.config import make_config


def write(checkpoint: Path, output_dir: Path, force: bool = False, preset: str = "aligned", **build) -> Engine:
    config = BuildConfig(**{"max_seq_len": 512, **build})
    return write_engine(output_dir, read_checkpoint(checkpoint), config, make_config(preset), force)


def edit_json(path: Path, **changes) -> None:
    """Changes keys of a JSON file, ``a__b`` for b inside a; ``...`` removes one."""
    document = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = document
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is ...:
            del place[last]
    path.write_text(json.dumps(document))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def engine_dir(own_checkpoint, tmp_path) -> Path:
    return write(own_checkpoint, tmp_path / "engine").engine_dir


def test_what_is_written_is_read_back(own_checkpoint, tmp_path):
    written = write(own_checkpoint, tmp_path / "deep" / "engine", tokens_per_block=32, kv_cache_dtype="float16")
    engine = load_engine(tmp_path / "deep" / "engine")
    assert engine == written
    assert engine.build == BuildConfig(max_seq_len=512, tokens_per_block=32, kv_cache_dtype="float16")
    assert engine.memshare == make_config("aligned")
    assert (engine.backend, engine.kv_dtype, engine.vocab_size, engine.stop_token_ids) == ("torch", "float16", 80, (1,))
    assert engine.bytes_per_block == 2 * 2 * 2 * 32 * 8 * 2  # layers, K and V, heads, tokens, head_dim, bytes
    assert engine.model_dir == tmp_path / "deep" / "engine" / "model"


def test_the_files_have_the_documented_shape(engine_dir):
    config = json.loads((engine_dir / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config"]
    assert config["version"] == "1.2.1"
    assert config["pretrained_config"]["architecture"] == "Qwen2ForCausalLM"
    assert config["pretrained_config"]["num_key_value_heads"] == 2
    assert config["build_config"]["max_input_len"] == 511
    assert config["build_config"]["plugin_config"]["tokens_per_block"] == 16
    document = json.loads((engine_dir / "memshare.json").read_text())
    assert list(document) == ["format_version", "backend", "memshare", "torch"]
    assert sorted(p.name for p in engine_dir.iterdir()) == ["config.json", "memshare.json", "model"]


@pytest.mark.parametrize("shards", [False, True])
def test_weights_that_changed_under_the_engine_are_noticed(own_checkpoint, tmp_path, shards):
    """A checkpoint that is copied over keeps its inode, and the engine's link shows what is in it."""
    if shards:
        model = AutoModelForCausalLM.from_pretrained(own_checkpoint)
        (own_checkpoint / "model.safetensors").unlink()
        model.save_pretrained(own_checkpoint, max_shard_size="20KB")
    engine = write(own_checkpoint, tmp_path / "engine")
    file = sorted(own_checkpoint.glob("*.safetensors"))[0]
    before = file.read_bytes()
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name] += 1
    save_file(tensors, tmp_path / "new")
    file.write_bytes((tmp_path / "new").read_bytes())
    with pytest.raises(UserError, match=r"engine .*/engine has other weights than it was built with: .* \(build it"):
        load_engine(engine.engine_dir)
    file.write_bytes(before)
    assert load_engine(engine.engine_dir) == engine
    file.write_bytes((tmp_path / "new").read_bytes())
    edit_json(engine.engine_dir / "memshare.json", torch__weights=...)  # an engine of before
    load_engine(engine.engine_dir)


def test_weights_are_linked_and_the_rest_is_the_engine_s_own(engine_dir, own_checkpoint):
    assert os.path.samefile(engine_dir / "model" / "model.safetensors", own_checkpoint / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        assert not os.path.samefile(engine_dir / "model" / name, own_checkpoint / name)
    assert AutoTokenizer.from_pretrained(engine_dir / "model")("1 + 2")["input_ids"]


def test_weights_are_copied_where_links_are_refused(own_checkpoint, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    write(own_checkpoint, tmp_path / "engine")
    copied, source = tmp_path / "engine" / "model" / "model.safetensors", own_checkpoint / "model.safetensors"
    assert not os.path.samefile(copied, source)
    assert copied.read_bytes() == source.read_bytes()


def test_weights_behind_symbolic_links_and_code_left_out(own_checkpoint, tmp_path):
    (own_checkpoint / "model.safetensors").rename(tmp_path / "blob")
    (own_checkpoint / "model.safetensors").symlink_to(tmp_path / "blob")
    (own_checkpoint / "modeling_own.py").write_text("raise SystemExit")
    (own_checkpoint / "consolidated.safetensors").write_bytes(b"the same weights once more")
    model_dir = write(own_checkpoint, tmp_path / "engine").model_dir
    assert not (model_dir / "model.safetensors").is_symlink()
    assert not (model_dir / "modeling_own.py").exists()
    assert not (model_dir / "consolidated.safetensors").exists()


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_the_rotary_base_survives_either_transformers(own_checkpoint, tmp_path, spelling):
    changes = {"rope_theta": 1e6} if spelling == "rope_theta" else {"rope_parameters": {"rope_theta": 1e6}}
    document = json.loads((own_checkpoint / "config.json").read_text())
    for key in ("rope_theta", "rope_parameters", "rope_scaling"):
        document.pop(key, None)
    (own_checkpoint / "config.json").write_text(json.dumps({**document, **changes}))
    engine = write(own_checkpoint, tmp_path / "engine")
    loaded = AutoConfig.from_pretrained(engine.model_dir)
    theta = loaded.rope_theta if hasattr(loaded, "rope_theta") else loaded.rope_parameters["rope_theta"]
    assert engine.checkpoint.rope_theta == theta == 1e6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "memshare.json").unlink(), r"is missing .*memshare.json .*damaged: build it again .*--force"),
        (lambda e: (e / "config.json").unlink(), r"is missing .*config.json .*--force"),
        (lambda e: (e / "config.json").write_text("no"), r"config.json is damaged: not JSON"),
        (lambda e: (e / "memshare.json").write_text('{"format_version"'), r"memshare.json is damaged: not JSON"),
        (lambda e: (e / "memshare.json").write_text("3"), r"memshare.json must hold a JSON object, got int"),
        (lambda e: edit_json(e / "memshare.json", memshar={}), r"unknown key memshar \(did you mean memshare\?\)"),
        (lambda e: edit_json(e / "memshare.json", backend=...), r"memshare.json lacks backend"),
        (lambda e: edit_json(e / "memshare.json", format_version=9), r"format_version 9, expected 1 \(build it again"),
        (lambda e: edit_json(e / "memshare.json", backend="onnx"), r"names backend 'onnx', expected torch or tensorrt"),
        (lambda e: edit_json(e / "memshare.json", memshare__max_distanse=1), r"key max_distanse .*mean max_distance\?"),
        (lambda e: edit_json(e / "memshare.json", memshare__preset="alined"), r"memshare.json: preset .*got 'alined'"),
        (lambda e: edit_json(e / "memshare.json", memshare=[]), r"memshare.json: .*valid dictionary"),
        (lambda e: edit_json(e / "memshare.json", torch=1), r"torch must be an object, got int"),
        (lambda e: edit_json(e / "memshare.json", torch={"kv_dtype": "auto"}), r"key kv_dtype .*kv_cache_dtype\?"),
        (lambda e: edit_json(e / "memshare.json", torch__kv_cache_dtype="fp8"), r"kv_cache_dtype must be .*got fp8"),
        (lambda e: edit_json(e / "config.json", version="0.9"), r"version '0.9', expected '1.2.1'"),
        (lambda e: edit_json(e / "config.json", build_config=...), r"config.json lacks build_config"),
        (lambda e: edit_json(e / "config.json", build_config=4), r"config.json has a value in place of an object"),
        (lambda e: edit_json(e / "config.json", build_config__max_bach=1), r"build_config has an unknown key max_bach"),
        (
            lambda e: edit_json(e / "config.json", build_config__plugin_config__tokens_per_block=24),
            r"tokens_per_block must be a power of two between 8 and 128, got 24",
        ),
        (
            lambda e: edit_json(e / "config.json", pretrained_config__num_hidden_layers=3),
            r"pretrained_config.num_hidden_layers is 3, expected 2 for the model in the engine",
        ),
        (lambda e: shutil.rmtree(e / "model"), r"is damaged, build it again .*: no checkpoint directory"),
        (lambda e: (e / "model" / "model.safetensors").unlink(), r"is damaged.* needs model.safetensors, found no"),
        (
            lambda e: os.truncate(e / "model" / "model.safetensors", 5000),
            r"is damaged.* half-written or damaged: expected \d+ bytes, got 5000",
        ),
    ],
)
def test_damaged_engines_are_refused(engine_dir, damage, message):
    damage(engine_dir)
    with pytest.raises(UserError, match=message):
        load_engine(engine_dir)


def test_no_engine_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no engine directory at .* \(build one: python build_scripts/build_engine.py"):
        load_engine(tmp_path / "none")


@pytest.mark.parametrize("step", ["copy2", "read_torch_engine"])
def test_a_failed_write_leaves_the_old_engine_and_nothing_else(engine_dir, own_checkpoint, tmp_path, monkeypatch, step):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    before = snapshot(engine_dir)
    monkeypatch.setattr(shutil if step == "copy2" else engine_dir_module, step, fail)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        write(own_checkpoint, engine_dir, force=True)
    with pytest.raises(UserError, match=r"cannot write"):
        write(own_checkpoint, tmp_path / "new" / "engine")
    assert snapshot(engine_dir) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine"]


def test_an_interrupted_swap_puts_the_old_engine_back(engine_dir, own_checkpoint, tmp_path, monkeypatch):
    before, rename, calls = snapshot(engine_dir), os.rename, []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(own_checkpoint, engine_dir, force=True, preset="off")
    assert snapshot(engine_dir) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine"]


def test_force_replaces_engines_and_nothing_else(engine_dir, own_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"holds an engine already \(set --force"):
        write(own_checkpoint, engine_dir)
    (engine_dir / "memshare.json").unlink()
    assert write(own_checkpoint, engine_dir, force=True, preset="off").memshare.preset == "off"
    assert write(engine_dir / "model", engine_dir, force=True).memshare.preset == "aligned"  # from its own weights
    before = snapshot(own_checkpoint)
    with pytest.raises(UserError, match=r"exists and is no engine directory"):
        write(own_checkpoint, own_checkpoint, force=True)
    assert snapshot(own_checkpoint) == before
    (tmp_path / "file").write_text("")
    for output_dir, message in ((tmp_path / "file", "is no engine"), (tmp_path / "file" / "engine", "cannot write")):
        with pytest.raises(UserError, match=message):
            write(own_checkpoint, output_dir, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine", "file"]


def test_force_through_a_symbolic_link_and_into_an_empty_directory(engine_dir, own_checkpoint, tmp_path):
    (tmp_path / "current").symlink_to(engine_dir)
    write(own_checkpoint, tmp_path / "current", force=True, preset="paper")
    assert (tmp_path / "current").is_symlink()
    assert load_engine(engine_dir).memshare.preset == "paper"
    (tmp_path / "empty").mkdir()
    assert write(own_checkpoint, tmp_path / "empty").backend == "torch"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens_per_block": 24}, r"tokens_per_block must be a power of two between 8 and 128, got 24 \(set --tokens"),
        ({"tokens_per_block": 4}, r"between 8 and 128, got 4"),
        ({"tokens_per_block": 256}, r"between 8 and 128, got 256"),
        ({"tokens_per_blok": 8}, r"sizes has an unknown key tokens_per_blok \(did you mean tokens_per_block\?\)"),
        ({"max_batch_size": 0}, r"max_batch_size .*greater than or equal to 1, got 0"),
        ({"max_seq_len": 1}, r"max_seq_len .*greater than or equal to 2, got 1"),
        ({"max_num_tokens": 8}, r"max_num_tokens must be at least max_batch_size 64, .*got 8"),
        ({"kv_cache_dtype": "fp4"}, r"kv_cache_dtype .*got 'fp4'"),
    ],
)
def test_build_settings_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        parse_build_config(values, "sizes")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, r"kv_cache_dtype must be .* on the torch backend, got fp8"),
        ({"kv_cache_dtype": "int8"}, r"on the torch backend, got int8"),
        ({"quantization": "w4a16_awq"}, r"quantization is not available on the torch backend, got w4a16_awq"),
        ({"tp_size": 2}, r"tp_size must be 1 on the torch backend, got 2 \(leave out --tp-size\)"),
        ({"pp_size": 4}, r"pp_size must be 1 on the torch backend, got 4 \(leave out --pp-size\)"),
    ],
)
def test_what_the_torch_backend_cannot_do(values, message):
    with pytest.raises(UserError, match=message):
        BuildConfig(**values).check_backend("torch")


def test_new_settings_replace_the_old_ones_and_nothing_else(engine_dir):
    before = snapshot(engine_dir)
    changed = replace_memshare(engine_dir, make_config("lexical", max_aliases=3))
    assert changed.memshare == load_engine(engine_dir).memshare == make_config("lexical", max_aliases=3)
    after = snapshot(engine_dir)
    assert {name for name in after if after[name] != before.get(name)} == {"memshare.json"}
    assert after.keys() == before.keys()
    edit_json(engine_dir / "memshare.json", backend="other")
    damaged = snapshot(engine_dir)
    with pytest.raises(UserError, match="names backend 'other', expected torch"):
        replace_memshare(engine_dir, make_config("off"))
    assert snapshot(engine_dir) == damaged
