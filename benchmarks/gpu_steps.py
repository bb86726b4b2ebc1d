"""What ``gpu_suite.sh`` runs, in the order of its worth, and the line that each step leaves."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from step_runner import Step

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_suite_work"
KIT = ROOT / "gpu_kit"
"""What ``build_scripts/pack_gpu_kit.sh`` gathers."""
_PLUGINS = ROOT / "build" / "plugins"  # where the tests with TensorRT look for the library
_SEVEN_B = "DeepSeek-R1-Distill-Qwen-7B"
PARTS = (1, 2)
SECONDS_A_PART = 540
"""Of a part, all in: nine minutes."""
HELD_BACK_S = 35
"""Of it, for the start, the last report and a step that has to be killed."""

KERNEL = ("torch", "numpy", "pydantic", "tqdm", "cuda.core")
MODEL = (*KERNEL, "transformers", "tokenizers", "safetensors", "yaml")
TESTS = (*MODEL, "pytest", "hypothesis")
REQUIREMENTS = {
    "torch": "torch>=2.6", "numpy": "numpy", "pydantic": "pydantic>=2.6,<3", "transformers": "transformers>=4.57,<6",
    "tokenizers": "tokenizers>=0.22", "safetensors": "safetensors>=0.4", "tqdm": "tqdm>=4.66", "yaml": "pyyaml>=6",
    "pytest": "pytest>=8", "hypothesis": "hypothesis>=6.100", "cuda.core": "cuda-core>=1.0,<2", "gguf": "gguf>=0.17",
    "accelerate": "accelerate>=1.0", "triton": "triton",
}  # fmt: skip
"""Modules that steps import, and what pip calls them."""


def absent_modules(names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that are not installed; imports only their parent packages."""
    absent = []
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            absent.append(name)
    return absent


def why_not(
    modules: tuple[str, ...] = (), tools: tuple[str, ...] = (), others: dict[str, bool] | None = None
) -> str | None:
    """What a step lacks, in words that name it, or None. ``others``: what is needed -> whether it is there."""
    lacking = absent_modules(modules)
    lacking += [f"{tool} on PATH" for tool in tools if shutil.which(tool) is None]
    lacking += [what for what, there in (others or {}).items() if not there]
    return f"lacks {', '.join(lacking)}" if lacking else None


def _tensorrt_root() -> str | None:
    if os.environ.get("TENSORRT_ROOT"):
        return os.environ["TENSORRT_ROOT"]
    return str(KIT / "tensorrt") if (KIT / "tensorrt" / "include").is_dir() else None


def _real_model() -> Path | None:
    """The GGUF file of the kit, or the checkpoint that ``get_smollm2.py`` leaves."""
    known = (KIT / "SmolLM2-135M-Instruct.gguf", ROOT / "models" / "smollm2")
    return next((path for path in known if path.exists()), None)


