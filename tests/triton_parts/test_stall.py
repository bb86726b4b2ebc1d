"""What the launcher is told of a model's process: whether it moves, and whether it would wait for its turn."""

from __future__ import annotations

import json
import threading

from fakes.counting_runner import CountingRunner

from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.triton.repository_marker import MARKER, can_wait
from trtllm_memshare.triton.runtime import give_sign_of_life, signs_of_life
from trtllm_memshare.triton.token_model import TokenModel


def test_a_step_that_hangs_is_no_movement_and_idleness_is(boundaries):
    runner, reached, go = CountingRunner(), threading.Event(), threading.Event()

    def hang(batch) -> None:
        reached.set()
        go.wait(60)

    with Executor(runner, make_config("off"), boundaries, 512, max_batch_size=4) as executor:  # type: ignore[arg-type]
        model = object.__new__(TokenModel)
        model._executor, model._last_step = executor, -1
        assert [model.is_moving() for _ in range(3)] == [True] * 3
        runner.before_step = hang
        handle = executor.submit([40], SamplingParams(5))
        assert reached.wait(60)
        model.is_moving()  # there may have been a step since the last call
        assert [model.is_moving() for _ in range(3)] == [False] * 3
        go.set()
        handle.result(60)
        assert model.is_moving()


def test_the_last_sign_of_life_of_each_model_counts(tmp_path, monkeypatch):
    give_sign_of_life("ensemble")  # without a launcher there is nobody to tell
    assert signs_of_life(tmp_path) == {}
    monkeypatch.setenv("MEMSHARE_RUNTIME_DIR", str(tmp_path))
    give_sign_of_life("ensemble")
    first = signs_of_life(tmp_path)["ensemble"]
    give_sign_of_life("tensorrt_llm")
    give_sign_of_life("ensemble")
    signs = signs_of_life(tmp_path)
    assert first < signs["tensorrt_llm"] < signs["ensemble"]


def test_only_repositories_whose_models_wait_get_a_spare(tmp_path):
    assert not can_wait(tmp_path)  # somebody else's
    for marker, waits in (
        ({"flavour": "llmapi"}, False),
        ({"flavour": "engine"}, False),
        ({"flavour": "engine", "can_wait": True}, True),
    ):
        (tmp_path / MARKER).write_text(json.dumps(marker))
        assert can_wait(tmp_path) is waits
