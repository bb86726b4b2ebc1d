"""FlashInfer's decode attention compiled beforehand, on a machine without a GPU, for one that compiles nothing.

FlashInfer's own specifications say what a module is made of and how; they need no GPU once the architecture is named.
It looks for ``flashinfer/data/aot/NAME/NAME.so`` before it compiles. A module is 0.4 to 2 MiB.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_scripts.gpu_kit.layout import ROOT, Kit, KitError
from build_scripts.gpu_kit.wheels import download_wheel

WHEELS = ("flashinfer_python==0.6.13", "apache_tvm_ffi==0.1.15.post2")
"""14 MiB and 3 MiB; later releases of the first are four times as large."""
_IMPORTED = ("nvidia-ml-py", "einops", "tabulate")  # at import, beside what the development environment has
WORK = ROOT / "build" / "flashinfer"
"""Objects stay here, so that a second kit compiles nothing again."""

_COMPILE = """
import sys
import torch
from flashinfer.jit import gen_batch_decode_module, gen_batch_prefill_module
t, i = torch.bfloat16, torch.int32
modules = [
    gen_batch_decode_module(t, t, t, i, 64, 64, 0, False, False),  # SmolLM2: three query heads to a KV head
    gen_batch_prefill_module("fa2", t, t, t, i, 128, 128, 0, False, False, False),  # 7B: seven, by tensor cores
]
for module in modules:
    module.build(verbose=False)
    print(module.get_library_path())
"""


def compile_modules(kit: Kit, arch: str) -> None:
    """Compiles the modules that the suite's two models need into ``kit.modules``; about ten minutes of one core.

    Args:
      kit: with FlashInfer's wheel among its wheels.
      arch: as FlashInfer writes it, such as 9.0a.

    Raises:
      KitError: a compiler or a tool that is missing, with the first lines that say so.
    """
    for tool in ("nvcc", "ninja", "c++"):
        if shutil.which(tool) is None:
            raise KitError(
                f"FlashInfer's modules need nvcc, ninja and c++ on PATH, got no {tool} (leave out --flashinfer)"
            )
    wheels, site = WORK / "wheels", WORK / "site"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    for name in (*WHEELS, *_IMPORTED):
        download_wheel(name, wheels, None)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target"]
    _check(
        subprocess.run([*install, str(site), *map(str, wheels.iterdir())], capture_output=True, text=True, check=False)
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "FLASHINFER_CUDA_ARCH_LIST": arch,
        "FLASHINFER_WORKSPACE_BASE": str(WORK),
        "CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda"),
        "LIBRARY_PATH": f"{_driver_stub()}:{os.environ.get('LIBRARY_PATH', '')}".rstrip(":"),
    }
    command = [sys.executable, "-c", _COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    _check(done)
    for library in map(Path, done.stdout.split()):
        (kit.modules / library.stem).mkdir(parents=True, exist_ok=True)
        shutil.copy(library, kit.modules / library.stem / library.name)
    kit.modules_arch.write_text(f"{arch}\n")


def _driver_stub() -> Path:
    """A folder with an empty libcuda.so: the linker asks for the driver's library, which comes with a GPU."""
    folder = WORK / "stub"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["c++", "-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so")]
    _check(subprocess.run(command, capture_output=True, text=True, check=False))
    return folder


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line.lower()]
        raise KitError("FlashInfer's modules must compile, got: " + (" | ".join(said[:3]) or done.stderr[-300:])[:600])
