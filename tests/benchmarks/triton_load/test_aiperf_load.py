"""AIPerf as a load, without AIPerf: the command, the export, and what a run that fails says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.triton_load import aiperf
from benchmarks.triton_load.aiperf import (
    AiperfLoad,
    LoadFigures,
    Prompt,
    aiperf_command,
    find_aiperf,
    read_export,
    run_aiperf,
)
from trtllm_memshare.errors import UserError

EXPORT = {
    "request_throughput": {"unit": "requests/sec", "avg": 3.5},
    "time_to_first_token": {"unit": "ms", "p50": 117.0, "p99": 174.0},
    "request_count": {"unit": "requests", "avg": 6.0},
    "error_summary": [{"error_details": {"code": 400}, "count": 2}, {"error_details": {"code": 503}, "count": 1}],
}


def load(**changes) -> AiperfLoad:
    fields = {"url": "http://127.0.0.1:8000", "model": "ensemble", "endpoint": "triton",
              "tokenizer_dir": Path("model"), "clients": 64,
              "prompts": [Prompt("a", 5), Prompt('"b"\n', 7)]}  # fmt: skip
    return AiperfLoad(**{**fields, **changes})


def stand_in(folder: Path, code: str) -> Path:
    """An executable that is called as AIPerf is."""
    path = folder / "aiperf"
    path.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\n{code}\n")
    path.chmod(0o755)
    return path


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_triton_is_asked_through_the_template_and_openai_by_its_own_endpoint(tmp_path):
    command = aiperf_command(Path("aiperf"), load(), tmp_path)
    assert option(command, "--endpoint-type") == "template"
    assert option(command, "--custom-endpoint") == "/v2/models/ensemble/generate_stream"
    assert option(command, "--concurrency") == "2"  # no more clients than requests
    fields = json.loads(option(command, "--extra-inputs"))
    assert '"text_input": {{ text|tojson }}' in fields["payload_template"]
    whole = aiperf_command(Path("aiperf"), load(streams=False), tmp_path)
    assert option(whole, "--custom-endpoint") == "/v2/models/ensemble/generate"
    assert "--streaming" not in whole
    chat = aiperf_command(Path("aiperf"), load(endpoint="chat", api_key="secret"), tmp_path)
    assert (option(chat, "--endpoint-type"), option(chat, "--api-key")) == ("chat", "secret")
    assert "--extra-inputs" not in chat


def test_an_export_becomes_figures():
    assert read_export(EXPORT, 9.876) == LoadFigures(3.5, 117.0, 174.0, 6, 3, 9.88)
    whole = {name: value for name, value in EXPORT.items() if name != "time_to_first_token"}
    assert read_export(whole, 1.0).ttft_p99_ms is None


def test_a_run_writes_the_prompts_and_counts_the_time_of_its_children(tmp_path):
    code = f"""
folder = pathlib.Path(sys.argv[sys.argv.index("--output-artifact-dir") + 1])
sum(i * i for i in range(500_000))
(folder / "profile_export_aiperf.json").write_text(json.dumps({EXPORT!r}))"""
    found = run_aiperf(stand_in(tmp_path, code), load(), tmp_path / "run")
    assert found.num_requests == 6
    assert found.client_cpu_s > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert lines == [{"text": "a", "output_length": 5}, {"text": '"b"\n', "output_length": 7}]


@pytest.mark.parametrize("code", ["sys.exit('all requests failed')", "print('all requests failed')"])
def test_a_run_without_an_export_says_why(tmp_path, code):
    with pytest.raises(UserError, match=r"(?s)AIPerf ended with [01] .*all requests failed"):
        run_aiperf(stand_in(tmp_path, code), load(), tmp_path / "run")


def test_aiperf_is_found_in_its_own_environment_first_and_named_if_missing(tmp_path, monkeypatch):
    on_path = stand_in(tmp_path, "")
    monkeypatch.setattr(aiperf, "OWN_ENVIRONMENT", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_aiperf() == on_path
    monkeypatch.setattr(aiperf, "OWN_ENVIRONMENT", Path(sys.executable))
    assert find_aiperf() == Path(sys.executable)
    monkeypatch.setattr(aiperf, "OWN_ENVIRONMENT", tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"AIPerf is neither in \.venv-aiperf nor on PATH \(run make aiperf\)"):
        find_aiperf()
