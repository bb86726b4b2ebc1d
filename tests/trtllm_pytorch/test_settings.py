"""Settings of the PyTorch backend."""

from __future__ import annotations

import json

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.trtllm.pytorch.settings import load_settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_distnce": 0.4}, "unknown key max_distnce .did you mean max_distance"),
        ({"on_unsupported": "ignore"}, "on_unsupported"),
        ({"preset": "alligned"}, "did you mean aligned"),
        ({"scope": "group"}, "scope must be request"),
        ({"control": "random"}, "control must be none"),
        ({"preset": "drop-duplicate"}, "preset drop-duplicate counts an alias once, which needs attention of our own"),
        (
            {"retired_becomes": "null", "null_pages": "here"},
            "retired_becomes must be alias with preset aligned on TensorRT-LLM's PyTorch backend, got null",
        ),
        (
            {"preset": "pressure", "route": "framework", "protected_steps": 2},
            "route framework protects tokens and knows no steps, got protected_steps 2",
        ),
        ({"preset": "pressure"}, r"needs null_pages, .* or set null_entries to skip\)"),
        ({"preset": "pressure", "null_entries": "skp"}, "null_entries"),
        (
            {"preset": "pressure", "null_entries": "skip", "null_pages": "here"},
            r"null_entries skip reads no null pages, got null_pages here \(keep one\)",
        ),
        ({"null_entries": "skip"}, "null_entries skip needs preset pressure, got aligned"),
        (
            {"preset": "pressure", "null_entries": "skip", "route": "framework"},
            "null_entries is a setting of route overlay, got route framework",
        ),
        (
            {"preset": "pressure", "retired_becomes": "dropped", "null_pages": "here"},
            "retired_becomes must be null or alias .* got dropped .set null_entries to skip",
        ),
        (
            {"preset": "pressure", "null_entries": "skip", "lookahead_tokens": 16},
            r"lookahead_tokens is not read by TensorRT-LLM's PyTorch backend under pressure, got 16 \(leave it out\)",
        ),
        ({"preset": "pressure", "null_entries": "skip", "max_aliases": 4}, "max_aliases 4 has no effect"),
        (
            {"preset": "pressure", "null_entries": "skip", "read_null": True},
            "read_null is not read by TensorRT-LLM's PyTorch backend under pressure, got True",
        ),
        (
            {"preset": "pressure", "route": "framework", "min_run_tokens": 48},
            "min_run_tokens is not read by TensorRT-LLM's PyTorch backend, route framework, got 48",
        ),
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


def test_skipping_needs_no_null_pages(tmp_path):
    path = tmp_path / "memshare.json"
    path.write_text(json.dumps({"preset": "pressure", "null_entries": "skip"}))
    options = load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)}).options
    assert (options.null_entries, options.null_pages) == ("skip", None)


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({}, "preset aligned"),
        ({"shadow": True}, "preset aligned, shadow"),
        ({"preset": "pressure", "route": "framework"}, "preset pressure, route framework, min_kept 0.5"),
        (
            {"preset": "pressure", "null_entries": "skip", "min_kept": 0.75, "shadow": True},
            "preset pressure, shadow, null_entries skip, min_kept 0.75",
        ),
    ],
)
def test_a_line_says_what_was_chosen(values, title, tmp_path):
    path = tmp_path / "memshare.json"
    path.write_text(json.dumps(values))
    assert load_settings({"TRTLLM_MEMSHARE_CONFIG": str(path)}).title == title
