"""Checkpoints whose tensors are not those of the model: an error that names one, or the right tokens.

Every case loads in transformers with random weights and a warning, or fails there only after the build.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_random_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.engine_dir import Engine, write_engine
from trtllm_memshare.engine.weights import INDEX, SINGLE, read_header
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.torch.runner import load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.self_check import check_engine_runs


def rewrite(checkpoint: Path, change) -> None:
    """Gives the stored tensors through ``change``: dict -> dict."""
    path = checkpoint / SINGLE
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_config(checkpoint: Path, **changes) -> None:
    path = checkpoint / "config.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def without(*names: str):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(names)}


def prefixed(stored: str, model: str = ""):
    return lambda tensors: {
        (stored + name.removeprefix(model) if name.startswith(model) else name): t for name, t in tensors.items()
    }


def replaced(name: str, tensor: torch.Tensor):
    return lambda tensors: {**tensors, name: tensor}


def renamed_to(old: str, *new: str):
    def change(tensors):
        return {**{n: t for n, t in tensors.items() if n != old}, **{n: torch.zeros(4, dtype=torch.int32) for n in new}}

    return change


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head.weight"), r"lacks the tensor lm_head.weight"),
        (without("model.layers.1."), r"num_hidden_layers 2, the weights hold layers 0 to 0"),
        (without("model.layers.0."), r"num_hidden_layers 2, the weights hold layers 0 to 1 without 0"),
        (without(Q), r"lacks the tensor model.layers.0.self_attn.q_proj.weight"),
        (without("model.norm"), r"lacks the tensor model.norm.weight"),
        (prefixed("transformer."), r"lacks the tensor model.embed_tokens.weight, there is transformer.model.embed_tok"),
        (renamed_to(Q + ".weight", Q + ".qweight", Q + ".qzeros", Q + ".scales"), r"quantized weights: .*q_proj.qweig"),
        (replaced(Q + ".weight_scale", torch.ones(1)), r"quantized weights: .*q_proj.weight_scale of type F32"),
        (replaced(Q + ".weight", torch.zeros(32, 32).to(torch.float8_e4m3fn)), r"quantized .*of type F8_E4M3"),
        (replaced(Q + ".weight", torch.zeros(32, 32, dtype=torch.int8)), r"quantized weights: .* of type I8"),
        (replaced("model.norm.weight", torch.zeros(0)), r"norm.weight has shape \[0\], config.json needs \[32\]"),
        (replaced("model.embed_tokens.weight", torch.zeros(81, 32)), r"has shape \[81, 32\], config.json needs \[80"),
        (replaced("base.lora_A.weight", torch.zeros(2)), r"holds an adapter: base.lora_A.weight \(merge it"),
        (replaced("model.layers.0.mlp.gate_proj.bias", torch.zeros(48)), r"gate_proj.bias, which the architecture"),
        (replaced("model.layers.2.mlp.up_proj.weight", torch.zeros(48, 32)), r"the weights hold layers 0 to 2"),
    ],
)
def test_tensors_that_are_not_those_of_the_model(own_checkpoint, change, message):
    rewrite(own_checkpoint, change)
    with pytest.raises(UserError, match=message):
        read_checkpoint(own_checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4, "layer_types": ...}, r"num_hidden_layers 4, the weights hold layers 0 to 1"),
        ({"num_hidden_layers": 1, "layer_types": ...}, r"num_hidden_layers 1, the weights hold layers 0 to 1"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers must be at most 1000, got 1000000000"),
        ({"vocab_size": 90}, r"embed_tokens.weight has shape \[80, 32\], config.json needs \[90, 32\]|lm_head.weight"),
        ({"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}, r"no model that transformers can build"),
        ({"model_type": ...}, r"no model that transformers can build"),
        ({"model_type": "llama"}, r"names architecture Qwen2ForCausalLM, but its model_type is that of LlamaForCausal"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_type llama3 needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, r"factor of rope_type yarn must be .*, got '4'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_type linear needs factor"),
        ({"rope_parameters": {"rope_theta": 10**400}}, r"rope_theta must be .*, got an integer of 1329 bits"),
        ({"layer_types": 5}, r"layer_types must be a list, got 5"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(own_checkpoint, changes, message):
    edit_config(own_checkpoint, **changes)
    with pytest.raises(UserError, match=message):
        read_checkpoint(own_checkpoint)


def test_stop_tokens_are_ids(own_checkpoint):
    (own_checkpoint / "generation_config.json").write_text('{"eos_token_id": [-1]}')
    with pytest.raises(UserError, match=r"eos_token_id must be token ids, got \[-1\]"):
        read_checkpoint(own_checkpoint)
    (own_checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 200]}')
    checkpoint = read_checkpoint(own_checkpoint)
    assert checkpoint.stop_token_ids == (1,)
    assert checkpoint.notes == ("stop tokens: [200] lie outside the vocabulary and are left out",)


@pytest.mark.parametrize(
    "change",
    [
        prefixed("base_model.model."),
        prefixed("_orig_mod."),
        prefixed("module."),
        prefixed("model.language_model.", "model."),
        prefixed("language_model."),
    ],
)
def test_known_prefixes_are_read_and_said(own_checkpoint, tiny_checkpoint, change):
    rewrite(own_checkpoint, change)
    checkpoint = read_checkpoint(own_checkpoint)
    assert checkpoint.notes == (f'weights: stored names start with "{checkpoint.renamed_prefix}", read as '
                                f'"{"model." if checkpoint.renamed_prefix.startswith("model.") else ""}"',)  # fmt: skip
    ours, theirs = load_model(own_checkpoint).state_dict(), load_model(tiny_checkpoint).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_that_went_missing_after_the_build_are_not_random_numbers(own_checkpoint):
    rewrite(own_checkpoint, without("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks weights of the model, such as lm_head.weight"):
        load_model(own_checkpoint)


@pytest.mark.parametrize("settings", [{"cache_implementation": "own"}, {"pad_token_id": "x"}])
def test_a_file_that_only_transformers_reads_and_refuses(own_checkpoint, settings):
    (own_checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}))
    with pytest.raises(UserError, match=r"checkpoint does not load: (ValueError|TypeError): .* own files again"):
        load_model(own_checkpoint)


def test_a_config_that_asks_for_tuples_is_served_all_the_same(own_checkpoint, tmp_path):
    edit_config(own_checkpoint, return_dict=False)
    assert len(check_engine_runs(build(own_checkpoint, tmp_path / "engine"), "cpu")) == 8


def build(checkpoint: Path, folder: Path, **settings) -> Engine:
    return write_engine(folder, read_checkpoint(checkpoint), BuildConfig(max_seq_len=64, **settings),
                        make_config("off"), False)  # fmt: skip


@pytest.mark.parametrize("is_stale", [False, True], ids=["with its shard", "whose shard has gone"])
def test_a_single_file_wins_over_an_index_as_in_transformers(own_checkpoint, tmp_path, is_stale):
    (own_checkpoint / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    if not is_stale:
        save_file({"x": torch.zeros(1)}, own_checkpoint / "model-00001-of-00001.safetensors")
    checkpoint = read_checkpoint(own_checkpoint)
    assert checkpoint.notes == (f"weights: {SINGLE} is taken, {INDEX} beside it is not read (as transformers does)",)
    engine = build(own_checkpoint, tmp_path / "engine")
    assert sorted(p.name for p in engine.model_dir.glob("model*")) == [SINGLE]
    assert engine.checkpoint.notes == ()
    theirs = AutoModelForCausalLM.from_pretrained(own_checkpoint).state_dict()
    ours = load_model(engine.model_dir).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_norms_in_float32_make_no_float32_pool(tmp_path):
    write_random_checkpoint(tmp_path / "c")
    rewrite(tmp_path / "c", lambda ts: {n: t if "norm" in n else t.bfloat16() for n, t in ts.items()})
    edit_config(tmp_path / "c", dtype=...)
    engine = build(tmp_path / "c", tmp_path / "engine")
    assert engine.kv_dtype == "bfloat16"
    assert load_model(engine.model_dir).dtype == torch.bfloat16


def test_bytes_of_a_block_come_from_the_head_that_is_computed(tmp_path):
    """Qwen3's own default head has 128 elements, whatever hidden_size / heads would be."""
    write_random_checkpoint(tmp_path / "c", "qwen3", head_dim=128)
    edit_config(tmp_path / "c", head_dim=...)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.head_dim == 128
    assert build(tmp_path / "c", tmp_path / "e").bytes_per_block == 2 * 2 * 2 * 16 * 128 * 4


