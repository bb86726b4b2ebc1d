"""What is counted of a schedule of vLLM without a model; needs vLLM (``make test-vllm``)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import trtllm_memshare

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation import vllm_run
from trtllm_memshare.evaluation.cache_forms import FORMS, blocks_at_end, demand
from trtllm_memshare.evaluation.vllm_run import make_groups, run_scheduler
from trtllm_memshare.evaluation.vllm_work import VllmWork

MODEL = Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner"
LENGTH = 1300


def work_of(texts: list[list[int]], folder: Path) -> VllmWork:
    """Two requests at a time, which write these texts."""
    save_file(
        {"keys": torch.zeros(1, 4, 2, 32), "bands": torch.tensor([0, 4096], dtype=torch.int32)},
        folder / "null_pages.safetensors",
    )
    requests = [([5, 6, 7 + i], len(text)) for i, text in enumerate(texts)]
    return VllmWork(MODEL, folder, folder, 2, 1, LENGTH, 16, 64, requests, texts=texts)


def random_text(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 90), k=LENGTH)


def test_with_room_every_token_is_computed_once_and_nobody_waits(tmp_path):
    work = work_of([random_text(i) for i in range(2)], tmp_path)
    run = run_scheduler(work, "vllm", "vllm", work.pool_blocks(1))
    assert (run["steps"], run["preemptions"], run["all_free"]) == (LENGTH, 0, True)
    assert run["tokens_computed"] == 2 * (3 + LENGTH - 1)
    times = run["modelled_gpu"]
    assert times == run["modelled_gpu_null_read"]
    assert times["p50_latency_s"] == pytest.approx(2 / times["request_throughput_req_s"])  # both from start to end
    assert 0 < times["mean_first_token_s"] < times["p50_latency_s"] / LENGTH


def test_pages_stand_again_only_where_the_texts_repeat_themselves(tmp_path):
    """``admission`` gives up nothing else. 1,300 tokens are more than any made-up ones would go without a repeat."""
    anew = work_of([random_text(i) for i in range(3)], tmp_path)
    assert run_scheduler(anew, "admission", "vllm", anew.pool_blocks(2) + 20)["retired"] == 0
    twice = work_of([(text := random_text(i)[: LENGTH // 2]) + text for i in range(3)], tmp_path)
    run = run_scheduler(twice, "admission", "vllm", twice.pool_blocks(2) + 20)
    assert run["retired"] > 20
    free, read = (run[name]["request_throughput_req_s"] for name in ("modelled_gpu", "modelled_gpu_null_read"))
    assert 0.5 * free < read < 0.99 * free
    assert run["modelled_gpu"]["p99_latency_s"] > run["modelled_gpu"]["p50_latency_s"]


@pytest.mark.parametrize("arm", ["vllm", "0.75"])
def test_requests_write_their_texts_whoever_is_preempted(tmp_path, monkeypatch, arm):
    work = work_of([random_text(i) for i in range(4)], tmp_path)
    submitted = []
    make_scheduler = vllm_run._make_scheduler

    def make_watched(*arguments):
        scheduler = make_scheduler(*arguments)
        add = scheduler.add_request
        monkeypatch.setattr(scheduler, "add_request", lambda request: (submitted.append(request), add(request)))
        return scheduler

    monkeypatch.setattr(vllm_run, "_make_scheduler", make_watched)
    run = run_scheduler(work, arm, "vllm", work.pool_blocks(2) + 4)
    assert run["preemptions"] > 0
    assert [list(request.output_token_ids) for request in submitted] == work.texts


def test_a_pool_without_room_for_one_request_is_refused(tmp_path):
    work = work_of([random_text(0)], tmp_path)
    with pytest.raises(UserError, match="too small for one request"):
        run_scheduler(work, "vllm", "vllm", 20)


def test_pools_are_shared_as_vllm_shares_them_among_a_models_layers(tmp_path):
    work = work_of([random_text(0)], tmp_path)
    kinds, held = {}, {}
    for name, form in FORMS.items():
        groups = make_groups(replace(work, block_size=form.block_size or 16), form)
        kinds[name] = Counter(type(group.kv_cache_spec).__name__ for group in groups)
        held[name] = blocks_at_end(groups, LENGTH)
    assert kinds == {
        "full": {"FullAttentionSpec": 1},
        "gpt-oss-120b": {"FullAttentionSpec": 1, "SlidingWindowSpec": 1},
        "gemma-3-27b": {"FullAttentionSpec": 1, "SlidingWindowSpec": 6},
        "qwen3-next-80b": {"FullAttentionSpec": 1, "MambaSpec": 3},
    }
    windows = {"gpt-oss-120b": 8 + 1, "gemma-3-27b": 6 * (64 + 1)}  # of 128 and 1,024 tokens
    assert held == {
        "full": (82, 82), "qwen3-next-80b": (3, 3 + 3), **{name: (82, 82 + n) for name, n in windows.items()}
    }  # fmt: skip
    assert demand(groups, [544, 3 * 544], 4) == 4 * (2 + 3)


def test_where_layers_have_windows_only_full_attention_gives_pages(tmp_path):
    """Half of the groups has windows of 128 tokens, which a request fills and no more."""
    work = replace(work_of([random_text(i) for i in range(8)], tmp_path), in_flight=4)
    groups = make_groups(work, FORMS["gpt-oss-120b"])
    blocks = demand(groups, [3 + LENGTH] * 4, 4) // 2
    vllm, half = (run_scheduler(work, arm, "lookahead", blocks, groups) for arm in ("vllm", "0.5-skip"))
    assert (vllm["retired"], half["retired"] > 20) == (0, True)
    assert half["steps"] < 0.9 * vllm["steps"]
    assert vllm["all_free"]
    assert half["all_free"]
