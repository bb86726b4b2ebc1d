"""The steps of ``gpu_suite.sh``, in the order of their worth, under one deadline; see there for how to run it.

Imports nothing outside the standard library before it has looked for what the steps need.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_suite_work"
_PLUGINS = ROOT / "build" / "plugins"  # where the tests with TensorRT look for the library
_LEAST_S = 5  # a step with less is not started
_BEHIND_S = 15  # kept for the last report and for a step that has to be killed
_TAIL_LINES = 25

NEEDED = {
    "torch": "torch>=2.6", "numpy": "numpy", "pydantic": "pydantic>=2.6,<3", "transformers": "transformers>=4.57,<6",
    "tokenizers": "tokenizers>=0.22", "safetensors": "safetensors>=0.4", "tqdm": "tqdm", "yaml": "pyyaml",
    "pytest": "pytest>=8", "hypothesis": "hypothesis", "cuda.core.utils": "cuda-core>=1.0,<2",
    "cuda.bindings.nvrtc": "cuda-bindings>=12.8",
}  # fmt: skip
"""Modules that the steps import, and what pip calls them."""

_VERSIONS = ("torch", "transformers", "numpy", "pydantic", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton",
             "flashinfer-python", "tensorrt")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command of the suite.

    Attributes:
      limit_s: most seconds it may take.
      missing: why it cannot run, None = it can.
      must_say: pattern that its output must hold beside status 0; where pytest skips every test, it ends well.
      report: JSON that it writes, taken into the suite's report whether the step ended well or not.
      variables: for its environment.
    """

    name: str
    limit_s: float
    command: list[str]
    missing: str | None = None
    must_say: str | None = None
    report: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)


