"""What ``gpu_suite.sh`` runs, in the order of its worth."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.headlines import (
    accuracy_headline,
    adapter_headline,
    replay_headline,
    search_headline,
    throughput_headline,
)
from benchmarks.gpu.needs import (
    ADAPTER,
    KERNEL,
    MODEL,
    PLUGINS,
    REAL_MODEL,
    TESTS,
    WORK,
    plugin_lacks,
    real_model,
    real_model_lacks,
    tensorrt_root,
    why_not,
)
from benchmarks.gpu.step_runner import Step

PARTS = (1, 2, 3, 4)
SECONDS_A_PART = 540
"""Of a part, all in: nine minutes."""
HELD_BACK_S = 35
"""Of it, for the start, the last report and a step that has to be killed."""

_SEVEN_B = "DeepSeek-R1-Distill-Qwen-7B"
_SANITIZED = ("tests/search", "-k", "sanitizer")
_HARNESS = [str(PLUGINS / "plugin_harness"), str(PLUGINS / "libtrtllm_memshare_plugin.so"), "--gpu", "require"]
_HELD = r"\d+ of \d+ checks held"
_DECISIVE = (
    "random", "attention-redundancy", "attention-redundancy-recency", "surprisal-led-recency-signature",
    "surprisal-led-signature", "redundancy-signature", "paper-null",
)  # fmt: skip
_PROCESSES = 12  # that share the device where most of the work is the host's


def make_steps(part: int, python: str) -> list[Step]:
    """The steps of a part, those of most worth first."""
    return {1: _kernel_part, 2: _detail_part, 3: _real_model_part, 4: _table_part}[part](_Commands(python))


class _Commands:
    """Builds steps for one interpreter."""

    def __init__(self, python: str) -> None:
        self.python = python

    def report(
        self, name: str, limit_s: float, program: str, *arguments: str, headline: Any, lacks: str | None, **more: Any
    ) -> Step:
        """A benchmark that writes a report; ``program``: a file, or a module where its name has no slash."""
        report = WORK / f"{name}.json"
        start = [program] if "/" in program else ["-m", program]
        command = [self.python, *start, *arguments, "--output-json", str(report)]
        return Step(name, limit_s, command, lacks, report=report, headline=headline, **more)

    def tests(self, name: str, limit_s: float, *arguments: str, tool: tuple[str, ...] = ()) -> Step:
        """GPU tests, under a sanitizer if ``tool`` is one."""
        command = [*tool, self.python, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", *arguments]
        # Torch's allocator hands out parts of large blocks, inside which nothing is out of bounds.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}
        lacks = why_not(TESTS, tool[:1])
        return Step(name, limit_s, command, lacks, must_say=r"[1-9]\d* passed.*", variables=variables)

    def search(self, name: str, limit_s: float, *arguments: str, references: tuple[str, ...] = ()) -> Step:
        """The kernel's time at the shape of the 7B model."""
        arguments = ("--models", _SEVEN_B, *arguments, "--references", *(references or ("none",)))
        lacks = why_not(KERNEL)
        return self.report(name, limit_s, "benchmarks.block_search", *arguments, headline=search_headline, lacks=lacks)

    def replay(self, name: str, limit_s: float, *arguments: str) -> Step:
        """Steps of the 7B model with random weights."""
        lacks = why_not(MODEL)
        return self.report(
            name, limit_s, "benchmarks/trace_replay.py", *arguments, headline=replay_headline, lacks=lacks
        )

    def bench(self, name: str, limit_s: float, engine: str, *arguments: str, headline: Any, lacks: str | None) -> Step:
        """In-flight batching on an engine."""
        arguments = ("--engine-dir", engine, "--device", "cuda", *arguments)
        return self.report(name, limit_s, "benchmarks/inflight_batching.py", *arguments, headline=headline, lacks=lacks)

    def real_engine(
        self, limit_s: float, dtype: str, model: str, engine: str, lacks: str | None, name: str = "real_engine"
    ) -> Step:
        """SmolLM2, or what became of it, as an engine; its checkpoint lies beside it."""
        command = [self.python, "-m", "benchmarks.real_engine", "--max-batch-size", "256", "--dtype", dtype]
        return Step(name, limit_s, [*command, "--model", model, "--output-dir", engine], lacks)

    def rows(self, module: str, tokens: int | None, limit_s: float, engine: str, *arguments: str) -> Step:
        """Rows of the study of pages, texts of one length dealt out to processes; none starts a text too late."""
        name = module if tokens is None else f"{module}_{tokens}"
        kept = WORK / f"real_model_{name}.jsonl"
        command = ["bash", "benchmarks/studies/real_model/shards.sh", str(_PROCESSES), str(kept), module]
        command += ["--model-dir", f"{engine}_checkpoint", "--device", "cuda", "--seconds", str(limit_s - 30)]
        command += ["--tokens", str(tokens)] if tokens else []
        variables = {"PYTHON": self.python}
        lacks = real_model_lacks(REAL_MODEL)
        return Step(name, limit_s, [*command, *arguments], lacks, must_say=r"[1-9]\d* rows", variables=variables,
                    keeps=(kept,))  # fmt: skip

    def plugin(self, limit_s: float) -> Step:
        """The plugin library and its harness; takes a moment where they are there."""
        root = tensorrt_root()
        build = [self.python, "build_scripts/build_plugins.py", "--preset", "native", "--output-dir", str(PLUGINS)]
        return Step("plugin_build", limit_s, build, plugin_lacks(), variables={"TENSORRT_ROOT": root} if root else {})

    def sanitizer(self, tool: str) -> tuple[str, ...]:
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")


