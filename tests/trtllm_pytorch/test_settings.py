"""Settings of the PyTorch backend, and what it reports: metrics, the statistics file."""

from __future__ import annotations

import json
import random
import socket

import pytest
from prometheus_client import CollectorRegistry
from trtllm_pytorch.conftest import make_settings, make_sharing_class
from trtllm_pytorch.fake_executor import FakeExecutor, make_manager, repetitive_text

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.metrics import Reporter, totals
from trtllm_memshare.trtllm.pytorch.settings import load_settings


def test_metrics_and_the_statistics_file_say_what_was_shared(tmp_path):
    manager = make_manager(make_sharing_class(), 200, 8)
    executor = FakeExecutor(manager, True)
    text = repetitive_text(random.Random(1), 150)
    executor.submit(0, text[:5], text)
    while executor.active:
        executor.step()
    registry = CollectorRegistry()
    settings = make_settings()
    stats_file = tmp_path / "totals.json"
    reporter = Reporter(manager.memshare, type(settings)(settings.memshare, settings.options, stats_file), registry)
    reporter.report()
    reporter.report()
    shared = manager.memshare.manager.stats().shared
    assert shared > 0
    assert registry.get_sample_value("memshare_blocks_shared_total") == shared
    block_bytes = 2 * 2 * 8 * 2 * 4  # layers, K and V, tokens, elements, float32
    assert registry.get_sample_value("memshare_saved_bytes_total") == shared * block_bytes
    document = json.loads(stats_file.read_text())
    assert document["blocks_shared"] == shared
    assert document.keys() - {"iterations"} == totals(manager.memshare, block_bytes).keys()
    assert [p.name for p in tmp_path.iterdir()] == ["totals.json"]


def test_a_taken_port_and_a_full_disk_are_said_once(tmp_path, caplog):
    manager = make_manager(make_sharing_class(), 40, 8)
    settings = make_settings()
    gone = Reporter(
        manager.memshare,
        type(settings)(settings.memshare, settings.options, tmp_path / "gone" / "totals.json"),
        CollectorRegistry(),
    )
    gone.report()
    gone.report()
    assert caplog.text.count("statistics cannot be written") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"METRICS_PORT {port} cannot be opened: Address already in use"):
            Reporter(
                manager.memshare, type(settings)(settings.memshare, settings.options, None, port), CollectorRegistry()
            )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_distnce": 0.4}, "unknown key max_distnce .did you mean max_distance"),
        ({"on_unsupported": "ignore"}, "on_unsupported"),
        ({"preset": "alligned"}, "did you mean aligned"),
        ({"scope": "group"}, "scope must be request"),
        ({"control": "random"}, "control must be none"),
        ({"preset": "drop-duplicate"}, "preset drop-duplicate counts an alias once, which needs attention of our own"),
        ([1], "must hold a JSON object"),
    ],
)
def test_wrong_settings_are_named(values, message, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)})


def test_settings_are_laid_over_the_preset(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"preset": "lexical", "max_aliases": 3, "on_unsupported": "warn"}))
    settings = load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path), "TRTLLM_MEMSHARE_METRICS_PORT": "9400"})
    assert (settings.memshare.preset, settings.memshare.accept_all, settings.memshare.max_aliases) == (
        "lexical",
        True,
        3,
    )
    assert (settings.options.on_unsupported, settings.metrics_port) == ("warn", 9400)
    with pytest.raises(UserError, match="METRICS_PORT must be a port"):
        load_settings({"TRTLLM_MEMSHARE_METRICS_PORT": "http"})
    with pytest.raises(UserError, match="must lie in a folder that exists"):
        load_settings({"TRTLLM_MEMSHARE_STATS_FILE": str(tmp_path / "none" / "totals.json")})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)})
    with pytest.raises(UserError, match="CONFIG cannot be read"):
        load_settings({"TRTLLM_MEMSHARE_CONFIG": str(tmp_path / "none.json")})


def test_pressure_ranks_by_what_this_backend_hands_out(tmp_path):
    path = tmp_path / "memshare.json"
    path.write_text(json.dumps({"preset": "pressure", "null_pages": "here"}))
    assert load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)}).memshare.need == "redundancy"
    path.write_text(json.dumps({"preset": "pressure", "null_pages": "here", "need": "age"}))
    assert load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)}).memshare.need == "age"
