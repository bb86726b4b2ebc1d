"""The plugin library and its harness over the host run of CUDA: every check that a GPU would see, without one.

TensorRT itself is not there: its headers are, and the harness plays its part.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from plugins.kernels_on_host import FLAGS, HOST, KERNELS, find_compiler

PLUGINS = KERNELS.parent


def build(output: Path, *arguments: str | Path) -> Path:
    headers = Path(os.environ["TENSORRT_ROOT"]) / "include"
    includes = [f"-I{HOST}", f"-I{KERNELS}", "-isystem", str(headers)]
    subprocess.run([find_compiler(), *FLAGS, *includes, "-fPIC", *map(str, arguments), "-o", str(output)], check=True)
    return output


@pytest.mark.tensorrt
@pytest.mark.skipif(not os.environ.get("TENSORRT_ROOT"), reason="TENSORRT_ROOT is not set: no TensorRT headers")
def test_the_plugin_holds_every_check_of_the_harness_with_the_kernels_on_the_host(tmp_path):
    """Enqueue, graphs, five dtypes, both layouts, padding, rows out of the pool, the build phase; signatures."""
    run = HOST / "run.cpp"
    sources = sorted((PLUGINS / "tensorrt").glob("*.cpp"))
    kernels = [HOST / "block_distance.cpp", HOST / "page_signatures.cpp"]
    library = build(tmp_path / "libplugin.so", "-shared", *sources, *kernels, run)
    harness = build(tmp_path / "harness", *sorted((PLUGINS / "harness").glob("*.cpp")), run, "-ldl")
    done = subprocess.run([harness, library, "--gpu", "require"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "89 of 89 checks held" in done.stdout