def _kernel_part(make: _Commands) -> list[Step]:
    return [
        make.search("search_bf16", 55, "--dtypes", "bfloat16", "--pairs", "64", "1", "8", "512"),
        make.plugin(75),
        Step("plugin_harness", 25, _HARNESS, plugin_lacks(), must_say=_HELD),
        make.tests("gpu_tests", 95, "tests/search", "tests/runners", "tests/evaluation/test_masked_replay.py"),
        make.search("search_fp8_int8", 45, "--dtypes", "float8_e4m3fn", "int8", "--pairs", "64", "512"),
        make.tests("memcheck", 75, *_SANITIZED, tool=(*make.sanitizer("memcheck"), "--report-api-errors", "no")),
        make.replay("replay_7b", 135, "--variants", "off", "shadow", "full-searches", "--output-tokens", "256",
                    "--budget-s", "90"),
    ]  # fmt: skip


def _detail_part(make: _Commands) -> list[Step]:
    ncu = ["ncu", "--metrics", "dram__throughput.avg.pct_of_peak_sustained_elapsed,"
           "smsp__issue_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread",
           "--kernel-name", "block_distance", "--launch-count", "3", make.python, "-m", "benchmarks.block_search",
           "--models", _SEVEN_B, "--dtypes", "bfloat16", "float8_e4m3fn", "int8", "--pairs", "512", "--repeat", "1",
           "--references", "none"]  # fmt: skip
    return [
        make.replay("replay_half_null", 90, "--batch-size", "64", "--output-tokens", "1536", "--repeat", "1",
                    "--variants", "off", "half-dropped", "half-null"),
        make.search("search_16_tokens", 25, "--dtypes", "bfloat16", "--pairs", "64", "512", "--tokens-per-block", "16"),
        make.search("search_64_tokens", 25, "--dtypes", "bfloat16", "--pairs", "64", "512", "--tokens-per-block", "64"),
        Step("ncu", 40, ncu, why_not(KERNEL, ("ncu",)), must_say=r"dram__throughput\S+ +% +[\d.]+"),
        make.tests("racecheck", 45, *_SANITIZED, tool=make.sanitizer("racecheck")),
        make.tests("initcheck", 40, *_SANITIZED, tool=make.sanitizer("initcheck")),
        make.plugin(30),  # this machine need not be that of part 1
        Step("memcheck_plugin", 25, [*make.sanitizer("memcheck"), *_HARNESS],
             plugin_lacks() or why_not((), ("compute-sanitizer",)), must_say=_HELD),
        make.search("search_compiled", 110, "--dtypes", "bfloat16", "--pairs", "64", "--reference-budget-s", "20",
                    references=("eager", "compiled")),
        # A step of the executor waits for the host: what its time goes into is in the log.
        Step("step_profile", 40, [make.python, "-m", "cProfile", "-s", "tottime", "benchmarks/trace_replay.py",
             "--variants", "off", "--batch-size", "64", "--output-tokens", "96", "--repeat", "1"],
             why_not(MODEL), must_say=r"\d+ function calls.* in [\d.]+ seconds"),
        make.replay("replay_no_graphs", 35, "--variants", "off", "full-searches", "--output-tokens", "48", "--repeat",
                    "1", "--no-graphs"),
    ]  # fmt: skip


def _real_model_part(make: _Commands) -> list[Step]:
    model, engine, requests = real_model(), str(WORK / "real_engine"), str(WORK / "requests.jsonl")
    adapter, adapted = WORK / "adapter", str(WORK / "adapted_engine")
    lacks, adapter_lacks = real_model_lacks(REAL_MODEL), real_model_lacks(ADAPTER)
    write = [make.python, "-m", "benchmarks.studies.pressure.make_requests", "--model-dir", f"{engine}_checkpoint",
             "--num-requests", "256", "--max-tokens", "2048", "--output", requests]  # fmt: skip
    pressed = ("--dataset", requests, "--replay", "--kv-cache-share", "0.25", "--variants", "full", "full-guaranteed",
               "pressure:min_kept=0.5", "pressure:min_kept=0.25")  # fmt: skip
    return [
        make.real_engine(80, "bfloat16", str(model), engine, lacks),
        Step("real_requests", 30, write, lacks),
        make.bench("pressure_batch_256", 240, engine, *pressed, "--concurrency", "256",
                   headline=throughput_headline, lacks=lacks),
        make.report("adapter", 75, "benchmarks.studies.adapter", "--model-dir", f"{engine}_checkpoint", "--output-dir",
                    str(adapter), "--device", "cuda", "--minutes", "0.8", headline=adapter_headline,
                    lacks=adapter_lacks,
                    keeps=tuple(adapter / f"adapter_{name}" for name in ("model.safetensors", "config.json"))),
        make.real_engine(35, "bfloat16", str(adapter / "merged"), adapted, adapter_lacks, "adapted_engine"),
        make.bench("adapted_answers", 45, adapted, "--dataset", "benchmarks/data/small.jsonl",
                   "--kv-cache-share", "0.5", "--variants", "full", "pressure:min_kept=0.5", "aligned",
                   headline=accuracy_headline, lacks=adapter_lacks),
    ]  # fmt: skip


def _table_part(make: _Commands) -> list[Step]:
    engine = str(WORK / "float32_engine")  # what the rows of a CPU are of
    return [
        make.real_engine(80, "float32", str(real_model()), engine, real_model_lacks(REAL_MODEL), "float32_engine"),
        make.rows("table", 8192, 200, engine, "--arms", *_DECISIVE),
        make.rows("table", 4096, 130, engine, "--arms", *_DECISIVE),
        make.rows("recall", None, 90, engine, "--texts", "96"),
    ]
