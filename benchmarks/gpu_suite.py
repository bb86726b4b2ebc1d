"""Everything that needs a GPU, in two parts of at most nine minutes; see ``gpu_suite.sh``.

--help and --dry-run need nothing but Python; --dry-run names what each step lacks here. The status is 0 only if every
step of the part ran and ended well.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_steps import (
    HELD_BACK_S,
    KIT,
    PARTS,
    REQUIREMENTS,
    ROOT,
    SECONDS_A_PART,
    TESTS,
    WORK,
    absent_modules,
    make_steps,
)
from step_runner import Step, Suite

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


def list_steps(steps: list[Step], gpu: str | None) -> str:
    """What would run, within which time, and what is missing here."""
    lines = [f"{'step':<24} {'limit':>7}  here"]
    lines += [f"{step.name:<24} {step.limit_s:>5.0f} s  {step.missing or 'can run'}" for step in steps]
    lines.append(f"{'all':<24} {sum(step.limit_s for step in steps):>5.0f} s  of {SECONDS_A_PART - HELD_BACK_S}")
    lines.append(f"GPU: {gpu or f'none that the torch of {sys.executable} can use (set PYTHON)'}")
    absent = absent_modules(TESTS)
    if absent:
        quoted = " ".join(f"'{REQUIREMENTS[name]}'" for name in absent)
        lines.append(f"missing modules: {', '.join(absent)} (pip install {quoted}, or bring a kit: "
                     "build_scripts/pack_gpu_kit.sh)")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, default=1, help="1 first: it has what matters most")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build" / "gpu_suite", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS_A_PART, help="for the part, all in (default: 540)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and what is missing, run nothing")
    options = parser.parse_args()
    steps = make_steps(options.part, sys.executable)
    unknown = set(options.steps or ()) - {step.name for step in steps}
    if unknown:
        names = ", ".join(step.name for step in steps)
        parser.error(f"part {options.part} has no step {', '.join(sorted(unknown))} (it has {names})")
    steps = [step for step in steps if options.steps is None or step.name in options.steps]
    gpu = gpu_name()
    if options.dry_run:
        print(list_steps(steps, gpu))
        return int(gpu is None or any(step.missing for step in steps))
    software = describe_software()
    print("; ".join(f"{name} {version}" for name, version in software.items()), flush=True)
    if gpu is None or all(step.missing for step in steps):
        print(list_steps(steps, gpu), "error: nothing can run here, see above", sep="\n", file=sys.stderr)
        return 2
    head: dict[str, Any] = {
        "command": f"bash benchmarks/gpu_suite.sh --part {options.part}",
        "date": datetime.date.today().isoformat(),
        "device": gpu,
        "software": software,
        "commit": os.environ.get("TRTLLM_MEMSHARE_COMMIT"),
        "kit": sorted(path.name for path in KIT.iterdir()) if KIT.is_dir() else None,
    }
    device = re.sub(r"[^a-z0-9]+", "_", gpu.lower().removeprefix("nvidia ")).strip("_")
    name = f"gpu_{device}_part{options.part}"
    seconds = options.seconds - HELD_BACK_S - (time.monotonic() - started)
    suite = Suite(WORK, options.output_dir, name, ROOT, seconds, head)

    def end(number: int, _: Any) -> None:
        suite.interrupt()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    for step in steps:
        suite.run(step)
    print(f"\n{gpu}, part {options.part}: {options.output_dir}/{name}.json (benchmarks/results/ is its place)")
    print(suite.table())
    return int(suite.has_failed)


if __name__ == "__main__":
    sys.exit(main())