class _Commands:
    """Builds steps for one interpreter."""

    def __init__(self, python: str) -> None:
        self._python = python

    def script(self, name: str, limit_s: float, file: str, *arguments: str, headline: Any, lacks: str | None) -> Step:
        """A benchmark that writes a report."""
        report = WORK / f"{name}.json"
        command = [self._python, f"benchmarks/{file}.py", *arguments, "--output-json", str(report)]
        return Step(name, limit_s, command, lacks, report=report, headline=headline)

    def tests(self, name: str, limit_s: float, *arguments: str, tool: tuple[str, ...] = ()) -> Step:
        """GPU tests, under a sanitizer if ``tool`` is one."""
        command = [*tool, self._python, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", *arguments]
        # Torch's allocator hands out parts of large blocks, inside which nothing is out of bounds.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}
        lacks = why_not(TESTS, tool[:1])
        return Step(name, limit_s, command, lacks, must_say=r"[1-9]\d* passed.*", variables=variables)

    def search(self, name: str, limit_s: float, *arguments: str, references: tuple[str, ...] = ()) -> Step:
        """The kernel's time at the shape of the 7B model."""
        arguments = ("--models", _SEVEN_B, *arguments, "--references", *(references or ("none",)))
        lacks = why_not(KERNEL)
        return self.script(name, limit_s, "block_search", *arguments, headline=search_headline, lacks=lacks)

    def sanitizer(self, tool: str) -> tuple[str, ...]:
        return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")


def make_steps(part: int, python: str) -> list[Step]:
    """The steps of a part, those of most worth first."""
    return _first_part(_Commands(python), python) if part == 1 else _second_part(_Commands(python), python)


_SANITIZED = ("tests/search", "-k", "sanitizer")
_HARNESS = [str(_PLUGINS / "plugin_harness"), str(_PLUGINS / "libtrtllm_memshare_plugin.so"), "--gpu", "require"]
_HELD = r"\d+ of \d+ checks held"


def _plugin_lacks() -> str | None:
    headers = {"TENSORRT_ROOT (a folder with TensorRT's include/)": _tensorrt_root() is not None}
    return why_not(KERNEL, ("nvcc", "cmake"), headers)


def _first_part(make: _Commands, python: str) -> list[Step]:
    root = _tensorrt_root()
    build = [python, "build_scripts/build_plugins.py", "--preset", "native", "--output-dir", str(_PLUGINS)]
    return [
        make.search("search_bf16", 55, "--dtypes", "bfloat16", "--pairs", "64", "1", "8", "512"),
        Step("plugin_build", 75, build, _plugin_lacks(), variables={"TENSORRT_ROOT": root} if root else {}),
        Step("plugin_harness", 25, _HARNESS, _plugin_lacks(), must_say=_HELD),
        make.tests("gpu_tests", 95, "tests/search", "tests/runners"),
        make.search("search_fp8_int8", 45, "--dtypes", "float8_e4m3fn", "int8", "--pairs", "64", "512"),
        make.tests("memcheck", 75, *_SANITIZED,
                   tool=(*make.sanitizer("memcheck"), "--report-api-errors", "no")),
        make.script("replay_7b", 135, "trace_replay", "--variants", "off", "shadow", "full-searches",
                    "--output-tokens", "256", "--budget-s", "90", headline=replay_headline, lacks=why_not(MODEL)),
    ]  # fmt: skip


def _second_part(make: _Commands, python: str) -> list[Step]:
    ncu = ["ncu", "--metrics", "dram__throughput.avg.pct_of_peak_sustained_elapsed,"
           "smsp__issue_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread",
           "--kernel-name", "block_distance", "--launch-count", "3", python, "benchmarks/block_search.py", "--models",
           _SEVEN_B, "--dtypes", "bfloat16", "float8_e4m3fn", "int8", "--pairs", "512", "--repeat", "1",
           "--references", "none"]  # fmt: skip
    model, engine = _real_model(), str(WORK / "real_engine")
    needs = why_not((*MODEL, "gguf", "accelerate"), (), {"SmolLM2 (build_scripts/get_smollm2.py)": model is not None})
    convert = [python, "benchmarks/real_engine.py", "--model", str(model), "--output-dir", engine]
    requests = str(WORK / "requests.jsonl")
    write = [python, "-m", "benchmarks.studies.pressure.make_requests", "--model-dir", f"{engine}_checkpoint",
             "--num-requests", "64", "--max-tokens", "1024", "--output", requests]  # fmt: skip
    return [
        Step("real_engine", 40, convert, needs),
        Step("real_requests", 15, write, needs),
        make.script("real_model_pressure", 85, "inflight_batching", "--engine-dir", engine, "--device", "cuda",
                    "--dataset", requests, "--replay", "--kv-cache-share", "0.5", "--variants", "full",
                    "full-guaranteed", "pressure", "pressure-guaranteed", headline=throughput_headline, lacks=needs),
        make.search("search_16_tokens", 25, "--dtypes", "bfloat16", "--pairs", "64", "512", "--tokens-per-block", "16"),
        make.search("search_64_tokens", 25, "--dtypes", "bfloat16", "--pairs", "64", "512", "--tokens-per-block", "64"),
        Step("ncu", 50, ncu, why_not(KERNEL, ("ncu",)), must_say=r"dram__throughput\S+ +% +[\d.]+"),
        make.tests("racecheck", 40, *_SANITIZED, tool=make.sanitizer("racecheck")),
        make.tests("initcheck", 40, *_SANITIZED, tool=make.sanitizer("initcheck")),
        Step("memcheck_plugin", 45, [*make.sanitizer("memcheck"), *_HARNESS],
             why_not((), ("compute-sanitizer",), {"the plugin of part 1": (_PLUGINS / "plugin_harness").is_file()}),
             must_say=_HELD),
        make.search("search_compiled", 30, "--dtypes", "bfloat16", "--pairs", "64", "--reference-budget-s", "20",
                    references=("eager", "compiled")),
        make.script("replay_half_null", 75, "trace_replay", "--batch-size", "64", "--output-tokens", "1536", "--repeat",
                    "1", "--variants", "off", "half-dropped", "half-null", headline=replay_headline,
                    lacks=why_not(MODEL)),
        make.script("replay_no_graphs", 35, "trace_replay", "--variants", "off", "full-searches", "--output-tokens",
                    "48", "--repeat", "1", "--no-graphs", headline=replay_headline, lacks=why_not(MODEL)),
    ]  # fmt: skip


def search_headline(report: dict[str, Any]) -> str:
    """A line a row: time, share of the bandwidth of a copy, and the reference's time where it was taken."""
    lines = []
    for row in report["rows"]:
        if "kernel_us" not in row:
            continue
        line = (f"{row['dtype']} {row['pairs']} pairs of {report['tokens_per_block']}: {row['kernel_us']:.1f} us, "
                f"{row['share_of_copy_bandwidth']:.0%} of a copy")  # fmt: skip
        for label in ("reference", "compiled"):
            if f"{label}_us" in row:
                line += f", {label} {row[f'{label}_us']:.0f} us"
        lines.append(line)
    errors = [row["kernel_relative_error"] for row in report["rows"] if "kernel_relative_error" in row]
    lines[0] += f"; copy {report['copy_gb_s'] / 1e3:.2f} TB/s, error {max(errors):.0e}" if errors else ""
    return "\n".join(lines)


def replay_headline(report: dict[str, Any]) -> str:
    """Step times of the variants, and what attended."""
    parts = []
    for name, row in report["variants"].items():
        over = "" if row["over_off"] is None else f" ({row['over_off']:+.1%})"
        parts.append(f"{name} {row['step_ms_mean']:.2f} ms{over}, {row['step_ms_last_tenth']:.2f} at the end")
    return f"{report['batch_size']} x {report['output_tokens']}: {'; '.join(parts)}; {report['decode_attention']}"


def throughput_headline(report: dict[str, Any]) -> str:
    """Requests per second of the variants."""
    rates = [f"{v['variant']} {v['request_throughput_req_s']:.3g}" for v in report["variants"]]
    return f"requests/s: {', '.join(rates)}; {report['kv_cache_blocks']} blocks; {report['decode_attention']}"
