"""A tiny engine with random weights, and a data set whose answers are what its full cache generates.

A random model falls into loops, so that much of what it writes can be shared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.engine_dir import write_engine
from trtllm_memshare.evaluation.session import Session
from trtllm_memshare.search.config import make_config

PROMPTS = [f"Q: {100 + 37 * i} + {20 + 7 * i} = ?\n" for i in range(8)]


def write_lines(path: Path, **extra: list[str]) -> Path:
    """A data set of PROMPTS; each keyword is a field with one value per line."""
    rows = [
        {"task_id": i, "prompt": p, "output_tokens": 160, **{key: values[i] for key, values in extra.items()}}
        for i, p in enumerate(PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def engine_dir(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity") / "engine"
    build = BuildConfig(max_seq_len=512, tokens_per_block=8, max_batch_size=4)
    write_engine(folder, read_checkpoint(tiny_checkpoint), build, make_config("aligned"), False)
    return folder


@pytest.fixture(scope="session")
def answered(engine_dir, tmp_path_factory) -> Path:
    """Lines with the full cache's own final answers."""
    path = write_lines(tmp_path_factory.mktemp("fidelity") / "plain.jsonl")
    session = Session(engine_dir, path, device="cpu")
    answers = session.answers(session.generate("full", make_config("off")))
    return write_lines(path.with_name("answered.jsonl"), answer=answers)
