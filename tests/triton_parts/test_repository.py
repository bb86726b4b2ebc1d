"""A model repository is written whole or not at all, within limits that can hold."""

from __future__ import annotations

import ast
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.engine.null_page import NullPageSet
from trtllm_memshare.engine.null_page_files import save_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.scheduler import MAX_UTILIZATION
from trtllm_memshare.triton.pool_size import check_one_fits, enough_blocks
from trtllm_memshare.triton.repository import RepositoryOptions, write_repository
from trtllm_memshare.triton.repository_marker import MARKER, can_wait, flavour_of
from trtllm_memshare.triton.token_model import make_executor


@pytest.fixture(scope="module")
def engine_dir(tiny_checkpoint, tmp_path_factory) -> Path:
    options = BuildOptions(model_dir=tiny_checkpoint, output_dir=tmp_path_factory.mktemp("engine") / "engine",
                           memshare=True, build={"max_seq_len": 128, "max_batch_size": 4})  # fmt: skip
    build_engine(plan_build(options))
    return options.output_dir


def test_a_repository_is_written_whole_or_not_at_all(engine_dir, tmp_path):
    target = tmp_path / "repository"
    options = RepositoryOptions(engine_dir, target)
    write_repository(options)
    config = (target / "tensorrt_llm" / "config.pbtxt").read_text()
    assert f'"{engine_dir.resolve()}"' in config
    assert "$" not in config
    compile((target / "ensemble" / "1" / "model.py").read_text(), "model.py", "exec")
    with pytest.raises(UserError, match=r"there is a model repository at .* already \(add --force"):
        write_repository(options)
    write_repository(RepositoryOptions(engine_dir, target, max_queue_size=5, force=True))
    assert 'key: "max_requests" value: { string_value: "9" }' in (target / "ensemble" / "config.pbtxt").read_text()
    assert os.listdir(tmp_path) == ["repository"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_blocks": 7}, "must hold one request of max_seq_len 128: 8 blocks of 16 tokens, got 7"),
        ({"max_prompt_tokens": 128}, "--max-prompt-tokens must be between 1 and 127, got 128"),
        ({"max_output_tokens": 0}, "--max-output-tokens must be between 1 and 127, got 0"),
        ({"max_queue_size": -1}, "--max-queue-size must not be negative, got -1"),
        ({"max_prompt_bytes": 0}, "--max-prompt-bytes must be at least 1, got 0"),
        ({"cancellation_check_period_ms": 0}, "--cancellation-check-period-ms must be between 10 and 60000, got 0"),
    ],
)
def test_limits_that_cannot_hold_leave_nothing_behind(engine_dir, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write_repository(RepositoryOptions(engine_dir, tmp_path / "repository", **options))
    assert list(tmp_path.iterdir()) == []


def test_null_pages_are_counted_beside_one_request(engine_dir, tmp_path):
    """Else the server would start, and refuse every request of full length."""
    folder = tmp_path / "engine"
    shutil.copytree(engine_dir, folder)
    engine = load_engine(folder)
    c, bands = engine.checkpoint, torch.tensor([0, 50, 90, 128], dtype=torch.int32)
    save_null_pages(
        folder,
        NullPageSet(
            torch.ones(3, c.num_layers, c.num_kv_heads, c.head_dim),
            bands.numpy(),
            torch.full((3, c.num_layers, c.num_attention_heads), -30.0),
        ),
    )
    sharing = dataclasses.replace(engine, memshare=make_config("aligned"))
    assert enough_blocks(sharing, 4) == 4 * 8  # nothing is forgotten: the blocks are like any others
    assert enough_blocks(engine, 4) == 4 * 8 + 3
    check_one_fits(engine, 11)
    message = r"must hold one request of max_seq_len 128: 8 blocks of 16 tokens and 3 null pages, got 10 .set it to 11"
    with pytest.raises(UserError, match=message):
        write_repository(RepositoryOptions(folder, tmp_path / "repository", kv_cache_blocks=10))
    with pytest.raises(UserError, match=message):
        make_executor(engine, 10, MAX_UTILIZATION)


def test_a_folder_with_other_things_is_not_replaced(engine_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a repository of this project"):
        write_repository(RepositoryOptions(engine_dir, tmp_path, force=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_path_is_written_so_that_triton_reads_it_back(engine_dir, tmp_path):
    odd = tmp_path / 'an "engine" \\ of é'
    shutil.copytree(engine_dir, odd)
    write_repository(RepositoryOptions(odd, tmp_path / "repository"))
    config = (tmp_path / "repository" / "tensorrt_llm" / "config.pbtxt").read_text()
    (line,) = [line for line in config.splitlines() if 'key: "engine_dir"' in line]
    written = line.partition("string_value: ")[2].removesuffix(" } }")
    # Of the escapes of protobuf's text format those that are Python's too.
    assert ast.literal_eval(written) == str(odd)


def test_a_link_to_a_repository_stays_a_link(engine_dir, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "repository")
    for size in (5, 6):
        write_repository(RepositoryOptions(engine_dir, tmp_path / "link", max_queue_size=size, force=True))
    assert (tmp_path / "link").is_symlink()
    config = (tmp_path / "there" / "repository" / "ensemble" / "config.pbtxt").read_text()
    assert 'key: "max_requests" value: { string_value: "10" }' in config
    assert (os.listdir(tmp_path / "there"), sorted(os.listdir(tmp_path))) == (["repository"], ["link", "there"])


def test_the_old_repository_is_there_until_the_new_one_is(engine_dir, tmp_path, monkeypatch):
    target = tmp_path / "repository"
    write_repository(RepositoryOptions(engine_dir, target, max_queue_size=5))
    before = (target / "ensemble" / "config.pbtxt").read_text()
    rename = os.rename

    def fail(source, place):
        if Path(place) == target.resolve() and not str(source).endswith(".retired"):
            raise OSError("no room")
        rename(source, place)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no room"):
        write_repository(RepositoryOptions(engine_dir, target, max_queue_size=6, force=True))
    assert (target / "ensemble" / "config.pbtxt").read_text() == before
    assert os.listdir(tmp_path) == ["repository"]


@pytest.mark.parametrize(
    ("marker", "message"),
    [("{}", "must say flavour engine or llmapi, got None"), ("{", "is damaged"), ("[]", "")],
)
def test_a_damaged_marker_is_one_sentence(tmp_path, marker, message):
    (tmp_path / MARKER).write_text(marker)
    for read in (flavour_of, can_wait):
        with pytest.raises(UserError, match=message + r".*write the repository again with memshare triton repository"):
            read(tmp_path)
