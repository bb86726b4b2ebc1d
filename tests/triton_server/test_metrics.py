"""Metrics of a real server: failures are failures, latencies are the requests', and every query finds its metric."""

from __future__ import annotations

import json
import re
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from triton_server.conftest import ROOT, start_triton, stop_triton

from trtllm_memshare.builder.build_engine import BuildOptions, build_engine, plan_build
from trtllm_memshare.triton.metrics import GAUGES, REFUSED
from trtllm_memshare.triton.probe import why_not_alive, why_not_ready

QUESTION = "Q: 51 + 142 + 217 - 254 = ?\n"
_SELECTOR = re.compile(r"\b((?:nv|memshare)_\w+)(?:\{([^}]*)\})?")


def matching(metrics: dict[str, float], name: str, labels: str = "") -> dict[str, float]:
    """Metrics of a name with all of the labels, written as in a query."""
    wanted = re.findall(r'\w+="[^"]*"', labels)
    return {k: v for k, v in metrics.items() if k.split("{")[0] == name and all(w in k for w in wanted)}


def total(metrics: dict[str, float], name: str, labels: str = "") -> float:
    return sum(matching(metrics, name, labels).values())


def test_gauges_have_tensorrt_llm_s_names(triton):
    triton.generate(text_input=QUESTION, max_tokens=300)
    triton.wait_until(lambda: triton.used_blocks() == 0)
    metrics = triton.metrics()
    for name, (_, label, values) in GAUGES.items():
        for value in values:
            assert matching(metrics, name, f'{label}="{value}"'), (name, value)
    blocks = "nv_trt_llm_kv_cache_block_metrics"
    assert total(metrics, blocks, 'kv_cache_block_type="max"') == 2000
    assert total(metrics, blocks, 'kv_cache_block_type="free"') == 2000
    assert total(metrics, blocks, 'kv_cache_block_type="tokens_per"') == 16
    assert total(metrics, "memshare_blocks") > 0
    assert total(metrics, "memshare_saved_bytes") == total(metrics, "memshare_blocks") * 32768
    assert total(metrics, "nv_trt_llm_runtime_memory_metrics", 'memory_type="cpu"') > 50 << 20
    assert total(metrics, "memshare_seconds_since_step") < 5


def settled(triton) -> dict[str, float]:
    """Metrics with all requests of before in them: an answer is counted after its client has it."""
    seen: list[dict[str, float]] = []

    def has_settled() -> bool:
        time.sleep(1)
        seen.append(triton.metrics())
        requests = [matching(metrics, "memshare_requests_total") for metrics in seen[-2:]]
        return len(requests) == 2 and requests[0] == requests[1]

    triton.wait_until(has_settled)
    return seen[-1]


def test_outcomes_and_latencies_are_the_requests_own(triton):
    def counts(outcome: str) -> float:
        return total(triton.metrics(), "memshare_requests_total", f'outcome="{outcome}"')

    first = "memshare_time_to_first_token_seconds"
    before = settled(triton)
    completed, refused = counts("completed"), counts("refused")
    triton.generate(text_input=QUESTION, max_tokens=200)
    for wrong in ({"top_p": 2.0}, {"beam_width": 2}, {"text_input": "Q" * 5000}):
        with pytest.raises(urllib.error.HTTPError):
            triton.generate(**{"text_input": QUESTION, "max_tokens": 5, **wrong})
    triton.wait_until(lambda: (counts("completed"), counts("refused")) == (completed + 1, refused + 3))
    after = triton.metrics()

    def grown(name: str) -> float:
        return total(after, name) - total(before, name)

    assert grown(f"{first}_count") == grown("memshare_request_seconds_count") == 1
    assert 0 < grown(f"{first}_sum") < grown("memshare_request_seconds_sum")
    assert grown("nv_llm_input_token_len_sum") == len(QUESTION)
    assert grown("nv_llm_output_token_len_sum") == 200
    buckets = matching(after, f"{first}_bucket")
    assert max(buckets.values()) == total(after, f"{first}_count")
    assert any('le="+Inf"' in name for name in buckets)


def test_every_query_of_the_dashboard_and_of_the_alerts_finds_its_metric(triton):
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"][0]["rules"]
    queries += [rule["expr"] for rule in rules]
    assert len(queries) > 35
    metrics = triton.metrics()
    for query in queries:
        found = _SELECTOR.findall(query)
        assert found, query
        for name, labels in found:
            # Reasons of refusals appear as they occur.
            assert name == REFUSED or matching(metrics, name, labels), query


def test_probes_see_a_server_that_works(triton):
    server, metrics = (f"http://127.0.0.1:{port}" for port in (triton.http, triton.metrics_port))
    assert why_not_ready(server, 10) == ""
    assert why_not_alive(server, f"{metrics}/metrics", 60, 10) == ""
    assert "the server is not ready" in why_not_ready("http://127.0.0.1:1", 1)
    assert "the server does not answer" in why_not_alive("http://127.0.0.1:1", "http://127.0.0.1:1", 60, 1)


def test_pressure_is_in_triton_s_log_and_over_once_nobody_is_left(tmp_path):
    options = BuildOptions(output_dir=tmp_path / "engine", memshare=True,
                           build={"max_seq_len": 512, "max_batch_size": 4})  # fmt: skip
    build_engine(plan_build(options))
    server = start_triton(tmp_path, options.output_dir, kv_cache_blocks=40)
    try:
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda _: server.generate(text_input=QUESTION, max_tokens=400), range(4)))
        server.wait_until(lambda: "pressure_ends" in server.log.read_text(errors="replace"))
        server.wait_until(lambda: total(server.metrics(), "memshare_pressure", 'pressure_metric="active"') == 0)
        assert total(server.metrics(), "memshare_pressure", 'pressure_metric="episodes"') == 1
    finally:
        stop_triton(server)
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if "triton_log.py" in line]
    quoted = [json.JSONDecoder().raw_decode(line, line.index('"{'))[0] for line in lines]  # Triton quotes messages
    begins, ends = (json.loads(line) for line in quoted)
    assert (begins["event"], begins["max_blocks"]) == ("pressure_begins", 40)
    assert ends["event"] == "pressure_ends"
    assert ends["used_blocks"] <= 0.92 * 40
    assert ends["retired_pages"] > 0
