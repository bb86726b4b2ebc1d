"""What ``gpu_suite.sh`` runs, in the order of its worth."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.headlines import (
    accuracy_headline,
    adapter_headline,
    index_headline,
    profile_headline,
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
_FLOORS = ("pressure:min_kept=0.5", "pressure:min_kept=0.5,need=random", "pressure:min_kept=0.25")
_PAPER = tuple(f"pressure:min_kept={kept},need=nearest-earlier,retired_becomes=alias" for kept in (0.62, 0.53))
"""The published method at a budget."""
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
        return Step(name, limit_s, command, lacks, must_say=r"[1-9]\d* passed.*", variables=variables, modules=TESTS)

    def search(self, name: str, limit_s: float, *arguments: str, references: tuple[str, ...] = (), **more: Any) -> Step:
        """The kernel's time at the shape of the 7B model."""
        arguments = ("--models", _SEVEN_B, *arguments, "--references", *(references or ("none",)))
        return self.report(
            name, limit_s, "benchmarks.block_search", *arguments, headline=search_headline, lacks=why_not(KERNEL),
            modules=KERNEL, **more,
        )  # fmt: skip

    def replay(self, name: str, limit_s: float, *arguments: str) -> Step:
        """Steps of the 7B model with random weights."""
        return self.report(
            name, limit_s, "benchmarks/trace_replay.py", *arguments, headline=replay_headline, lacks=why_not(MODEL),
            modules=MODEL,
        )  # fmt: skip

    def profile(self, name: str, limit_s: float, shape: str) -> Step:
        """Where a step of a model with random weights goes."""
        return self.report(
            name, limit_s, "benchmarks.step_profile", "--model-shape", shape, headline=profile_headline,
            lacks=why_not(MODEL), modules=MODEL,
        )  # fmt: skip

    def bench(
        self, name: str, limit_s: float, engine: str, *arguments: str, headline: Any, modules: tuple[str, ...],
        **more: Any,
    ) -> Step:  # fmt: skip
        """In-flight batching on an engine."""
        arguments = ("--engine-dir", engine, "--device", "cuda", *arguments)
        return self.report(
            name, limit_s, "benchmarks/inflight_batching.py", *arguments, headline=headline,
            lacks=real_model_lacks(modules), modules=modules, **more,
        )  # fmt: skip

    def pressure(self, requests: int, limit_s: float, engine: str, dataset: str, blocks: int, *arms: str) -> Step:
        """SmolLM2 in a quarter of the memory that so many requests want; arms that end are kept, the first ones first.

        Args:
          blocks: of 16 tokens, measured for these requests on an H200: measuring it again takes as long as an arm.
        """
        return self.bench(
            f"pressure_batch_{requests}", limit_s, engine, "--dataset", dataset, "--replay", "--num-requests",
            str(requests), "--concurrency", str(requests), "--kv-cache-blocks", str(blocks), "--variants", *arms,
            headline=throughput_headline, modules=REAL_MODEL, stretches=True,
        )  # fmt: skip

    def real_engine(
        self, limit_s: float, dtype: str, model: str, engine: str, name: str, modules: tuple[str, ...] = REAL_MODEL
    ) -> Step:
        """SmolLM2, or what became of it, as an engine; its checkpoint lies beside it."""
        command = [self.python, "-m", "benchmarks.real_engine", "--max-batch-size", "256", "--dtype", dtype]
        command += ["--model", model, "--output-dir", engine]
        return Step(name, limit_s, command, real_model_lacks(modules), modules=modules)

    def rows(self, module: str, tokens: int | None, limit_s: float, engine: str, *arguments: str) -> Step:
        """Rows of the study of pages, texts of one length dealt out to processes; none starts a text too late."""
        name = module if tokens is None else f"{module}_{tokens}"
        kept = WORK / f"real_model_{name}.jsonl"
        command = ["bash", "benchmarks/studies/real_model/shards.sh", str(_PROCESSES), str(kept), module]
        command += ["--model-dir", f"{engine}_checkpoint", "--device", "cuda", "--seconds", str(limit_s - 30)]
        command += ["--tokens", str(tokens)] if tokens else []
        variables = {"PYTHON": self.python}
        return Step(
            name, limit_s, [*command, *arguments], real_model_lacks(REAL_MODEL), must_say=r"[1-9]\d* rows",
            variables=variables, keeps=(kept,), modules=REAL_MODEL,
        )  # fmt: skip

    def plugin(self, limit_s: float) -> Step:
        """The plugin library and its harness; takes a moment where they are there."""
        root = tensorrt_root()
        build = [self.python, "build_scripts/build_plugins.py", "--preset", "native", "--output-dir", str(PLUGINS)]
        variables = {"TENSORRT_ROOT": root} if root else {}
        return Step("plugin_build", limit_s, build, plugin_lacks(), variables=variables, modules=KERNEL)

    def sanitizer(self, tool: str) -> tuple[str, ...]:
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")


