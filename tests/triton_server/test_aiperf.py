"""AIPerf, NVIDIA's load generator, unmodified: its chat and completions endpoints, and its template on Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triton_server.conftest import OpenAIServer

from benchmarks.triton_load.aiperf import AiperfLoad, LoadFigures, Prompt, find_aiperf, run_aiperf
from trtllm_memshare.errors import UserError

PROMPTS = [Prompt("Q: 51 + 142 + 217 - 254 = ?\n", 30), Prompt("Q: 1 + 1 = ?\n", 20)] * 3


@pytest.fixture(scope="module")
def aiperf() -> Path:
    try:
        return find_aiperf()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def figures(aiperf, openai_server, triton, tmp_path_factory) -> dict[str, LoadFigures]:
    """All runs at a time: most of each is AIPerf's own start."""
    ours = (openai_server.url, openai_server.model)
    theirs = (openai_server.tokenizer_dir, PROMPTS, 3)
    loads = {
        "chat": AiperfLoad(*ours, "chat", *theirs, api_key=openai_server.api_key),
        "completions": AiperfLoad(*ours, "completions", *theirs, streams=False, api_key=openai_server.api_key),
        "triton": AiperfLoad(f"http://127.0.0.1:{triton.http}", "ensemble", "triton", *theirs),
    }
    folder = tmp_path_factory.mktemp("aiperf")
    with ThreadPoolExecutor(len(loads)) as runs:
        return dict(
            zip(loads, runs.map(lambda name: run_aiperf(aiperf, loads[name], folder / name), loads), strict=True)
        )


@pytest.mark.parametrize(("endpoint", "streams"), [("chat", True), ("completions", False), ("triton", True)])
def test_every_request_of_aiperf_is_answered(figures, endpoint, streams):
    found = figures[endpoint]
    assert (found.num_requests, found.num_errors) == (len(PROMPTS), 0)
    assert found.req_s > 0
    if streams:
        assert 0 < found.ttft_p50_ms <= found.ttft_p99_ms
    else:
        assert found.ttft_p50_ms is None


def test_what_a_server_refuses_is_an_error_of_aiperf_s(aiperf, openai_server: OpenAIServer, tmp_path):
    wrong = AiperfLoad(openai_server.url, openai_server.model, "completions", openai_server.tokenizer_dir,
                       [Prompt("Q: 1", 5), Prompt("Q" * 300, 5)], 1, api_key=openai_server.api_key)  # fmt: skip
    found = run_aiperf(aiperf, wrong, tmp_path)
    assert (found.num_requests, found.num_errors) == (1, 1)
