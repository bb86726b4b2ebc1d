"""Options of the benchmark: what makes no sense is refused before work begins, with one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from run_script import run_script

from trtllm_memshare.commands.bench import main
from trtllm_memshare.engine.build_config import BuildConfig
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.engine.engine_dir import write_engine
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.benchmark_options import check_output_file
from trtllm_memshare.search.config import make_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inflight_batching.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    checkpoint, build = read_checkpoint(tiny_checkpoint), BuildConfig(max_seq_len=64)
    write_engine(folder / "engine", checkpoint, build, make_config("off"), False)
    (folder / "d.jsonl").write_text(json.dumps({"task_id": 0, "prompt": "Q: 1 + 2 = ?\n", "output_tokens": 4}) + "\n")
    return folder


def bench(folder: Path, *options: object):
    dataset = ["--engine-dir", folder / "engine", "--dataset", folder / "d.jsonl", "--variants", "full"]
    return run_script(SCRIPT, *(str(part) for part in [*dataset, *options]))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--output-json", "/"], "--output-json must name a file, got the directory /"),
        (["--output-json", "/proc/version/x.json"], "--output-json cannot be written"),
        (["--output-json", "x" * 300], "--output-json cannot be written"),
        (["--plot", "x.xyz"], "--plot must end in one of .png, .pdf, .svg, .jpg, got x.xyz"),
        (["--output-texts", "."], "--output-texts must name a file, got the directory ."),
        (["--request-rate", "nan"], "--request-rate must be a number of requests per second above 0, got nan"),
        (["--request-rate", "inf"], "--request-rate must be a number"),
        (["--request-rate", "-1"], "--request-rate must be a number"),
        (["--samples", 10**18], "--samples must be between 1 and 1000, got 1000000000000000000"),
        (["--samples", 0], "--samples must be positive, got 0"),
        (["--seed", -1], "--seed must be between 0 and 9223372036854775807, got -1"),
        (["--seed", 2**70], "--seed must be between 0 and"),
        (["--device", "tpu"], "unknown device tpu (known: auto, cpu, cuda, cuda:N)"),
        (["--device", "cuda:x"], "unknown device cuda:x"),
        (["--kv-cache-blocks", 10**18], "--kv-cache-blocks must be between 1 and 2147483647"),
        (["--kv-cache-blocks", 2**31 - 1], "must have between 1 and 536,870,911 blocks for a model of 2 layers"),
        (["--kv-cache-blocks", 0], "--kv-cache-blocks must be positive, got 0"),
        (["--temperature", "nan"], "--temperature must be 0 (greedy) or more, at most 100, got nan"),
        (["--temperature", "1e9"], "--temperature must be 0 (greedy) or more, at most 100"),
        (["--concurrency", 0], "--concurrency must be positive, got 0"),
        (["--variants", "full", "aligned", "full"], "--variants must name each variant once, got full twice (leave"),
        (["--repeat", 10**9], "--repeat must be between 1 and 1000"),
        (["--set", "max_distance=" + "9" * 5000], "--set max_distance has a value that is too large"),
        (["--set", "max_distance=" + "[" * 9999], "--set max_distance has a value that is too large"),
        (["--set", "x" * 300], "--set takes KEY=VALUE"),
        (["--dataset", "nowhere"], "no data set at nowhere"),
        (["--engine-dir", "nowhere"], "no engine directory at nowhere"),
        (["--chat-template"], "line 1: the model's tokenizer has no chat template"),
    ],
)
def test_bad_options(folder, options, phrase):
    done = bench(folder, *options)
    assert done.returncode == 2, done.stderr
    assert phrase in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 700


def test_cuda_without_a_gpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = bench(folder, "--device", "cuda")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "device cuda needs a CUDA GPU, torch finds none" in done.stderr


def test_a_pool_that_a_share_makes_too_small_is_to_be_given_in_place_of_the_share(folder):
    done = bench(folder, "--kv-cache-share", 0.01, "--device", "cpu")
    assert done.returncode == 2
    assert "(set --kv-cache-blocks 2 or more) in place of --kv-cache-share 0.01" in done.stderr.splitlines()[-1]


def test_a_tiny_temperature_is_greedy(folder):
    results = []
    for temperature in ("0", "1e-40"):
        done = bench(folder, "--temperature", temperature, "--device", "cpu", "--output-texts", folder / "t.jsonl")
        assert done.returncode == 0, done.stderr
        results.append((folder / "t.jsonl").read_text())
    assert results[0] == results[1]


def test_an_overlong_last_line_is_found_before_anything_runs(folder):
    path = folder / "long.jsonl"
    path.write_text((folder / "d.jsonl").read_text() + json.dumps({"task_id": 1, "input_ids": [5] * 60,
                                                                   "output_tokens": 5}))  # fmt: skip
    done = bench(folder, "--dataset", path, "--device", "cpu")
    assert done.returncode == 2
    assert "long.jsonl line 2: prompt and output must fit max_seq_len 64, got 60 + 5 tokens" in done.stderr
    path.write_text(json.dumps({"task_id": 1, "input_ids": [80], "output_tokens": 5}))
    assert "input_ids[0] must be between 0 and 79, got 80" in bench(folder, "--dataset", path).stderr


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--output-json", "d.jsonl"], "--output-json must name another file than --dataset, got d.jsonl twice"),
        (["--output-texts", "link"], "--output-texts must name another file than --dataset, got link twice"),
        (["--output-json", "r", "--output-texts", "./r"], "--output-texts must name another file than --output-json"),
    ],
)
def test_no_result_replaces_the_data_set_or_another_result(tmp_path, monkeypatch, options, phrase):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text("kept")
    Path("link").symlink_to("d.jsonl")
    with pytest.raises(UserError, match=re.escape(phrase)):
        main("memshare bench", ["--dataset", "d.jsonl", *options])
    assert Path("d.jsonl").read_text() == "kept"


def test_the_folder_of_a_file_that_is_replaced_is_asked_for_its_right_too(tmp_path, monkeypatch):
    (tmp_path / "r.json").touch()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=f"no right to write to {tmp_path}$"):
        check_output_file("--output-json", tmp_path / "r.json")
    check_output_file("--output-json", Path("/dev/null"))
