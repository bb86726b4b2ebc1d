"""What the GPU kit holds and where it lies. Needs nothing but Python, since a bare machine unpacks it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL_FILE = "SmolLM2-135M-Instruct.gguf"


class KitError(Exception):
    """What cannot be packed or unpacked, in a sentence for whoever asked."""


@dataclass(frozen=True)
class Kit:
    """The folder, ``gpu_kit/`` in the repository, which git ignores.

    Attributes:
      wheels: for the other machine's Python, installed into ``site`` there.
      modules: ``NAME/NAME.so``, FlashInfer's kernels compiled beforehand.
      modules_arch: what for, as FlashInfer writes it, such as 9.0a.
      parts: names of the pieces of the model, in order; without it the model lies in one file.
      digest: of the whole model, as ``sha256sum`` writes it.
    """

    folder: Path

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @property
    def modules(self) -> Path:
        return self.folder / "flashinfer_modules"

    @property
    def modules_arch(self) -> Path:
        return self.folder / "flashinfer_modules.arch"

    @property
    def headers(self) -> Path:
        return self.folder / "tensorrt" / "include"

    @property
    def model(self) -> Path:
        return self.folder / MODEL_FILE

    @property
    def parts(self) -> Path:
        return self.folder / "model.parts"

    @property
    def digest(self) -> Path:
        return self.folder / "model.sha256"
