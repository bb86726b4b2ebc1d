"""What a benchmark run leaves when it is cut, and what comes before its clock."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fakes.counting_runner import CountingRunner

from trtllm_memshare.evaluation import benchmark, benchmark_run
from trtllm_memshare.evaluation.benchmark import Load, run_variant
from trtllm_memshare.evaluation.benchmark_options import BenchmarkOptions
from trtllm_memshare.evaluation.dataset import DatasetItem
from trtllm_memshare.evaluation.variants import Variant
from trtllm_memshare.evaluation.warm_up import warm_up_items
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.runners.torch.decode_graph import BUCKETS
from trtllm_memshare.search.config import make_config

ARMS = ("full", "aligned", "full-guaranteed")


@pytest.fixture
def options(engine_dir, prompts, tmp_path):
    path = tmp_path / "requests.jsonl"
    rows = [{"task_id": i, "input_ids": p[:20], "output_tokens": 12} for i, p in enumerate(prompts[:3])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BenchmarkOptions(
        engine_dir, path, ARMS, kv_cache_blocks=40, output_json=tmp_path / "report.json", device="cpu"
    )


@pytest.fixture
def runs(monkeypatch):
    """Names of what was run, in order."""
    names: list[str] = []

    def run(variant, *arguments):
        names.append(variant.name)
        return run_variant(variant, *arguments)

    monkeypatch.setattr(benchmark_run, "run_variant", run)
    return names


def test_a_run_that_is_cut_keeps_the_arms_that_have_ended(options, runs, monkeypatch):
    def run(variant, *arguments):
        if variant.name == "full-guaranteed":
            raise KeyboardInterrupt
        return run_variant(variant, *arguments)

    monkeypatch.setattr(benchmark_run, "run_variant", run)
    with pytest.raises(KeyboardInterrupt):
        benchmark_run.run_benchmark(options, "command")
    report = json.loads(options.output_json.read_text())
    assert [row["variant"] for row in report["variants"]] == ["full", "aligned"]
    assert report["variants"][1]["same_tokens_as_full"] is not None
    assert (report["command"], report["kv_cache_blocks"]) == ("command", 40)
    assert not list(options.output_json.parent.glob("*.partial"))


def test_only_on_a_gpu_a_run_comes_before_the_clock_and_the_report_does_not_show_it(options, runs, monkeypatch):
    without = benchmark_run.run_benchmark(options, "command")
    assert runs == list(ARMS)
    monkeypatch.setattr(benchmark_run, "announce_device", lambda asked: "cuda")
    runs.clear()
    with_one = benchmark_run.run_benchmark(options, "command")
    assert runs == ["warm-up", *ARMS]
    for before, after in zip(without["variants"], with_one["variants"], strict=True):
        for figure in ("variant", "num_steps", "peak_used_blocks", "mean_output_tokens"):
            assert before[figure] == after[figure]


def test_every_streaming_arm_gets_the_memory_of_aligned_unless_it_has_a_window(options, runs, monkeypatch):
    monkeypatch.setattr(benchmark_run, "streaming_window", lambda spans, held, sink, size: 5 + sink)
    arms = (
        "streaming:streaming_window_tokens=9",
        "streaming:streaming_sink_tokens=1",
        "streaming:streaming_sink_tokens=2",
    )
    report = benchmark_run.run_benchmark(replace(options, variants=(*arms, "aligned", "full")), "command")
    windows = [row["settings"]["streaming_window_tokens"] for row in report["variants"]]
    assert windows[:3] == [9, 6, 7]
    assert runs == [arms[0], "aligned", "full", *arms[1:]]  # windows come from what has run


def test_every_figure_of_the_clock_is_the_median_of_the_rounds(options, monkeypatch):
    clocked = ("mean_requests_in_flight", "mean_resident_blocks_per_request", "avg_ttft_ms")
    rounds = iter([1.0, 9.0, 4.0])

    def run(*arguments):
        measured, figure = run_variant(*arguments), next(rounds)
        measured.entry.update(dict.fromkeys(clocked, figure), peak_used_blocks=figure)
        for name in ("request_latency_percentiles_ms", "ttft_percentiles_ms"):
            measured.entry[name] = dict.fromkeys(measured.entry[name], figure)
        return measured

    monkeypatch.setattr(benchmark_run, "run_variant", run)
    (row,) = benchmark_run.run_benchmark(replace(options, variants=("full",), repeat=3), "command")["variants"]
    assert [row[name] for name in clocked] == [4.0] * 3
    assert set(row["request_latency_percentiles_ms"].values()) == set(row["ttft_percentiles_ms"].values()) == {4.0}
    assert {"p50", "p99", "average"} <= set(row["request_latency_percentiles_ms"])
    assert row["peak_used_blocks"] == 1.0  # not of the clock: of the first round
    assert row["correct_answers_per_s"] is None  # there are no answers


@pytest.mark.parametrize(("answers", "is_rate"), [(["7", "7"], True), (["7", None], False), ([None, None], False)])
def test_right_answers_per_second_are_told_only_where_every_line_has_one(boundaries, answers, is_rate):
    items = [DatasetItem(i, [5], 2, answer) for i, answer in enumerate(answers)]
    load = Load(4, 64, 100, "MAX_UTILIZATION", ())
    variant = Variant("full", make_config("off"))
    entry = run_variant(variant, CountingRunner(), boundaries, items, load, lambda *_: True).entry
    assert entry["accuracy"] == (1.0 if "7" in answers else None)
    assert (entry["correct_answers_per_s"] is not None) == is_rate


def test_a_request_waits_from_when_it_was_due_though_a_step_kept_it_from_being_sent(boundaries, monkeypatch):
    now, step_s = [0.0], 10.0

    def pass_by(seconds):
        now[0] += seconds + 1e-9

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] + 1, sleep=pass_by)
    monkeypatch.setattr(benchmark, "time", clock)
    runner = CountingRunner()
    runner.before_step = lambda batch: pass_by(step_s)
    items = [DatasetItem(i, [5], 1, None) for i in range(3)]
    load = Load(4, 64, 100, "MAX_UTILIZATION", (), request_rate=1.0)
    run = run_variant(Variant("full", make_config("off")), runner, boundaries, items, load, lambda *_: False)
    due = np.cumsum(np.random.default_rng(load.seed).exponential(1 / load.request_rate, len(items)))
    assert due[-1] < step_s  # so the other two come while the first one's step runs
    for result, its_due in zip(run.results[1:], due[1:], strict=True):
        waited = due[0] + step_s - its_due
        assert min(result.stats.latency_s, result.stats.ttft_s, result.stats.queue_s) >= waited
    assert run.entry["request_latency_percentiles_ms"]["maximum"] >= (due[0] + step_s - due[1]) * 1e3


def test_a_thinned_timeline_keeps_its_peak():
    timeline = [(step / 100, 50 + step % 7, 3) for step in range(4100)]
    timeline[1237] = (12.37, 99, 4)
    thinned = benchmark._thinned(timeline)
    assert 400 <= len(thinned) <= 420
    assert max(used for _, used, _ in thinned) == 99
    assert thinned == sorted(thinned)
    assert (12.37, 99, 4) in thinned
    assert benchmark._thinned(timeline[:3]) == timeline[:3]


def test_the_batch_takes_each_size_that_a_graph_is_captured_for(engine_dir, boundaries):
    engine = load_engine(engine_dir)
    runner, sizes = open_runner(engine, 300, "cpu"), set[int]()
    step = runner.step

    def record(inputs):
        if inputs.batch.num_contexts == 0:
            sizes.add(len(inputs.batch.chunk_lengths))
        return step(inputs)

    runner.step = record
    items = warm_up_items([DatasetItem(i, [1 + i % 50] * 30, 100, None) for i in range(60)], in_flight=41)
    load = Load(64, 512, engine.build.max_seq_len, "MAX_UTILIZATION", ())
    run_variant(Variant("warm-up", make_config("off")), runner, boundaries, items, load, lambda *_: False)
    assert sizes == {1, 2, 4, 8, 16, 32, 41}
    assert {next(b for b in BUCKETS if b >= size) for size in sizes} == {b for b in BUCKETS if b <= 48}


def test_a_warm_up_asks_no_more_of_an_engine_than_the_requests_do():
    items = warm_up_items([DatasetItem(0, [1, 2], 3, None), DatasetItem(1, [1] * 9, 1, None)], in_flight=8)
    assert [(len(item.input_ids), item.output_tokens) for item in items] == [(2, 3), (8, 2)]
