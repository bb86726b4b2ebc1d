"""The benchmark end to end on a small engine: report, picture, controls and bad input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from run_script import run_script

ROOT = Path(__file__).parents[2]


def run(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    return run_script(ROOT / script, *map(str, options))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    done = run("build_scripts/build_engine.py", "--memshare", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_report_picture_and_equal_memory(engine, tmp_path):
    arms = ["full", "aligned", "shadow", "streaming", "full-guaranteed"]
    rows = [json.loads(line) for line in (ROOT / "benchmarks/data/demo.jsonl").read_text().splitlines()[:4]]
    short = tmp_path / "short.jsonl"  # long enough for the first re-check, which repeats what stands before it
    short.write_text("".join(json.dumps({**row, "output_tokens": 480}) + "\n" for row in rows))
    done = run(
        "benchmarks/inflight_batching.py", "--engine-dir", engine, "--dataset", short, "--kv-cache-blocks", 400,
        "--variants", *arms, "--output-json", tmp_path / "r.json", "--plot", tmp_path / "r.png",
        "--output-texts", tmp_path / "t.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((tmp_path / "r.json").read_text())
    assert [v["variant"] for v in report["variants"]] == [v["variant"] for v in last["variants"]] == arms
    full, aligned, shadow, streaming, _ = report["variants"]
    assert full["shared_block_fraction"] == shadow["shared_block_fraction"] == 0
    assert shadow["same_tokens_as_full"] == 1
    assert shadow["shadow_decisions"] > 0
    assert aligned["block_steps_per_request"] < full["block_steps_per_request"]
    # By steps, not seconds, and per token: a request that streaming leads astray runs longer and sums up to more.
    held = [v["block_steps_per_request"] / v["mean_output_tokens"] for v in (streaming, aligned)]
    ratio = held[0] / held[1]
    assert 0.8 < ratio < 1.2
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--variants", "ful"], "unknown variant ful (did you mean full?)"),
        (["--variants", "streaming"], "add both to --variants"),
        (["--kv-cache-blocks", 20], "the KV pool is too small for one request"),
        (["--kv-cache-blocks", 20, "--kv-cache-share", 0.5], "give one of them"),
        (["--set", "max_distance"], "--set takes KEY=VALUE, got max_distance"),
        (["--set", "max_distanc=1"], "unknown key max_distanc (did you mean max_distance?)"),
        (["--concurrency", 0], "--concurrency must be positive, got 0"),
        (["--engine-dir", "nowhere"], "no engine directory at nowhere"),
        (["--dataset", "README.md"], "README.md line 1 is not JSON"),
    ],
)
def test_bad_input(engine, options, phrase):
    base = ["--engine-dir", engine, "--dataset", "benchmarks/data/demo.jsonl", "--num-requests", 2]
    done = run("benchmarks/inflight_batching.py", *base, *options)
    assert done.returncode == 2, done.stderr
    assert phrase in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
