"""What this surface reports: metrics, the statistics file, a line of the log when pressure begins and when it ends."""

from __future__ import annotations

import json
import logging
import math
import random
import socket
import time
from dataclasses import replace
from functools import partial

import pytest
from prometheus_client import CollectorRegistry
from trtllm_pytorch.conftest import make_settings, make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text
from trtllm_pytorch.fake_v1 import FakeKVCacheManager
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2, FakeMainKVCacheManagerV2
from trtllm_pytorch.test_pressure import PRESSURE

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.metrics import Reporter
from trtllm_memshare.trtllm.pytorch.pauses import AvoidedPauses
from trtllm_memshare.trtllm.pytorch.totals import NOTHING, overlay_totals

BLOCK_BYTES = 2 * 2 * 8 * 2 * 4  # layers, K and V, tokens, elements, float32
KINDS = {"V1": FakeKVCacheManager, "V2": FakeKVCacheManagerV2, "V2 main": FakeMainKVCacheManagerV2}


def make_executor(kind: str, num_blocks: int, num_requests: int, **config) -> FakeExecutor:
    """Requests of 24 pages each that come at once."""
    host = {"host_cache_size": 1 << 30} if kind.startswith("V2") else {}
    executor = FakeExecutor(make_manager(make_sharing_class(KINDS[kind], **config), num_blocks, 8, config=host), True)
    rng = random.Random(3)
    for request_id in range(num_requests):
        executor.submit(request_id, repetitive_text(rng, 5 + request_id), repetitive_text(rng, 180))
    return executor


