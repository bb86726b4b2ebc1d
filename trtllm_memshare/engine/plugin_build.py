"""Builds the TensorRT plugin library with CMake, and compiles the kernels without a GPU to see what they need."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trtllm_memshare.engine.nvcc import check_nvcc
from trtllm_memshare.errors import UserError, nearest
from trtllm_memshare.search.kernel_compiler import (
    ARCHITECTURES,
    KernelResources,
    checked_variants,
    import_cuda_core,
    kernel_resources,
)
from trtllm_memshare.search.kernel_source import KernelVariant

PLUGINS_DIR = Path(__file__).resolve().parents[2] / "plugins"
LIBRARY_NAME = "libtrtllm_memshare_plugin.so"
HARNESS_NAME = "plugin_harness"

_HEADERS = "take include/ of github.com/NVIDIA/TensorRT, branch release/10.14, or a TensorRT installation"


CheckedKernels = dict[str, list[tuple[KernelVariant, KernelResources]]]
"""By architecture: what was compiled and what it needs."""


@dataclass(frozen=True)
class PluginBuild:
    """What a build takes.

    Attributes:
      tensorrt_root: folder with TensorRT's ``include/``.
      preset: of ``plugins/CMakePresets.json``: release, native or hopper.
      output_dir: where CMake works and the library ends up.
    """

    tensorrt_root: Path
    preset: str
    output_dir: Path


def plan_plugin_build(tensorrt_root: Path | None, preset: str, output_dir: Path) -> PluginBuild:
    """Looks for everything a build needs before anything is written.

    Args:
      tensorrt_root: None = the environment variable ``TENSORRT_ROOT``.

    Raises:
      UserError: the sources, CMake, nvcc 12.8 to 13.x or TensorRT's headers are missing; the message names which.
    """
    if not (PLUGINS_DIR / "CMakeLists.txt").is_file():
        raise UserError(f"the plugin sources are not at {PLUGINS_DIR} (run from a checkout of the project)")
    presets = ("release", "native", "hopper")
    if preset not in presets:
        raise UserError(f"unknown preset {preset} ({nearest(preset, presets)})")
    for tool, hint in (("cmake", "install cmake 3.22 or newer"), ("nvcc", "install CUDA 12.8 to 13.x, add it to PATH")):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is missing: it is not on PATH ({hint})")
    check_nvcc()
    named = tensorrt_root or (Path(os.environ["TENSORRT_ROOT"]) if os.environ.get("TENSORRT_ROOT") else None)
    if named is None:
        raise UserError(f"TensorRT's headers are missing: set TENSORRT_ROOT or --tensorrt-root ({_HEADERS})")
    if not (named / "include" / "NvInferRuntime.h").is_file():
        raise UserError(f"TENSORRT_ROOT must hold include/NvInferRuntime.h, got {named} ({_HEADERS})")
    return PluginBuild(named.resolve(), preset, output_dir.resolve())


def build_plugin(plan: PluginBuild) -> Path:
    """Configures and builds; prints the commands first. Library and harness of an earlier build go before that.

    Returns:
      The library's path; the harness lies beside it.

    Raises:
      UserError: a command failed; its output stands above.
    """
    configure = ["cmake", "--preset", plan.preset, "-B", str(plan.output_dir), f"-DTENSORRT_ROOT={plan.tensorrt_root}"]
    if shutil.which("make") is None and shutil.which("ninja") is not None:
        configure += ["-G", "Ninja"]  # CMake would insist on make
    for name in (LIBRARY_NAME, HARNESS_NAME):  # what a build left must be of this build, also where it fails
        (plan.output_dir / name).unlink(missing_ok=True)
    build = ["cmake", "--build", str(plan.output_dir), "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, build):
        print(f"+ {' '.join(command)}", flush=True)
        done = subprocess.run(command, cwd=PLUGINS_DIR, check=False)
        if done.returncode:
            raise UserError(f"{command[0]} failed with status {done.returncode} (its output is above)")
    return plan.output_dir / LIBRARY_NAME


def check_kernels(
    architectures: Sequence[str] = ARCHITECTURES,
) -> dict[str, list[tuple[KernelVariant, KernelResources]]]:
    """Compiles every variant for each architecture with NVRTC; no GPU, driver or nvcc is used.

    The plugin library's kernels are among them (shape "any"). Its own build by nvcc need not take the same registers,
    but an nvcc of NVRTC's version does.

    Raises:
      UserError: ``cuda.core`` is missing, or an architecture that the project does not build for.
      RuntimeError: a variant does not compile.
    """
    for arch in architectures:
        if arch not in ARCHITECTURES:
            raise UserError(f"unknown architecture {arch} ({nearest(arch, ARCHITECTURES)})")
    import_cuda_core()
    variants = checked_variants()
    with tqdm(total=len(architectures) * len(variants), unit="kernel", leave=False) as bar:
        checked: CheckedKernels = {}
        for arch in architectures:
            for variant in variants:
                checked.setdefault(arch, []).append((variant, kernel_resources(variant, arch)))
                bar.update()
    return checked


def resources_table(checked: CheckedKernels) -> str:
    """One line per architecture and variant."""
    lines = [f"{'arch':<7} {'dtype':<14} {'layout':<12} {'shape':>9} {'vector':>6} {'registers':>9} {'shared':>7} "
             f"{'spills':>7}"]  # fmt: skip
    for arch, rows in checked.items():
        lines += [
            f"{arch:<7} {v.dtype:<14} {_layout(v):<12} {_shape(v):>9} "
            f"{v.vector_elements:>6} {r.registers:>9} {r.shared_bytes:>5} B {r.spill_bytes:>5} B"
            for v, r in rows
        ]
    return "\n".join(lines)


def _layout(variant: KernelVariant) -> str:
    return "interleaved" if variant.interleaved else "half-split"


def _shape(variant: KernelVariant) -> str:
    return "any" if variant.any_shape else f"head {variant.head_dim}"


def spilling(checked: CheckedKernels) -> list[str]:
    """Names of the kernels that spill registers or use a stack frame: none may."""
    return [
        f"{arch} {variant.dtype} {_layout(variant)} {_shape(variant)}, vectors of {variant.vector_elements}"
        for arch, rows in checked.items()
        for variant, resources in rows
        if resources.spill_bytes or resources.stack_bytes
    ]
