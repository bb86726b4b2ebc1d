"""Which engines, prompts, devices and places ``explain`` takes, and one sentence for those it does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nightly import at_night
from report.test_explain import PROMPT

from trtllm_memshare.__main__ import main
from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine.engine_dir import Engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.report.explain import explain
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.search.config import make_config


@pytest.fixture(scope="module")
def engine(bundled_model, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("explain") / "engine"
    return build_engine(plan_build(BuildOptions(bundled_model, folder, memshare=True, preset="aligned")))


def test_a_gpu_that_is_not_there_is_named(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    base = ["explain", "--engine-dir", str(engine.engine_dir), "--prompt", PROMPT, "--device", "cuda"]
    with pytest.raises(UserError, match="device cuda needs a CUDA GPU, torch finds none"):
        main([*base, "--output", str(tmp_path / "page.html")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--prompt", "Q: \udcff"], "a prompt holds half of a surrogate pair, which no tokenizer encodes"),
        (["--prompt", "  "], "--prompt must be text that the tokenizer knows"),
        (["--set", "max_distanc=1"], "unknown key max_distanc .did you mean max_distance"),
        (["--set", "shadow=true"], "explain shows what sharing does, got shadow True"),
        (["--output", "no/such/folder/page.html"], "cannot write no/such/folder/page.html"),
        (["--prompt", "Q: 1 + 1 = ?\n" * 400], "must fit max_seq_len"),
        (["--max-new-tokens", "0"], "max_new_tokens must be between 1 and"),
        (["--kv-cache-blocks", "40"], "--kv-cache-blocks is for preset pressure, got it with aligned"),
        (["--preset", "pressure", "--kv-cache-blocks", "1"], "need 2 blocks of 16 at their floor, the pool has 1"),
        (["--preset", "pressure", "--kv-cache-blocks", "0"], "must have between 1 and"),
    ],
)
def test_errors_of_users(engine, tmp_path, changes, message):
    base = ["explain", "--engine-dir", str(engine.engine_dir), "--prompt", PROMPT, "--device", "cpu"]
    with pytest.raises(UserError, match=message):
        main([*base, "--output", str(tmp_path / "page.html"), *changes])
    assert not (tmp_path / "page.html").exists()


def test_an_engine_without_sharing_has_nothing_to_explain(bundled_model, tmp_path):
    build_engine(plan_build(BuildOptions(model_dir=bundled_model, output_dir=tmp_path / "engine")))
    with pytest.raises(UserError, match=r"shares nothing, so there is nothing to explain \(give --preset aligned\)"):
        main(["explain", "--engine-dir", str(tmp_path / "engine"), "--prompt", PROMPT])


def test_a_prompt_that_begins_with_the_first_special_token_gets_no_second_one(engine, tmp_path):
    folder = Path(shutil.copytree(engine.engine_dir, tmp_path / "engine"))
    path = folder / "model" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<pad>", "type_id": 0}})
    document["post_processor"]["special_tokens"] = {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}}
    path.unlink()  # may be a link to the bundled model's
    path.write_text(json.dumps(document))
    path = path.with_name("tokenizer_config.json")
    settings = {**json.loads(path.read_text()), "bos_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    path.unlink()
    path.write_text(json.dumps(settings))
    engine = load_engine(folder)
    plain, begun = (explain(engine, engine.memshare, text, 8, "cpu") for text in (PROMPT, f"<pad>{PROMPT}"))
    assert plain.num_prompt_tokens == len(PROMPT) + 1 == begun.num_prompt_tokens
    assert plain.blocks == begun.blocks


def test_the_pool_has_the_type_that_the_engine_was_built_with(bundled_model, tmp_path, monkeypatch):
    build = {"kv_cache_dtype": "bfloat16"}
    plan = plan_build(BuildOptions(bundled_model, tmp_path / "engine", memshare=True, preset="aligned", build=build))
    engine, seen = build_engine(plan), []
    monkeypatch.setattr(
        "trtllm_memshare.report.explain.tell_story", lambda runner, *rest: seen.append(runner.pool.dtype)
    )
    explain(engine, engine.memshare, PROMPT, 8, "cpu")
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    "config",
    [make_config("pressure", retired_becomes="dropped"), at_night(make_config("aligned", search_interval=1))],
    ids=lambda config: config.preset,
)
def test_a_prompt_that_takes_several_steps_is_counted_in_tokens(engine, config):
    """One step for the whole prompt and one for each 9 tokens of it: the same memory at the same token."""
    chunked = replace(engine, build=engine.build.model_copy(update={"max_num_tokens": 9}))
    whole, several = (explain(e, config, PROMPT, 600, "cpu") for e in (engine, chunked))
    assert whole.freed > 0
    assert several.memory[0][0] == whole.memory[0][0] == whole.num_prompt_tokens
    assert several.memory == whole.memory
    given_up = [[(b.index, b.given_up_at) for b in s.blocks if b.given_up_at is not None] for s in (whole, several)]
    assert given_up[0] == given_up[1]


def test_an_engine_of_another_backend_is_refused(engine):
    with pytest.raises(UserError, match="explain runs engines of the torch backend, got one of tensorrt"):
        explain(replace(engine, backend="tensorrt"), engine.memshare, PROMPT, 8, "cpu")


def test_a_pool_that_no_memory_holds_is_one_sentence_with_the_device_that_was_chosen(engine):
    config = make_config("pressure", retired_becomes="dropped")
    with pytest.raises(UserError, match=r"blocks needs [\d,]+ bytes, which (cpu|cuda) does not have \(give fewer"):
        explain(engine, config, PROMPT, 8, "auto", 100_000_000)


def test_a_folder_without_the_right_to_write_is_found_out_before_anything_is_generated(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("trtllm_memshare.report.explain.explain", lambda *arguments: pytest.fail("generated"))
    base = ["explain", "--engine-dir", str(engine.engine_dir), "--prompt", PROMPT, "--device", "cpu"]
    with pytest.raises(UserError, match=r"--output cannot be written: .*page.html: no right to write to"):
        main([*base, "--output", str(tmp_path / "page.html")])


def test_an_engine_in_shadow_gives_nothing_back_and_no_page_says_so(bundled_model, tmp_path, capsys):
    options = BuildOptions(bundled_model, tmp_path / "engine", memshare=True, preset="aligned", shadow=True)
    build_engine(plan_build(options))
    base = ["explain", "--engine-dir", str(tmp_path / "engine"), "--prompt", PROMPT, "--device", "cpu"]
    base += ["--output", str(tmp_path / "page.html"), "--max-new-tokens", "8"]
    with pytest.raises(UserError, match=r"runs in shadow and gives no memory back, .* \(give --set shadow=false for"):
        main(base)
    assert not (tmp_path / "page.html").exists()
    main([*base, "--set", "shadow=false"])
    assert (tmp_path / "page.html").exists()
