"""The doctor: what it finds, what it concludes, and its exit code."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from trtllm_memshare.__main__ import main
from trtllm_memshare.errors import UserError
from trtllm_memshare.evaluation.machine import describe_machine
from trtllm_memshare.report import components as components_module
from trtllm_memshare.report import doctor
from trtllm_memshare.report.components import Component, find_components

NAMES = {name for surface in doctor.SURFACES for name in surface.needs}


def everything(**changes: str) -> list[Component]:
    """All components found; ``changes``: details of some, with ``_`` for other characters in their names."""
    details = {"TensorRT-LLM": "1.2.1", **{k.replace("_", "-"): v for k, v in changes.items()}}
    return [Component(name, True, details.get(name, "1.0")) for name in sorted(NAMES)]


def lacking(*names: str) -> list[Component]:
    return [replace(c, found=False, remedy=f"get {c.name}") if c.name in names else c for c in everything()]


def test_every_need_of_a_surface_is_looked_for(tmp_path):
    assert {c.name for c in find_components(tmp_path / "none.so")} == NAMES


def test_with_everything_every_surface_can_run():
    assert [d.lacks for d in doctor.diagnose(everything())] == [[]] * len(doctor.SURFACES)


def test_what_is_missing_is_named_with_its_remedy_once():
    diagnoses = doctor.diagnose(lacking("GPU", "plugin library"))
    lacks = {d.surface.name: [c.name for c in d.lacks] for d in diagnoses}
    assert lacks["engine"] == ["GPU", "plugin library"]
    assert lacks["pytorch"] == ["GPU"]
    assert lacks["torch"] == lacks["triton"] == lacks["kernels"] == []
    text = doctor.describe(lacking("GPU", "plugin library"), diagnoses)
    assert text.count("get GPU") == 1
    assert "--  engine   TensorRT-LLM 1.2.1 engines: lacks GPU, plugin library" in text
    assert "ok  torch    embedded default: torch runner: can run: make demo" in text


def test_a_later_tensorrt_llm_has_a_pytorch_backend_and_no_engines():
    lacks = {d.surface.name: d.lacks for d in doctor.diagnose(everything(TensorRT_LLM="1.3.0"))}
    assert lacks["pytorch"] == []
    assert "1.3.0 has no engine backend" in lacks["engine"][0].detail


@pytest.mark.parametrize(
    ("module", "detail"),
    [
        (SimpleNamespace(__version__="10.14.1.48"), "10.14.1.48"),
        (SimpleNamespace(__version__="11.1.0"), "TensorRT must be 10.14, got 11.1.0"),
        (OSError("libnvinfer.so.10: cannot open shared object file"), "libnvinfer.so.10"),
    ],
)
def test_tensorrt_is_asked_for_its_version(module, detail):
    def load(name):
        if isinstance(module, Exception):
            raise module
        return module

    found = components_module._tensorrt(load)
    assert detail in found.detail
    assert found.found == (detail == "10.14.1.48")
    assert bool(found.remedy) != found.found


@pytest.mark.parametrize(
    ("version", "cuda", "found", "phrase"),
    [
        ("580.65.06", "13.0 (torch)", True, ""),
        ("570.172.08", "13.0 (torch)", False, "580 or newer for CUDA 13"),
        ("570.172.08\n570.172.08", "12.8 (torch)", True, ""),
        ("520.61.05", "12.8 (torch)", False, "525 or newer for CUDA 12"),
        ("470.10", "torch is built for the CPU", True, ""),
        (None, "torch is built for the CPU", False, "580 or newer for CUDA 13"),
        ("", "12.8 (torch)", False, "525 or newer for CUDA 12"),
        ("[N/A]\n[N/A]", "13.0 (torch)", False, "580 or newer for CUDA 13"),
        ("No devices were found", "torch is built for the CPU", False, "580 or newer for CUDA 13"),
    ],
)
def test_the_driver_must_be_new_enough_for_torch_s_cuda(version, cuda, found, phrase):
    driver = components_module._driver(version, cuda)
    assert (driver.found, phrase in driver.remedy) == (found, True)
    assert "\n" not in driver.detail


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.6.0", True),
        ("torch", "2.5.1", False),
        ("torch", "1.13.1", False),
        ("torch", "unknown", False),
        ("transformers", "4.57.3", True),
        ("transformers", "4.40.0", False),
        ("transformers", "6.0.0", False),
        ("tensorrt_llm", "1.2.0rc4", True),
        ("tensorrt_llm", "0.21.0", False),
    ],
)
def test_a_package_must_be_of_a_version_that_the_project_takes(monkeypatch, name, version, found):
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    component = components_module._package(name, "get it")
    assert (component.found, bool(component.remedy)) == (found, not found)
    assert version in component.detail


def test_the_versions_are_those_of_the_project_file():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, (oldest, after) in components_module._VERSIONS.items():
        bounds = f"{name.replace('_', '-')}>={oldest[0]}.{oldest[1]}" + (f",<{after}" if after else "")
        assert f'"{bounds}"' in text


def test_a_torch_without_its_libraries_is_told_of_not_raised(monkeypatch):
    problem = OSError("libcudnn.so.9: cannot open shared object file")

    def load(name):
        raise problem

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise problem

    for component in (components_module._torch(load), components_module._cuda(load)):
        assert not component.found
        assert "libcudnn.so.9" in component.detail
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert describe_machine()["gpu"] is None


@pytest.mark.parametrize(
    ("said", "found", "detail"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", True, "nvcc 13.0"),
        ("Cuda compilation tools, release 11.8, V11.8.89", False, "nvcc must be 12.8 to 13.x, got 11.8"),
        ("something else", False, "should name a release"),
    ],
)
def test_nvcc_must_be_one_that_builds(tmp_path, monkeypatch, said, found, detail):
    for tool in ("nvcc", "cmake"):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    component = components_module._nvcc()
    assert (component.found, bool(component.remedy)) == (found, not found)
    assert detail in component.detail


def test_the_plugin_library_is_found_by_its_path(tmp_path):
    library = tmp_path / "plugin.so"
    assert "build_plugins.py" in components_module._plugin(library).remedy
    library.write_bytes(b"library")
    assert components_module._plugin(library).found


@pytest.mark.parametrize(("missing", "code"), [((), 0), (("GPU",), 1)])
def test_strict_exits_with_1_if_a_surface_lacks_something(monkeypatch, capsys, missing, code):
    monkeypatch.setattr(doctor, "find_components", lambda _: lacking(*missing))
    main(["doctor"])
    main(["doctor", "--strict", "--surface", "torch", "triton"])
    if code:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--strict", "--json"])
        assert ended.value.code == code
    else:
        main(["doctor", "--strict", "--json"])
    surfaces = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["surfaces"]
    assert surfaces["torch"] == {"can_run": True, "lacks": [], "note": ""}
    assert surfaces["gpu"]["can_run"] == (not missing)


@pytest.mark.parametrize("has_vllm", [True, False])
def test_vllm_is_looked_for_in_this_python(tmp_path, monkeypatch, has_vllm):
    monkeypatch.setenv("PATH", "")
    if has_vllm:
        (tmp_path / "vllm.py").touch()
        (tmp_path / "vllm_own-0.32.0.dist-info").mkdir()
        (tmp_path / "vllm_own-0.32.0.dist-info" / "METADATA").write_text("Name: vllm-own\nVersion: 0.32.0\n")
        (tmp_path / "vllm_own-0.32.0.dist-info" / "RECORD").write_text("vllm.py,,\n")
        (tmp_path / "vllm_own-0.32.0.dist-info" / "top_level.txt").write_text("vllm\n")
        monkeypatch.syspath_prepend(tmp_path)
    elif importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    component = components_module._vllm()
    assert component.found == has_vllm
    assert component.detail == ("vllm-own 0.32.0" if has_vllm else "not installed")
    assert ("make vllm" in component.remedy) != has_vllm


def test_an_unknown_surface_is_refused():
    with pytest.raises(UserError, match=r"unknown surface engines \(did you mean engine\?\)"):
        main(["doctor", "--surface", "engines"])


def test_it_runs_where_only_the_base_install_is():
    """It says what of the rest is missing, so that it can need none of it."""
    absent = ("torch", "transformers", "safetensors", "tokenizers", "tritonclient", "aiohttp", "psutil", "matplotlib",
              "fastapi", "uvicorn", "jinja2", "gguf", "cuda", "tensorrt_llm", "vllm", "yaml")  # fmt: skip
    block = f"import sys; sys.modules.update(dict.fromkeys({absent})); from trtllm_memshare.__main__ import console"
    line = [sys.executable, "-c", f"{block}; sys.argv[1:] = ['doctor', '--strict', '--surface', 'gpu']; console()"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "--  gpu" in done.stdout


def test_the_command_runs_on_this_machine():
    done = subprocess.run([sys.executable, "-m", "trtllm_memshare", "doctor", "--strict", "--surface", "torch"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ok  torch" in done.stdout
