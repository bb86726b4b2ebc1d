"""AIPerf, NVIDIA's load generator, unmodified: its chat and completions endpoints, and its template on Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.triton_load.aiperf import AiperfLoad, LoadFigures, Prompt, find_aiperf, run_aiperf
from trtllm_memshare.errors import UserError

PROMPTS = [Prompt("Q: 51 + 142 + 217 - 254 = ?\n", 30), Prompt("Q: 1 + 1 = ?\n", 20)] * 3
TOO_LONG = Prompt("Q" * 300, 5)


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
    tokenizer, key = openai_server.tokenizer_dir, openai_server.api_key
    loads = {
        "chat": AiperfLoad(*ours, "chat", tokenizer, PROMPTS, 3, api_key=key),
        "completions": AiperfLoad(*ours, "completions", tokenizer, [*PROMPTS, TOO_LONG], 3, streams=False, api_key=key),
        "triton": AiperfLoad(f"http://127.0.0.1:{triton.http}", "ensemble", "triton", tokenizer, PROMPTS, 3),
    }
    folder = tmp_path_factory.mktemp("aiperf")
    with ThreadPoolExecutor(len(loads)) as runs:
        return dict(
            zip(loads, runs.map(lambda name: run_aiperf(aiperf, loads[name], folder / name), loads), strict=True)
        )


@pytest.mark.parametrize("endpoint", ["chat", "triton"])
def test_every_stream_is_answered_and_timed(figures, endpoint):
    found = figures[endpoint]
    assert (found.num_requests, found.num_errors) == (len(PROMPTS), 0)
    assert 0 < found.ttft_p50_ms <= found.ttft_p99_ms


def test_whole_answers_come_and_a_refusal_is_an_error(figures):
    found = figures["completions"]
    assert (found.num_requests, found.num_errors) == (len(PROMPTS), 1)
    assert found.req_s > 0
    assert found.ttft_p50_ms is None
