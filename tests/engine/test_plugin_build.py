"""Compiling the kernels and building the plugin: what is checked first, what is said when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from trtllm_memshare.engine import plugin_build
from trtllm_memshare.engine.nvcc import nvcc_version
from trtllm_memshare.engine.plugin_build import (
    HARNESS_NAME,
    PLUGINS_DIR,
    build_plugin,
    check_kernels,
    plan_plugin_build,
    resources_table,
    spilling,
)
from trtllm_memshare.errors import UserError
from trtllm_memshare.search import kernel_compiler
from trtllm_memshare.search.kernel_compiler import KernelResources, import_cuda_core


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH with a cmake and an nvcc that only say their version, and TensorRT headers by name."""
    for name, says in (("cmake", "cmake version 3.25.1"), ("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\necho '{says}'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    header = tmp_path / "trt" / "include" / "NvInferRuntime.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return tmp_path


def test_every_kernel_compiles_for_hopper_without_a_gpu_and_none_spills():
    pytest.importorskip("cuda.core", reason="cuda.core is not installed (extra cuda)")
    checked = check_kernels(["sm_90"])
    dtypes = {(v.dtype, v.interleaved, v.vector_elements, v.any_shape) for v, _ in checked["sm_90"]}
    assert len(dtypes) == 5 * 2 * 2 * 2
    assert spilling(checked) == []
    # Two blocks of 256 threads must fit the 65,536 registers of a multiprocessor; of e4m3's 128, in the library, three.
    for variant, resources in checked["sm_90"]:
        is_wide = variant.any_shape and variant.dtype == "float8_e4m3fn" and variant.vector_elements > 1
        assert 0 < resources.registers <= (168 if is_wide else 128)
    assert resources_table(checked).count("sm_90") == len(checked["sm_90"])


def test_an_old_cuda_core_is_named_by_its_version(monkeypatch):
    old, utils = types.ModuleType("cuda.core"), types.ModuleType("cuda.core.utils")
    old.__version__, old.utils, old.Program = "0.7.0", utils, object
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setattr(sys.modules["cuda"], "core", old, raising=False)
    monkeypatch.setitem(sys.modules, "cuda.core", old)
    monkeypatch.setitem(sys.modules, "cuda.core.utils", utils)
    with pytest.raises(UserError, match=r"cuda.core must be 1.0 or newer, got 0.7.0 \(pip install"):
        import_cuda_core()
    utils.FileStreamProgramCache = object
    assert import_cuda_core() is old


def test_a_spill_is_named():
    variant = plugin_build.checked_variants()[0]
    rows = {"sm_80": [(variant, KernelResources(255, 128, 16, 0))], "sm_90": [(variant, KernelResources(40, 0, 0, 0))]}
    assert spilling(rows) == ["sm_80 float32 half-split head 64, vectors of 4"]


@pytest.mark.parametrize("missing", ["cmake", "nvcc"])
def test_a_missing_tool_is_named(tools, missing):
    (tools / "bin" / missing).unlink()
    with pytest.raises(UserError, match=f"^{missing} is missing: it is not on PATH"):
        plan_plugin_build(tools / "trt", "release", tools / "out")


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        ("#!/bin/sh\necho no such library >&2\nexit 127\n", "ends with status 127, got 'no such library' "),
        ("#!/no/such/shell\n", "nvcc does not run: No such file or directory"),
    ],
)
def test_an_nvcc_that_fails_is_one_sentence(tools, nvcc, message):
    (tools / "bin" / "nvcc").write_text(nvcc)
    with pytest.raises(UserError, match=rf"{message}.*\(reinstall the CUDA toolkit\)"):
        plan_plugin_build(tools / "trt", "release", tools / "out")


def test_a_kernel_is_compiled_without_a_cache_where_none_can_be_kept(tmp_path, monkeypatch, caplog):
    class Program:
        def __init__(self, *arguments):
            pass

        def compile(self, kind, logs, cache=None):
            return kind, cache

    class FileStreamProgramCache:
        def __init__(self, folder):
            folder.mkdir(parents=True)

    core = types.SimpleNamespace(
        Program=Program, ProgramOptions=lambda **_: None,
        utils=types.SimpleNamespace(FileStreamProgramCache=FileStreamProgramCache),
    )  # fmt: skip
    monkeypatch.setattr(kernel_compiler, "import_cuda_core", lambda: core)
    (tmp_path / "file").touch()
    for _ in range(2):
        assert kernel_compiler.compile_source("", "x", [], "sm_90", tmp_path / "file" / "cache") == ("cubin", None)
    assert [r.getMessage() for r in caplog.records] == [
        f"kernels cannot be kept in {tmp_path / 'file' / 'cache'}: [Errno 20] Not a directory: "
        f"'{tmp_path / 'file' / 'cache'}' (they are compiled at every start; make the folder writable)"
    ]