def test_heads_that_the_config_leaves_open(tmp_path):
    write_random_checkpoint(tmp_path / "c", num_key_value_heads=4)
    edit_config(tmp_path / "c", num_key_value_heads=None)
    assert read_checkpoint(tmp_path / "c").num_kv_heads == 4


def test_scaled_rotations_reach_further(own_checkpoint, tmp_path):
    edit_config(own_checkpoint, max_position_embeddings=64, rope_parameters=...,
                rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_theta=1e4)  # fmt: skip
    checkpoint = read_checkpoint(own_checkpoint)
    assert (checkpoint.max_position_embeddings, checkpoint.longest_sequence) == (64, 256)
    edit_config(own_checkpoint, max_position_embeddings=128,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})  # fmt: skip
    assert read_checkpoint(own_checkpoint).longest_sequence == 128


def test_no_layer_slides_where_all_are_below_the_window(own_checkpoint):
    edit_config(own_checkpoint, use_sliding_window=True, max_window_layers=2, layer_types=..., sliding_window=16)
    assert read_checkpoint(own_checkpoint).num_layers == 2


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"a": {"dtype": 5, "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, float("inf")]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a" * 500: {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    ],
)
def test_headers_that_contradict_themselves(tmp_path, header):
    raw = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(UserError, match="damaged") as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 700


def test_the_self_check_runs_greedily_and_finds_weights_that_overflow(own_checkpoint, tmp_path):
    engine = build(own_checkpoint, tmp_path / "engine")
    tokens = check_engine_runs(engine, "cpu")
    assert len(tokens) == 8
    model = AutoModelForCausalLM.from_pretrained(own_checkpoint)
    prompt = AutoTokenizer.from_pretrained(own_checkpoint)("The answer is 42, so x = 6 * 7.", return_tensors="pt")
    expected = model.generate(prompt["input_ids"], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert tokens == expected[0, prompt["input_ids"].shape[1] :].tolist()
    rewrite(own_checkpoint, lambda ts: {n: t * 1e38 if "lm_head" in n else t for n, t in ts.items()})
    with pytest.raises(UserError, match=r"gave logits that are not finite after \d+ tokens"):
        write_engine(tmp_path / "broken", read_checkpoint(own_checkpoint), BuildConfig(max_seq_len=64),
                     make_config("off"), False, check_engine_runs)  # fmt: skip
    assert not (tmp_path / "broken").exists()
    assert load_engine(tmp_path / "engine") == engine