class Suite:
    """Runs steps one after the other and writes the report after each.

    Args:
      work: where logs go.
      out: where the three files of the report go.
      seconds: for all steps together.
      head: first entries of the report.
      grace_s: between the request to end and the end of a step that is out of time.
    """

    def __init__(self, work: Path, out: Path, seconds: float, head: dict[str, Any], grace_s: float = 10) -> None:
        self._work, self._out, self._head, self._grace_s = work, out, head, grace_s
        self._started, self._seconds = time.monotonic(), seconds
        self.rows: list[dict[str, Any]] = []
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)
        for log in work.glob("*.log"):
            log.unlink()

    def run(self, step: Step) -> None:
        """Runs a step within its limit and what is left of the suite's time; records how it ended."""
        left = self._seconds - (time.monotonic() - self._started)
        limit = min(step.limit_s, left)
        row: dict[str, Any] = {"step": step.name, "command": " ".join(step.command)}
        if step.missing is not None:
            row.update(result="not run", note=step.missing)
        elif limit < _LEAST_S:
            row.update(result="no time left", note=f"{max(0.0, left):.0f} s of {self._seconds:.0f} left")
        else:
            print(f"-- {step.name}: at most {limit:.0f} s", flush=True)
            row.update(self._execute(step, limit))
        if step.report is not None and step.report.is_file():
            row["report"] = json.loads(step.report.read_text())
        self.rows.append(row)
        print(f"== {step.name}: {row['result']} ({row['note']})", flush=True)
        self.write()

    def write(self) -> None:
        """Rewrites the report, the table and the logs' archive."""
        spent = time.monotonic() - self._started
        document = {
            **self._head,
            "seconds": round(spent, 1),
            "seconds_allowed": round(self._seconds, 1),
            "steps": self.rows,
        }
        _replace(self._out / "gpu_suite.json", json.dumps(document, indent=1) + "\n")
        _replace(self._out / "gpu_suite.txt", self.table() + "\n")
        partial = self._out / "logs.partial"
        with tarfile.open(partial, "w:gz") as archive:
            for log in sorted(self._work.glob("*.log")):
                archive.add(log, log.name)
        partial.replace(self._out / "logs.tar.gz")

    def table(self) -> str:
        """One line a step."""
        return "\n".join(f"{r['step']:<20} {r['result']:<13} {r['note']}" for r in self.rows)

    @property
    def has_failed(self) -> bool:
        return any(row["result"] in ("failed", "timed out") for row in self.rows)

    def _execute(self, step: Step, limit: float) -> dict[str, Any]:
        log, started = self._work / f"{step.name}.log", time.monotonic()
        if step.report is not None:
            step.report.unlink(missing_ok=True)  # of an earlier run
        with log.open("wb") as output:
            process = subprocess.Popen(
                step.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **step.variables}, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                self._end(process)
        text = log.read_text(errors="replace")
        tail = [line[:200] for line in text.splitlines()[-_TAIL_LINES:]]
        print("\n".join(tail), flush=True)
        seconds = round(time.monotonic() - started, 1)
        if status is None:
            return {"result": "timed out", "note": f"limit {limit:.0f} s", "seconds": seconds, "tail": tail}
        if status:
            return {"result": "failed", "note": f"status {status}", "seconds": seconds, "tail": tail}
        found = re.findall(step.must_say, text) if step.must_say else [f"{seconds} s"]
        if not found:
            note = f"status 0, but its output does not say {step.must_say!r}"
            return {"result": "failed", "note": note, "seconds": seconds, "tail": tail}
        return {"result": "ok", "note": found[-1], "seconds": seconds}

    def _end(self, process: subprocess.Popen) -> None:
        """Asks the step and what it started to end, then makes them."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            try:
                process.wait(self._grace_s)
            except subprocess.TimeoutExpired:
                continue
            if number == signal.SIGTERM:
                continue  # the leader is gone; its children may be deaf to it


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def missing_modules() -> dict[str, str]:
    """What pip installs, by module, of those that cannot be imported."""
    missing = {}
    for name, requirement in NEEDED.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"missing: {name}: {error}", file=sys.stderr)
            missing[name] = requirement
    return missing


def describe_software() -> dict[str, str]:
    """Versions of what the figures depend on; "not installed" or "not on PATH" where there is none."""
    versions = {"python": sys.version.split()[0]}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    tools = {
        "nvcc": ["nvcc", "--version"],
        "cmake": ["cmake", "--version"],
        "compute-sanitizer": ["compute-sanitizer", "--version"],
        "device": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
    }
    for name, command in tools.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            release = re.search(r"release [\d.]+|version [\d.]+", done.stdout)
            versions[name] = release[0] if release else (done.stdout.strip().splitlines() or ["says nothing"])[-1]
        except (OSError, subprocess.SubprocessError) as error:
            versions[name] = "not on PATH" if isinstance(error, FileNotFoundError) else str(error)
    return versions


def make_steps(python: str, arch: str) -> list[Step]:
    """The steps, those of most worth first. ``arch``: of the GPU."""
    from trtllm_memshare.search.kernel_compiler import ARCHITECTURES

    suite_tests = sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text()
    )
    pytest = [python, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider"]
    passed = r"[1-9]\d* passed.*"
    lacking = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    lacking += [] if os.environ.get("TENSORRT_ROOT") else ["TENSORRT_ROOT"]
    no_plugin = f"needs {', '.join(lacking)}" if lacking else None
    harness = [str(_PLUGINS / "plugin_harness"), str(_PLUGINS / "libtrtllm_memshare_plugin.so"), "--gpu", "require"]
    held = r"\d+ of \d+ checks held"

    def script(name: str, limit_s: float, *arguments: str) -> Step:
        report = WORK / f"{name}.json"
        command = [python, f"benchmarks/{name}.py", *arguments, "--output-json", str(report)]
        return Step(name, limit_s, command, report=report)

    engine = str(WORK / "engine")
    steps = [
        Step("gpu_tests", 120, [*pytest, *suite_tests], must_say=passed),
        script("block_search", 200, "--reference-budget-s", "110"),
        Step(
            "plugin_build", 90,
            [python, "build_scripts/build_plugins.py", "--preset", "native", "--output-dir", str(_PLUGINS)], no_plugin,
        ),
        Step("plugin_harness", 40, harness, no_plugin, must_say=held),
        script("trace_replay", 150, "--variants", "off", "shadow", "full-searches", "--output-tokens", "256",
               "--budget-s", "100"),
        Step("engine", 40, [python, "build_scripts/build_engine.py", "--memshare", "--force", "--output-dir", engine]),
        # shadow before aligned: the first of them to search waits for the kernel to be compiled.
        script("inflight_batching", 90, "--engine-dir", engine, "--device", "cuda", "--dataset",
               "benchmarks/data/small.jsonl", "--num-requests", "16", "--kv-cache-share", "0.5", "--variants", "full",
               "shadow", "aligned"),
        Step("kernels_compile", 40, [python, "build_scripts/build_plugins.py", "--check", "--arch", arch],
             None if arch in ARCHITECTURES else f"{arch} is none of {', '.join(ARCHITECTURES)}"),
    ]  # fmt: skip
    no_tool = None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"
    # Torch's allocator hands out parts of large blocks, inside which nothing is out of bounds.
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    test = "tests/search/test_cuda_block_distance.py"
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        steps += [
            Step(f"{tool}_nvrtc", 90, [*sanitizer, "--report-api-errors", "no", *pytest, test, "-k", "sanitizer"],
                 no_tool, must_say=passed, variables=own_allocations),
            Step(f"{tool}_plugin", 90, [*sanitizer, *harness], no_tool or no_plugin, must_say=held),
        ]  # fmt: skip
    return steps


def main() -> int:
    started = time.monotonic()
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "gpu_suite")
    software = describe_software()
    for name, version in software.items():
        print(f"{name}: {version}", flush=True)
    missing = missing_modules()
    if missing:
        quoted = " ".join(f"'{requirement}'" for requirement in missing.values())
        print(f"error: {sys.executable} lacks {', '.join(missing)} (pip install {quoted})", file=sys.stderr)
        return 2
    import torch

    from trtllm_memshare.errors import UserError
    from trtllm_memshare.evaluation.machine import describe_machine
    from trtllm_memshare.search.kernel_compiler import import_cuda_core

    if not torch.cuda.is_available():
        print(f"error: no CUDA device that {sys.executable}'s torch {torch.__version__} can use (set PYTHON to an "
              "interpreter with a CUDA build)", file=sys.stderr)  # fmt: skip
        return 2
    try:
        import_cuda_core()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import datetime

    has_flashinfer = software["flashinfer-python"] != "not installed"
    head = {
        "command": "bash benchmarks/gpu_suite.sh",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "software": software,
        "decode_attention": "FlashInfer with CUDA graphs"
        if has_flashinfer
        else "PyTorch, no CUDA graphs: FlashInfer is not installed",
    }
    seconds = float(os.environ.get("GPU_SUITE_SECONDS", "540")) - _BEHIND_S - (time.monotonic() - started)
    suite = Suite(WORK, out, seconds, head)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for step in make_steps(sys.executable, arch):
        suite.run(step)
    print(f"{software['device']}; decode attention: {head['decode_attention']}\n{suite.table()}")
    return int(suite.has_failed)


if __name__ == "__main__":
    sys.exit(main())
