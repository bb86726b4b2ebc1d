"""The command line: what it prints and writes, and exit code 2 with one sentence for each bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_script import run_script
from safetensors.torch import load_file, save_file

from trtllm_memshare.builder import build_engine as build_module
from trtllm_memshare.builder.build_engine import BuildOptions, plan_build
from trtllm_memshare.builder.summary import describe_sharing
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.search.config import PRESETS, make_config
from trtllm_memshare.serving import self_check

ROOT = Path(__file__).parents[2]


def build_as_a_user(model_dir: Path, output_dir: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would, in the repository's root."""
    command = [sys.executable, "build_scripts/build_engine.py", "--model-dir", model_dir, "--output-dir", output_dir]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [str(part) for part in [*command, *options]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def build(model_dir: Path, output_dir: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has loaded torch and transformers already."""
    arguments = [str(part) for part in ("--model-dir", model_dir, "--output-dir", output_dir, *options)]
    return run_script(ROOT / "build_scripts" / "build_engine.py", *arguments)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    for phrase in phrases:
        assert phrase in done.stderr


def test_summary_and_what_is_written(tiny_checkpoint, tmp_path):
    done = build_as_a_user(tiny_checkpoint, tmp_path / "engine", "--memshare")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("backend: torch (tensorrt_llm is ")
    assert lines[1] == f"engine: {tmp_path / 'engine'} (Qwen2ForCausalLM, backend torch)"
    assert lines[2] == (  # 2 layers * K and V * 2 heads * 16 tokens * 8 * 4 bytes
        "KV cache: 4,096 bytes per block of 16 tokens (float32), 262,144 blocks or 4,194,304 tokens per GiB"
    )
    assert lines[3].startswith("MemShare: preset pressure gives nothing up while the pool has room; above 97% of it ")
    engine = load_engine(tmp_path / "engine")
    assert engine.memshare == make_config("pressure")
    assert engine.build.max_seq_len == 512  # the model's own
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_without_memshare_nothing_is_shared(tiny_checkpoint, tmp_path):
    done = build(tiny_checkpoint, tmp_path / "engine")
    assert "MemShare: off, every request keeps all of its blocks" in done.stdout
    assert load_engine(tmp_path / "engine").memshare == make_config("off")


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_checkpoint, tmp_path):
    done = build(tiny_checkpoint, tmp_path / "out" / "engine", "--memshare", "--shadow", "--dry-run")
    document = json.loads(done.stdout.partition("\n")[2])
    assert document["memshare"]["shadow"] is True
    assert document["build_config"]["plugin_config"]["tokens_per_block"] == 16
    assert "4,096 bytes per block" in document["summary"][1]
    assert "reports repeats but shares nothing (shadow)" in document["summary"][2]
    assert not (tmp_path / "out").exists()


def test_shadow_in_a_file_is_shadow_on_the_command_line(tiny_checkpoint, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"memshare": {"shadow": True}}))
    by_file, by_option = (
        plan_build(BuildOptions(tiny_checkpoint, tmp_path / "e", memshare=True, **options)).engine.memshare
        for options in ({"config_file": file}, {"shadow": True})
    )
    assert by_file == by_option == make_config("aligned", shadow=True)


def test_options_win_over_the_config_file(tiny_checkpoint, tmp_path):
    file = tmp_path / "settings.json"
    settings = {"preset": "paper", "max_distance": 0.25}
    file.write_text(json.dumps({"build": {"tokens_per_block": 32, "max_batch_size": 4}, "memshare": settings}))
    plan = plan_build(
        BuildOptions(tiny_checkpoint, tmp_path / "e", memshare=True, build={"tokens_per_block": 8}, config_file=file)
    )
    assert (plan.engine.build.tokens_per_block, plan.engine.build.max_batch_size) == (8, 4)
    assert plan.engine.memshare == make_config("paper", max_distance=0.25)
    plan = plan_build(BuildOptions(tiny_checkpoint, tmp_path / "e", memshare=True, preset="aligned", config_file=file))
    assert plan.engine.memshare == make_config("aligned", max_distance=0.25)


def test_a_build_that_is_there_needs_force(tiny_checkpoint, tmp_path):
    build(tiny_checkpoint, tmp_path / "engine", "--memshare")
    assert_one_sentence(build(tiny_checkpoint, tmp_path / "engine"), "holds an engine already", "--force")
    assert_one_sentence(build(tiny_checkpoint, tmp_path / "engine", "--dry-run"), "holds an engine already")
    assert load_engine(tmp_path / "engine").memshare.preset == "pressure"
    assert build(tiny_checkpoint, tmp_path / "engine", "--force").returncode == 0
    assert load_engine(tmp_path / "engine").memshare.preset == "off"
    assert_one_sentence(build(tiny_checkpoint, tiny_checkpoint, "--force"), "exists and is no engine directory")


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        (["--tokens-per-block", 24], ["tokens_per_block must be a power of two between 8 and 128, got 24", "(set --"]),
        (["--memshare", "--preset", "alligned"], ["unknown preset alligned (did you mean aligned?)"]),
        (["--preset", "paper"], ["--preset needs --memshare"]),
        (["--shadow"], ["--shadow needs --memshare"]),
        (["--memshare", "--shadow", "--preset", "pressure"], ["shadow changes nothing", "got both"]),
        (["--search-engine", "separate"], ["--search-engine is for the tensorrt backend", "got separate on torch"]),
        (["--backend", "tensorrt", "--kv-cache-dtype", "int8"], ["kv_cache_dtype must be auto or fp8", "got int8"]),
        (["--tp-size", 2], ["tp_size must be 1 on the torch backend, got 2"]),
        (["--pp-size", 2], ["pp_size must be 1 on the torch backend, got 2"]),
        (["--quantization", "fp8"], ["quantization is not available on the torch backend, got fp8"]),
        (["--kv-cache-dtype", "fp8"], ["kv_cache_dtype must be auto, float32, float16 or bfloat16", "got fp8"]),
        (["--kv-cache-dtype", "int4"], ["kv_cache_dtype", "got 'int4'"]),
        (["--max-seq-len", 600], ["at most the model's max_position_embeddings 512, got 600", "lower --max-seq-len"]),
        (["--max-batch-size", 0], ["max_batch_size", "greater than or equal to 1", "got 0"]),
        (["--max-num-tokens", 8], ["max_num_tokens must be at least max_batch_size 64", "got 8"]),
        (["--config", "nowhere.json"], ["the command is missing nowhere.json"]),
    ],
)
def test_bad_options(tiny_checkpoint, tmp_path, options, phrases):
    assert_one_sentence(build(tiny_checkpoint, tmp_path / "out" / "engine", *options), *phrases)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        ('{"memshare": {"max_distanse": 1}}', ["unknown key max_distanse (did you mean max_distance?)"]),
        ('{"memshare": {"max_distance": -1}}', ["max_distance", "greater than or equal to 0", "got -1"]),
        ('{"memshare": {"min_kept": true}}', ["min_kept", "must be a number", "got true"]),
        (
            '{"memshare": {"search_interval": 3}}',
            ["search_interval is not read under pressure", "got 3 (leave it out)"],
        ),
        ('{"memshare": {"preset": "papr"}}', ["unknown preset papr (did you mean paper?)"]),
        ('{"build": {"tokens_per_blok": 8}}', ["unknown key tokens_per_blok (did you mean tokens_per_block?)"]),
        ('{"memshar": {}}', ["unknown key memshar (did you mean memshare?)"]),
        ('{"build": 3}', ["build must be an object, got int"]),
        ('{"build": ', ["settings.json is damaged: not JSON"]),
    ],
)
def test_bad_config_files(tiny_checkpoint, tmp_path, content, phrases):
    file = tmp_path / "settings.json"
    file.write_text(content)
    assert_one_sentence(build(tiny_checkpoint, tmp_path / "engine", "--memshare", "--config", file), *phrases)
    assert list(tmp_path.iterdir()) == [file]


def test_weights_that_overflow_are_refused_unless_the_self_check_is_left_out(own_checkpoint, tmp_path):
    path = own_checkpoint / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1e38}, path, {"format": "pt"})
    done = build(own_checkpoint, tmp_path / "engine")
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if "error" in line]  # transformers shows that it loads
    assert "gave logits that are not finite after" in sentence
    assert "or set --no-self-check" in sentence
    assert not (tmp_path / "engine").exists()
    done = build(own_checkpoint, tmp_path / "engine", "--no-self-check")
    assert done.returncode == 0, done.stderr
    assert load_engine(tmp_path / "engine").build.max_seq_len == 512


@pytest.mark.parametrize(("options", "num_runs"), [((), 1), (("--no-self-check",), 0)])
def test_the_self_check_runs_once_or_not_at_all(tiny_checkpoint, tmp_path, monkeypatch, options, num_runs):
    checked = []
    monkeypatch.setattr(self_check, "check_engine_runs", checked.append)
    assert build(tiny_checkpoint, tmp_path / "engine", *options).returncode == 0
    assert len(checked) == num_runs


def test_sharing_settings_in_a_file_need_memshare(tiny_checkpoint, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"memshare": {"max_distance": 0.25}}))
    assert_one_sentence(build(tiny_checkpoint, tmp_path / "e", "--config", file), "needs --memshare", "settings.json")


def _edit_config(checkpoint: Path, **changes) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "phrases"),
    [
        (lambda c: c.rename(c.with_name("moved")), ["no checkpoint directory at", "--model-dir"]),
        (lambda c: (c / "config.json").unlink(), ["the checkpoint is missing", "config.json", "--model-dir"]),
        (lambda c: (c / "config.json").write_text("{"), ["config.json is damaged: not JSON"]),
        (lambda c: os.truncate(c / "model.safetensors", 6000), ["half-written or damaged: expected", "got 6000"]),
        (lambda c: (c / "model.safetensors").rename(c / "pytorch_model.bin"), ["pytorch_model.bin", "to safetensors"]),
        (lambda c: (c / "tokenizer.json").unlink(), ["has no tokenizer"]),
        (
            lambda c: _edit_config(c, use_sliding_window=True, layer_types=None, max_window_layers=1, sliding_window=9),
            ["uses a sliding window"],
        ),
        (lambda c: _edit_config(c, architectures=["GPT2LMHeadModel"]), ["GPT2LMHeadModel", "rotary embeddings"]),
        (lambda c: _edit_config(c, is_encoder_decoder=True), ["is an encoder-decoder"]),
        (lambda c: _edit_config(c, rope_scaling={"rope_type": "dynamic"}), ["rope_type dynamic"]),
    ],
)
def test_bad_checkpoints(own_checkpoint, tmp_path, damage, phrases):
    damage(own_checkpoint)
    done = build(own_checkpoint, tmp_path / "out" / "engine", "--memshare")
    assert_one_sentence(done, *phrases)
    assert not (tmp_path / "out").exists()


def test_unknown_and_shortened_options_fail(tiny_checkpoint, tmp_path):
    for option in ("--presett", "--forc"):
        done = build(tiny_checkpoint, tmp_path / "engine", option)
        assert done.returncode == 2
        assert f"unrecognized arguments: {option}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_backend_is_chosen_with_its_reason(tiny_checkpoint, tmp_path, monkeypatch):
    def reason(version: str, **options) -> str:
        monkeypatch.setattr(build_module.importlib.metadata, "version", lambda _: version)
        return plan_build(BuildOptions(tiny_checkpoint, tmp_path / "e", **options)).backend_reason

    assert plan_build(BuildOptions(tiny_checkpoint, tmp_path / "e")).backend_reason.startswith(
        "torch (tensorrt_llm is "
    )
    assert reason("1.3.0") == "torch (tensorrt_llm is 1.3.0; engines need 1.2.1)"
    assert reason("1.2.1") == "tensorrt (tensorrt_llm 1.2.1 is installed)"
    assert reason("1.2.1", backend="torch") == "torch (asked for)"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_tensorrt_engine_cannot_be_built_without_tensorrt(tiny_checkpoint, tmp_path):
    done = build(tiny_checkpoint, tmp_path / "out" / "engine", "--backend", "tensorrt")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: a TensorRT engine needs TensorRT 10.14, got No module named 'tensorrt' (pip")
    assert not list(tmp_path.iterdir())


def test_every_preset_is_valid_and_described():
    assert {name: make_config(name).preset for name in PRESETS} == {name: name for name in PRESETS}
    sentences = {name: describe_sharing(make_config(name)) for name in PRESETS}
    tokens, steps = make_config("aligned").protected_tokens, make_config("aligned").protected_steps
    assert f"the last {tokens} tokens and the last {steps} steps are never given up" in sentences["aligned"]
    assert "the newer copy stays" in sentences["aligned"]
    assert "K compared without its rotation" in sentences["aligned"]
    assert "similar steps (cosine at least" in sentences["paper"]
    assert "the older copy stays" in sentences["paper"]
    assert (
        "K and V of all layers together within a relative distance of 0.9, K compared as stored" in sentences["paper"]
    )
    assert "no KV comparison" in sentences["lexical"]
    assert "its last 128 tokens and 50% of its generated pages, below which only repeats go" in sentences["pressure"]
    assert "gives nothing up while the pool has room" in sentences["pressure"]
