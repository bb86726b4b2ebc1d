"""What the GPU kit puts in place on a machine without a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "pack_gpu_kit.sh"


@pytest.fixture
def checkout(tmp_path):
    """A repository with a kit of one wheel and a model in two parts."""
    (tmp_path / "build_scripts").mkdir()
    shutil.copy(ROOT / "build_scripts" / NAME, tmp_path / "build_scripts")
    kit = tmp_path / "gpu_kit"
    (kit / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(kit / "wheels" / "kit_probe-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("kit_probe.py", "VALUE = 7\n")
        info = "kit_probe-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kit-probe\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name, text in (("model.part01", "first "), ("model.part02", "second")):
        (kit / name).write_text(text)
    (kit / "model.parts").write_text("model.part01\nmodel.part02\n")
    digest = subprocess.run(["sha256sum"], input=b"first second", capture_output=True, check=True).stdout.split()[0]
    (kit / "model.sha256").write_text(f"{digest.decode()}  SmolLM2-135M-Instruct.gguf\n")
    return tmp_path


def unpack(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(checkout / "build_scripts" / NAME), "--unpack"]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_wheels_are_installed_and_parts_joined_once_all_have_come(checkout):
    kit = checkout / "gpu_kit"
    late = (kit / "model.part02").read_text()
    (kit / "model.part02").unlink()
    done = unpack(checkout)
    assert done.returncode == 0, done.stderr
    assert "model: model.part02 not here yet" in done.stdout
    assert (kit / "site" / "kit_probe.py").read_text() == "VALUE = 7\n"
    (kit / "model.part02").write_text(late)
    done = unpack(checkout)
    assert done.returncode == 0, done.stderr
    assert (kit / "SmolLM2-135M-Instruct.gguf").read_text() == "first second"


def test_parts_that_do_not_make_the_file_are_refused(checkout):
    (checkout / "gpu_kit" / "model.part01").write_text("other ")
    done = unpack(checkout)
    assert done.returncode == 2
    assert "do not make the file that was packed" in done.stderr
    assert not list((checkout / "gpu_kit").glob("*.gguf*"))


def test_no_kit_a_wrong_option_and_wrong_headers_are_named(checkout, tmp_path):
    shutil.rmtree(checkout / "gpu_kit")
    assert "there is no gpu_kit/" in unpack(checkout).stderr
    for arguments, expected in (
        (["--unpak"], "unknown option --unpak"),
        (["--model"], "--model needs a value"),
        (["--tensorrt-root", str(tmp_path)], f"must hold include/NvInferRuntime.h, got {tmp_path}"),
    ):
        command = ["bash", str(checkout / "build_scripts" / NAME), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, expected in done.stderr) == (2, True), done.stderr
    assert not (checkout / "gpu_kit").exists()