def _kernel_part(make: _Commands) -> list[Step]:
    return [
        make.search("search_bf16", 35, "--dtypes", "bfloat16", "--pairs", "64", "1", "8", "512"),
        make.plugin(45),
        Step("plugin_harness", 10, _HARNESS, plugin_lacks(), must_say=_HELD),
        make.tests("gpu_tests", 150, "tests/search", "tests/runners", "tests/evaluation/test_masked_replay.py"),
        make.search("search_fp8_int8", 25, "--dtypes", "float8_e4m3fn", "int8", "--pairs", "64", "512"),
        make.tests("memcheck", 45, *_SANITIZED, tool=(*make.sanitizer("memcheck"), "--report-api-errors", "no")),
        make.replay("replay_7b", 90, "--variants", "off", "shadow", "full-searches", "--output-tokens", "256",
                    "--budget-s", "60"),
        Step("memcheck_plugin", 15, [*make.sanitizer("memcheck"), *_HARNESS],
             plugin_lacks() or why_not((), ("compute-sanitizer",)), must_say=_HELD),
        make.search("search_16_tokens", 20, "--dtypes", "bfloat16", "--pairs", "64", "512", "--tokens-per-block", "16"),
        make.search("search_64_tokens", 20, "--dtypes", "bfloat16", "--pairs", "64", "512", "--tokens-per-block", "64"),
        make.replay("replay_no_graphs", 35, "--variants", "off", "full-searches", "--output-tokens", "48", "--repeat",
                    "1", "--no-graphs"),
    ]  # fmt: skip


def _detail_part(make: _Commands) -> list[Step]:
    # Of each dtype the comparison with the reference, three warm-ups, the timed call and the profiler's.
    ncu = ["ncu", "--metrics", "dram__throughput.avg.pct_of_peak_sustained_elapsed,"
           "smsp__issue_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread",
           "--kernel-name", "block_distance", "--launch-count", "18", make.python, "-m", "benchmarks.block_search",
           "--models", _SEVEN_B, "--dtypes", "bfloat16", "float8_e4m3fn", "int8", "--pairs", "512", "--repeat", "1",
           "--references", "none"]  # fmt: skip
    short = ("--batch-size", "64", "--output-tokens", "256", "--budget-s", "20")
    return [
        make.profile("step_profile", 50, _SEVEN_B),
        make.profile("step_profile_smollm2", 35, "SmolLM2-135M"),
        make.report("index_cost", 25, "benchmarks.studies.signatures.index_cost", "--device", "cuda",
                    headline=index_headline, lacks=why_not(KERNEL), modules=KERNEL),
        make.replay("replay_search_64", 45, *short, "--variants", "off", "full-searches"),
        make.replay("replay_triton", 40, *short, "--variants", "off", "--decode", "triton"),
        make.replay("replay_half_null", 130, "--batch-size", "64", "--output-tokens", "1536", "--repeat", "2",
                    "--budget-s", "110", "--variants", "off", "half-dropped", "half-null"),
        make.tests("racecheck", 40, *_SANITIZED, tool=make.sanitizer("racecheck")),
        make.tests("initcheck", 35, *_SANITIZED, tool=make.sanitizer("initcheck")),
        Step("ncu", 40, ncu, why_not(KERNEL, ("ncu",)), must_say=r"dram__throughput\S+ +% +([\d.]+)", says_all=True,
             modules=KERNEL),
        make.search("search_compiled", 65, "--dtypes", "bfloat16", "--pairs", "64", "--reference-budget-s", "20",
                    references=("eager", "compiled"), stretches=True),
    ]  # fmt: skip


def _real_model_part(make: _Commands) -> list[Step]:
    engine, requests = str(WORK / "real_engine"), str(WORK / "requests.jsonl")
    write = [make.python, "-m", "benchmarks.studies.pressure.make_requests", "--model-dir", f"{engine}_checkpoint",
             "--num-requests", "256", "--max-tokens", "2048", "--output", requests]  # fmt: skip
    return [
        make.real_engine(80, "bfloat16", str(real_model()), engine, "real_engine"),
        Step("real_requests", 40, write, real_model_lacks(REAL_MODEL), modules=REAL_MODEL),
        # The table of docs/pressure.md first: what is missing in it is the published method.
        make.pressure(96, 150, engine, requests, 1149, "full", *_PAPER, "pressure:min_kept=0.5"),
        make.pressure(256, 235, engine, requests, 2928, "full", *_FLOORS[:2], *_PAPER, _FLOORS[2], "full-guaranteed",
                      "pressure:min_kept=0.75", "aligned"),
    ]  # fmt: skip


def _table_part(make: _Commands) -> list[Step]:
    engine = str(WORK / "float32_engine")  # what the rows of a CPU are of
    adapter, adapted = WORK / "adapter", str(WORK / "adapted_engine")
    return [
        make.real_engine(70, "float32", str(real_model()), engine, "float32_engine"),
        make.report("adapter", 65, "benchmarks.studies.adapter", "--model-dir", f"{engine}_checkpoint", "--output-dir",
                    str(adapter), "--device", "cuda", "--minutes", "0.6", headline=adapter_headline,
                    lacks=real_model_lacks(ADAPTER), modules=ADAPTER,
                    keeps=tuple(adapter / f"adapter_{name}" for name in ("model.safetensors", "config.json"))),
        make.real_engine(45, "bfloat16", str(adapter / "merged"), adapted, "adapted_engine", ADAPTER),
        make.bench("adapted_answers", 70, adapted, "--dataset", "benchmarks/data/small.jsonl", "--num-requests", "24",
                   "--kv-cache-share", "0.5", "--variants", "full", "pressure:min_kept=0.5", "aligned",
                   headline=accuracy_headline, modules=ADAPTER),
        make.rows("recall", None, 90, engine, "--texts", "96"),
        make.rows("table", 8192, 110, engine, "--arms", *_DECISIVE),
        make.rows("table", 4096, 55, engine, "--arms", *_DECISIVE),
    ]  # fmt: skip
