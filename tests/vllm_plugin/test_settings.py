"""Settings of the vLLM plugin, and what one request may say."""

import json

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.request_options import RequestOptions, parse_request_options
from trtllm_memshare.vllm.settings import CONFIG_VARIABLE, load_settings, parse_settings


def test_settings_come_from_additional_config_or_from_a_file(tmp_path):
    values = {"null_pages": "here", "min_kept": 0.25, "admission": "vllm"}
    (tmp_path / "memshare.json").write_text(json.dumps(values))
    environment = {CONFIG_VARIABLE: str(tmp_path / "memshare.json")}
    given = load_settings({"memshare": values, "other": 1}, {})
    assert given == load_settings({}, environment)
    assert given.memshare.pressure
    assert given.memshare.min_kept == 0.25
    assert given.memshare.need == "surprisal-led-redundancy-recency"
    assert given.options.admission == "vllm"
    with pytest.raises(UserError, match=r"given twice.*keep one"):
        load_settings({"memshare": values}, environment)
    assert load_settings({}, {}) == parse_settings({}, "m.json")


@pytest.mark.parametrize(
    ("values", "null_entries"),
    [
        ({}, "skip"),
        ({"null_pages": None}, "skip"),
        ({"null_pages": "here"}, "read"),
        ({"null_pages": "here", "null_entries": "skip"}, "skip"),
        ({"null_pages": "here", "null_entries": "read"}, "read"),
    ],
)
def test_null_pages_are_read_where_there_are_any(values, null_entries):
    assert parse_settings(values, "m.json").options.null_entries == null_entries


def test_null_pages_that_are_to_be_read_have_to_be_there():
    with pytest.raises(
        UserError, match=r"needs null_pages, .* got none .*calibrate MODEL, or leave out null_entries\)"
    ):
        parse_settings({"null_entries": "read"}, "m.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"null_pages": "x", "min_keep": 1}, "unknown key min_keep .did you mean min_kept"),
        ({"null_pages": "x", "min_kept": 2}, "min_kept input should be less than or equal to 1"),
        ({"null_pages": "x", "retired_becomes": "dropped"}, "must be null, or alias with .*, got dropped"),
        ({"null_pages": "x", "need": "age", "retired_becomes": "alias"}, "got retired_becomes alias with need age"),
        ({"null_pages": "x", "shadow": True}, "shadow changes nothing, .*got both"),
        ({"null_pages": "x", "admission": "some"}, "admission"),
        ({"null_pages": "x", "null_entries": "drop"}, "null_entries"),
        ({"null_pages": "x", "read_null": False}, "null_entries says whether .*got read_null False"),
        ({"null_pages": "x", "need": "attention-redundancy"}, "need must be one that vLLM can tell"),
        ({"null_pages": "x", "max_distance": 0.1}, "max_distance 0.1 has no effect beside the other settings"),
        ({"null_pages": "x", "scope": "group"}, "scope group has no effect"),
        ({"null_pages": "x", "control": "streaming"}, "control [a-z]+ has no effect"),
        ([], "must hold a JSON object, got list"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        parse_settings(values, "--additional-config memshare")


def test_a_setting_that_is_not_read_may_stand_where_it_says_nothing_else():
    """One file of settings for several ways to serve."""
    assert parse_settings({"null_pages": "x", "preset": "pressure", "scope": "request"}, "m.json")


def test_a_request_may_switch_off_or_choose_its_floor():
    assert parse_request_options(None, 0.5) == RequestOptions(True, 0.5)
    assert parse_request_options({"min_kept": 0.75, "other": "x"}, 0.5) == RequestOptions(True, 0.75)
    assert parse_request_options({"memshare": 0}, 0.5) == RequestOptions(False, 0.5)
    for extra, message in (
        ({"min_kept": 1.5}, "got 1.5"),
        ({"memshare": "no"}, "got 'no'"),
        ({"min_kept": True}, "True"),
    ):
        with pytest.raises(UserError, match=message):
            parse_request_options(extra, 0.5)