def test_missing_headers_an_old_nvcc_and_an_unknown_preset_are_named(tools):
    with pytest.raises(UserError, match="set TENSORRT_ROOT or --tensorrt-root"):
        plan_plugin_build(None, "release", tools / "out")
    with pytest.raises(UserError, match=r"must hold include/NvInferRuntime.h, got .*/nothing"):
        plan_plugin_build(tools / "nothing", "release", tools / "out")
    with pytest.raises(UserError, match=r"unknown preset hoper \(did you mean hopper"):
        plan_plugin_build(tools / "trt", "hoper", tools / "out")
    (tools / "bin" / "nvcc").write_text("#!/bin/sh\necho 'release 12.4, V12.4.1'\n")
    with pytest.raises(UserError, match=r"nvcc must be 12.8 to 13.x, got 12.4"):
        plan_plugin_build(tools / "trt", "release", tools / "out")
    assert not (tools / "out").exists()


def test_a_build_that_fails_leaves_nothing_of_an_earlier_one(tools):
    """An old harness would hold the checks of an old library."""
    plan = plan_plugin_build(tools / "trt", "native", tools / "out")
    plan.output_dir.mkdir()
    for name in (plugin_build.LIBRARY_NAME, HARNESS_NAME, "CMakeCache.txt"):
        (plan.output_dir / name).write_text("of an earlier build")
    (tools / "bin" / "cmake").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(UserError, match="cmake failed with status 3"):
        build_plugin(plan)
    assert [path.name for path in plan.output_dir.iterdir()] == ["CMakeCache.txt"]


def test_the_environment_names_the_headers(tools, monkeypatch):
    monkeypatch.setenv("TENSORRT_ROOT", str(tools / "trt"))
    plan = plan_plugin_build(None, "native", tools / "out")
    assert (plan.tensorrt_root, plan.preset) == ((tools / "trt").resolve(), "native")


def test_a_version_that_cannot_be_read_is_an_error():
    assert nvcc_version("Cuda compilation tools, release 12.8, V12.8.93") == (12, 8)
    with pytest.raises(UserError, match="should name a release, got 'nvcc'"):
        nvcc_version("nvcc\n")


def test_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="unknown architecture sm_75"):
        check_kernels(["sm_75"])


@pytest.fixture(scope="session")
def built_library(tmp_path_factory) -> Path:
    """The plugin, built against TENSORRT_ROOT's headers."""
    if not os.environ.get("TENSORRT_ROOT"):
        pytest.skip("TENSORRT_ROOT is not set: no TensorRT headers to build the plugin with")
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH: the plugin cannot be built")
    return build_plugin(plan_plugin_build(None, "hopper", tmp_path_factory.mktemp("plugins")))


@pytest.mark.tensorrt
def test_the_harness_walks_the_plugins_life(built_library):
    done = subprocess.run([built_library.parent / HARNESS_NAME, built_library], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout


@pytest.mark.tensorrt
def test_the_library_exports_three_names_and_links_nothing_of_tensorrt(built_library):
    symbols = subprocess.run(["nm", "-D", "--defined-only", built_library], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in symbols.stdout.splitlines() if " A " not in line}
    assert exported == {"getCreators", "setLoggerFinder", "memshare_page_signatures"}
    needed = subprocess.run(["readelf", "-d", built_library], capture_output=True, text=True, check=True).stdout
    libraries = [line.partition("[")[2].rstrip("]") for line in needed.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [name for name in libraries if "nvinfer" in name or "cudart" in name or "tensorrt" in name]


@pytest.mark.tensorrt
def test_the_harness_refuses_what_is_no_plugin(built_library, tmp_path):
    other = tmp_path / "empty.so"
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", other], check=True)
    done = subprocess.run([built_library.parent / HARNESS_NAME, other], capture_output=True, text=True)
    said = "error: the library must export getCreators, setLoggerFinder and memshare_page_signatures (plugin_harness "
    assert (done.returncode, done.stderr) == (2, f"{said}LIBRARY [--gpu auto|require|never])\n")


def test_kernel_sources_travel_with_the_package():
    packaged = PLUGINS_DIR.parent / "trtllm_memshare" / "kernels"
    assert packaged.resolve() == PLUGINS_DIR / "kernels"
