"""Puts a kit in place on a machine without a package index. Needs nothing but Python and pip."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from build_scripts.gpu_kit.layout import Kit, KitError


def unpack(kit: Kit) -> list[str]:
    """Installs wheels and FlashInfer's modules into ``site``, joins the model; returns what to tell.

    Parts of the model may come one after the other: until the last is there, it says which are missing.

    Raises:
      KitError: no kit, a wheel that pip refuses, a model or parts of it that are not the file that was packed.
    """
    if not kit.folder.is_dir():
        raise KitError(f"there is no {kit.folder.name}/: pack it on a machine with a package index and copy it here")
    said = [_install_wheels(kit)]
    aot = kit.site / "flashinfer" / "data" / "aot"
    if kit.modules.is_dir() and aot.parent.is_dir():
        said.append(_copy_modules(kit, aot))
    if kit.digest.is_file():
        said.append(_join_model(kit))
    if kit.headers.is_dir():
        said.append(f"TensorRT's headers: {kit.headers.parent}")
    return said


def _install_wheels(kit: Kit) -> str:
    wheels = sorted(map(str, kit.wheels.glob("*.whl")))
    if not wheels:
        raise KitError(f"{kit.wheels} must hold the kit's wheels, got none (copy all of gpu_kit/ again)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
    ]
    done = subprocess.run([*command, "--target", str(kit.site), *wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise KitError(
            f"pip must install the {len(wheels)} wheels of the kit into Python {here}, got: "
            f"{done.stderr.strip()[-500:]} (pack it with --python {here}, "
            f"or set PYTHON to the interpreter that it was packed for)"
        )
    return f"wheels: {len(wheels)} installed into {kit.site}"


def _copy_modules(kit: Kit, aot: Path) -> str:
    """Puts FlashInfer's modules where it looks, unless they are another card's: those fail to load in a step."""
    made_for = kit.modules_arch.read_text().strip() if kit.modules_arch.is_file() else None
    cards = _compute_capabilities()
    if made_for is not None and cards and cards != {made_for.rstrip("af")}:
        here = ", ".join(sorted(cards))
        return (
            f"FlashInfer: its modules are for {made_for}, got a card of {here}: left out, so that FlashInfer compiles "
            f"its own with nvcc and ninja (pack the kit with the --arch of this card, or take --decode triton)"
        )
    shutil.copytree(kit.modules, aot, dirs_exist_ok=True)
    checked = "" if made_for is not None and cards else ", not checked against the card"
    return f"FlashInfer: {len(list(kit.modules.iterdir()))} modules compiled beforehand{checked}"


def _compute_capabilities() -> set[str]:
    """Of the cards, such as 9.0; empty where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return set()
    return set() if done.returncode else set(re.findall(r"^\d+\.\d+$", done.stdout, re.M))


def _join_model(kit: Kit) -> str:
    """Holds the model against its digest, made of its parts first where there are any; returns what to tell."""
    wanted = kit.digest.read_text().split()[0]
    if kit.model.is_file() and hashlib.sha256(kit.model.read_bytes()).hexdigest() == wanted:
        return f"model: {kit.model}"
    if not kit.parts.is_file():  # packed in one piece
        if kit.model.is_file():
            raise KitError(f"{kit.model.name} is not the file that was packed: copy it again")
        return f"model: {kit.model.name} not here yet"
    parts = [kit.folder / name for name in kit.parts.read_text().split()]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        return f"model: {' '.join(missing)} not here yet"
    partial, digest = kit.model.with_suffix(".partial"), hashlib.sha256()
    with partial.open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
            digest.update(part.read_bytes())
    if digest.hexdigest() != wanted:
        partial.unlink()
        raise KitError("the parts of the model do not make the file that was packed: copy them again")
    partial.replace(kit.model)
    return f"model: {kit.model}"