def values(totals) -> dict[str, float]:
    """Every sample of a fresh registry after one report, by name or by name and label."""
    registry = CollectorRegistry()
    Reporter(lambda: totals, make_settings(), registry).report()
    return {
        " ".join([s.name, *s.labels.values()]): s.value
        for metric in registry.collect()
        for s in metric.samples
        if not s.name.endswith("_created")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_pressure_shows_in_metrics_and_in_two_lines_of_the_log(kind, null_pages, caplog):
    """Four requests in 60 pages and those for null: two fit whole, all of them at their floors."""
    caplog.set_level(logging.INFO, logger="trtllm_memshare.pressure")
    executor = make_executor(kind, 67, 4, null_pages=null_pages, **{**PRESSURE, "min_kept": 0.4})
    shared, seen = executor.manager.memshare, []
    while executor.active:
        executor.step()
        seen.append(overlay_totals(shared))
        held = sum(len(executor._own_pages(i)) for i in executor.processed)
        logical = sum(known.pages.num_blocks for known in shared.requests)
        assert seen[-1]["bytes_saved_now"] == seen[-1]["retired_now"] * BLOCK_BYTES
        assert seen[-1]["retired_now"] >= logical - held  # pages that TensorRT-LLM appended are taken over later
        counts = [shared.manager.page_counts(known.request_id) for known in shared.requests]
        at_floor = sum(gone > 0 and full - gone <= math.ceil(0.4 * full) for full, gone in counts)
        assert seen[-1]["requests_at_floor"] == at_floor
    last = seen[-1]
    assert executor.num_pauses == last["pauses"] == 0
    assert last["pauses_avoided"] == 2
    forgotten = shared.manager.stats().forgotten
    assert sum(last["retired_pages"].values()) == forgotten > 20
    assert last["retired_pages"]["repeated"] > 0
    assert last["retired_pages"]["needed_least"] > 0
    assert last["retired_pages"]["resumed"] == 0
    assert max(t["retired_now"] for t in seen) > 20
    assert max(t["requests_at_floor"] for t in seen) > 0
    active = [t["pressure_active"] for t in seen]
    assert active.index(True) < len(active) - 1 - active[::-1].index(True) < len(active) - 1
    assert (last["retired_now"], last["requests_at_floor"], last["pressure_active"]) == (0, 0, False)
    lines = [json.loads(r.message) for r in caplog.records if r.name == "trtllm_memshare.pressure"]
    assert [line["event"] for line in lines] == ["pressure_begins", "pressure_ends"] * last["pressure_episodes"]
    assert (lines[0]["max_blocks"], lines[0]["running"]) == (60, 4)
    assert sum(line.get("retired_pages", 0) for line in lines) == forgotten
    shown = values(last)
    assert shown["memshare_pressure episodes"] == last["pressure_episodes"]
    assert shown["memshare_pressure pauses_avoided"] == last["pauses_avoided"]
    assert shown["memshare_retired_pages_total repeated"] == last["retired_pages"]["repeated"]
    assert shown["memshare_retired_pages_total needed_least"] == last["retired_pages"]["needed_least"]


@pytest.mark.parametrize("preset", ["lexical", "pressure"])
@pytest.mark.parametrize("kind", KINDS)
def test_pauses_are_counted_whatever_is_shared(kind, preset, null_pages):
    """V1 frees whom it pauses, V2 suspends: eight requests whose floors do not fit."""
    config = {**PRESSURE, "min_kept": 0.6, "null_pages": null_pages} if preset == "pressure" else {}
    executor = make_executor(kind, 40 + 7 * bool(config), 8, **config)
    while executor.active:
        executor.step()
    now = overlay_totals(executor.manager.memshare)
    # Main's V2 also suspends whom it has just resumed, without a step between: no pause more.
    assert 3 < now["pauses"] <= executor.num_pauses
    # V1 pauses one right behind its prompt, which took the last page: it has not generated, and is not counted.
    assert executor.num_pauses - now["pauses"] <= (kind == "V1") or kind == "V2 main"
    assert not now["errors"]
    if config and kind == "V1":
        assert now["retired_pages"]["resumed"] > 0
    assert values(now)["memshare_pauses_total"] == now["pauses"]


def test_who_would_have_been_paused_is_the_youngest_and_counts_once():
    avoided, pages = AvoidedPauses(), {1: 10, 2: 6, 3: 4}
    for missing, expected in ((-3, 0), (1, 1), (4, 1), (5, 2), (10, 2), (11, 3), (2, 3), (0, 3), (3, 4)):
        avoided.look(missing, pages)
        assert avoided.num == expected, missing


def test_metrics_and_the_statistics_file_say_what_was_shared(tmp_path):
    started, manager = time.perf_counter(), make_manager(make_sharing_class(), 200, 8)
    executor = FakeExecutor(manager, True)
    text = repetitive_text(random.Random(1), 150)
    executor.submit(0, text[:5], text)
    while executor.active:
        executor.step()
    registry, stats_file = CollectorRegistry(), tmp_path / "totals.json"
    reporter = Reporter(
        partial(overlay_totals, manager.memshare), replace(make_settings(), stats_file=stats_file), registry
    )
    reporter.report()
    reporter.report()
    shared = manager.memshare.manager.stats().shared
    assert shared > 0
    assert registry.get_sample_value("memshare_blocks_shared_total") == shared
    assert registry.get_sample_value("memshare_saved_bytes_total") == shared * BLOCK_BYTES
    document = json.loads(stats_file.read_text())
    assert document["blocks_shared"] == shared
    assert 0 < document["host_seconds"] < time.perf_counter() - started
    assert document.keys() - {"iterations"} == overlay_totals(manager.memshare).keys() == NOTHING.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["totals.json"]


def test_a_taken_port_and_a_full_disk_are_said_once(tmp_path, caplog):
    settings = replace(make_settings(), stats_file=tmp_path / "gone" / "totals.json")
    gone = Reporter(lambda: NOTHING, settings, CollectorRegistry())
    gone.report()
    gone.report()
    assert caplog.text.count("statistics cannot be written") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"METRICS_PORT {port} cannot be opened: Address already in use"):
            Reporter(lambda: NOTHING, replace(make_settings(), metrics_port=port), CollectorRegistry())


def test_a_report_that_fails_is_said_once_and_ends_nothing(caplog):
    reporter = Reporter(lambda: 1 / 0, make_settings(), CollectorRegistry())
    reporter.report()
    reporter.close()
    assert caplog.text.count("metrics cannot be brought up to date: ZeroDivisionError") == 1
