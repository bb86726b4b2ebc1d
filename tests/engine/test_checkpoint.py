"""Checkpoints: what is read from them, and one sentence for each kind that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm_memshare.engine.checkpoint import portable_config, read_checkpoint
from trtllm_memshare.engine.null_page_build import calibrate_checkpoint
from trtllm_memshare.engine.weights import INDEX, weight_files
from trtllm_memshare.errors import UserError


def edit_config(checkpoint: Path, **changes) -> None:
    """Changes keys of config.json; ``...`` removes one."""
    path = checkpoint / "config.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def shard(checkpoint: Path) -> None:
    """Splits the weights over two files and an index."""
    tensors = load_file(checkpoint / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, checkpoint / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_facts_of_the_tiny_checkpoint(tiny_checkpoint):
    read = read_checkpoint(tiny_checkpoint)
    assert (read.architecture, read.dtype, read.stop_token_ids) == ("Qwen2ForCausalLM", "float32", (1,))
    assert (read.num_layers, read.num_attention_heads, read.num_kv_heads, read.head_dim) == (2, 4, 2, 8)
    assert (read.hidden_size, read.vocab_size, read.max_position_embeddings, read.rope_theta) == (32, 80, 512, 10000.0)


def test_an_adapter_beside_the_weights_is_refused_by_name(own_checkpoint):
    """With peft installed transformers would look for the adapter's weights, and the engine would never start."""
    (own_checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (read_checkpoint, lambda path: calibrate_checkpoint(path, 64, "auto")):
        with pytest.raises(UserError, match=r"has an adapter_config.json beside its weights, .* \(remove it if"):
            read(own_checkpoint)


def test_every_family_is_read(family_checkpoint):
    assert read_checkpoint(family_checkpoint).num_layers == 2


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": ...}, "rope_theta", 1e6),
        ({"rope_parameters": ..., "rope_theta": 5e5}, "rope_theta", 5e5),
        ({"rope_parameters": ..., "rope_theta": ...}, "rope_theta", 10000.0),
        ({"head_dim": ...}, "head_dim", 8),
        ({"dtype": ..., "torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"dtype": ..., "torch_dtype": ...}, "dtype", "float32"),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 4096}, "num_layers", 2),
    ],
)
def test_spellings_of_both_transformers(own_checkpoint, changes, field, value):
    edit_config(own_checkpoint, **changes)
    assert getattr(read_checkpoint(own_checkpoint), field) == value


def test_weights_decide_the_dtype_that_the_config_leaves_out(own_checkpoint):
    edit_config(own_checkpoint, dtype=..., torch_dtype=...)
    path = own_checkpoint / "model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path)
    assert read_checkpoint(own_checkpoint).dtype == "bfloat16"


def test_stop_tokens_are_those_of_generate(own_checkpoint):
    (own_checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_checkpoint(own_checkpoint).stop_token_ids == (7, 9)
    (own_checkpoint / "generation_config.json").unlink()
    assert read_checkpoint(own_checkpoint).stop_token_ids == (1,)


def test_portable_config_says_the_same_to_both():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    new = portable_config({"rope_parameters": {**yarn, "rope_theta": 1e6}})
    assert new == portable_config({"rope_theta": 1e6, "rope_scaling": yarn})
    assert (new["rope_theta"], new["rope_scaling"]) == (1e6, yarn)
    assert portable_config({"rope_theta": 5e5})["rope_scaling"] is None


def test_shards(own_checkpoint):
    shard(own_checkpoint)
    assert [path.name[:11] for path in weight_files(own_checkpoint)] == ["model-00001", "model-00002"]
    assert read_checkpoint(own_checkpoint).dtype == "float32"


def _cut(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lose_a_shard(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()


def _cut_a_shard(checkpoint: Path) -> None:
    shard(checkpoint)
    path = checkpoint / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _write_index(checkpoint: Path, text: str) -> None:
    shard(checkpoint)
    (checkpoint / INDEX).write_text(text)


def _name_a_tensor_too_many(checkpoint: Path) -> None:
    shard(checkpoint)
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    (checkpoint / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"half-written or damaged: expected \d+ bytes, got \d+ \(copy or download the checkpoint again\)"),
        (lambda c: (c / "model.safetensors").write_bytes(b""), r"half-written .* its header cannot be read"),
        (lambda c: (c / "model.safetensors").write_bytes(b"\xff" * 40), r"half-written .* its header cannot be read"),
        (lambda c: (c / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"[]"), r"its header cannot be read"),
        (lambda c: (c / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}"), r"its header cannot be read"),
        (lambda c: (c / "model.safetensors").rename(c / "pytorch_model.bin"), r"pytorch_model.bin.*convert to safeten"),
        (lambda c: (c / "model.safetensors").unlink(), r"needs model.safetensors, found no weights"),
        (_lose_a_shard, r"lacks model-00002-of-00002.safetensors named in model.safetensors.index.json"),
        (_cut_a_shard, r"model-00002-of-00002.safetensors is half-written"),
        (_name_a_tensor_too_many, r"names lost.weight, which is not in its weight file"),
        (lambda c: _write_index(c, "{}"), r"index.json is damaged: expected a weight_map"),
        (lambda c: _write_index(c, '{"weight_map": {"a": "../b.safetensors"}}'), r"index.json is damaged"),
        (lambda c: _write_index(c, '{"weight_map": {"a": "%s"}}' % ("a" * 300)), r"index.json is damaged"),
        (lambda c: (c / "config.json").unlink(), r"the checkpoint is missing .*config.json \(give --model-dir"),
        (lambda c: (c / "config.json").write_text('{"a"'), r"config.json is damaged: not JSON"),
        (lambda c: (c / "config.json").write_bytes(b"\xff\xfe"), r"config.json is damaged: not JSON"),
        (lambda c: (c / "config.json").write_text("[]"), r"config.json must hold a JSON object, got list"),
        (lambda c: (c / "tokenizer.json").unlink(), r"has no tokenizer, expected one of tokenizer.json"),
        (lambda c: (c / "tokenizer.json").write_text('{"model": '), r"tokenizer.json is damaged: not JSON"),
    ],
)
def test_missing_and_half_written_files(own_checkpoint, damage, message):
    damage(own_checkpoint)
    with pytest.raises(UserError, match=message):
        read_checkpoint(own_checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, r"is an encoder-decoder \(T5"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"architecture GPT2LMHeadModel, expected one of .* rotary embeddings"),
        ({"architectures": None}, r"architecture none"),
        (
            {"use_sliding_window": True, "layer_types": ..., "max_window_layers": 1, "sliding_window": 9},
            r"uses a sliding window",
        ),
        (
            {"use_sliding_window": True, "layer_types": ..., "max_window_layers": 0, "sliding_window": 9},
            r"uses a sliding window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"uses a sliding window"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, r"uses a sliding window"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": ...}, r"uses a sliding window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type dynamic, expected one of default"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type longrope"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, r"three positions .* \(mrope\)"),
        ({"partial_rotary_factor": 0.75}, r"rotates a part of each head \(partial_rotary_factor 0.75\)"),
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047}, r"uses a sliding window"),
        ({"quantization_config": {"quant_method": "awq"}}, r"holds quantized weights"),
        ({"hidden_size": ...}, r"config.json lacks hidden_size"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers must be a positive integer, got 'two'"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"dtype": "float64"}, r"dtype float64, expected one of float32, float16, bfloat16"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"rope_theta must be a positive number, got 'big'"),
    ],
)
def test_models_that_cannot_be_served(own_checkpoint, changes, message):
    edit_config(own_checkpoint, **changes)
    with pytest.raises(UserError, match=message):
        read_checkpoint(own_checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(own_checkpoint, monkeypatch, name):
    """As of another user; root may read everything, so the system's refusal is played."""
    original = io.open

    def refuse(file, *arguments, **options):
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *arguments, **options)

    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("pathlib.Path.open", refuse)  # Python 3.10's has taken io.open long before
    with pytest.raises(UserError, match=rf"{name}.*Permission denied") as caught:
        read_checkpoint(own_checkpoint)
    assert len(str(caught.value)) < 500


def test_no_such_directory(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint directory at .*none \(give --model-dir"):
        read_checkpoint(tmp_path / "none")
