"""Versions that a report of the GPU suite depends on, and what a machine could run. Imports torch only to ask it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib import metadata

from benchmarks.gpu.needs import REQUIREMENTS, absent_modules
from benchmarks.gpu.step_runner import Step

_VERSIONS = ("torch", "transformers", "numpy", "pydantic", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton",
             "flashinfer-python", "tensorrt")  # fmt: skip


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
        "ncu": ["ncu", "--version"],
        "device": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
    }
    for name, command in tools.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            release = re.search(r"release [\d.]+|[Vv]ersion [\d.]+", done.stdout)
            versions[name] = release[0] if release else (done.stdout.strip().splitlines() or ["says nothing"])[-1]
        except (OSError, subprocess.SubprocessError) as error:
            versions[name] = "not on PATH" if isinstance(error, FileNotFoundError) else str(error)
    return versions


def gpu_name() -> str | None:
    """The CUDA device that this interpreter's torch can use."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def list_steps(steps: list[Step], gpu: str | None, seconds: float) -> str:
    """What would run, within which time, and what is missing here; ``seconds``: for all steps together."""
    lines = [f"{'step':<24} {'limit':>7}  here"]
    lines += [f"{step.name:<24} {step.limit_s:>5.0f} s  {step.missing or 'can run'}" for step in steps]
    lines.append(f"{'all':<24} {sum(step.limit_s for step in steps):>5.0f} s  of {seconds:.0f}")
    lines.append(f"GPU: {gpu or f'none that the torch of {sys.executable} can use (set PYTHON)'}")
    absent = absent_modules(tuple(dict.fromkeys(name for step in steps for name in step.modules)))
    if absent:
        quoted = " ".join(f"'{REQUIREMENTS[name]}'" for name in absent)
        lines.append(f"missing modules: {', '.join(absent)} (pip install {quoted}, or bring a kit: "
                     "build_scripts/pack_gpu_kit.sh)")  # fmt: skip
    return "\n".join(lines)
