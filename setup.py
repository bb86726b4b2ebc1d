"""Puts ``trtllm_memshare_activation.pth`` into site-packages, for which pyproject.toml has no word."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_NAME = "trtllm_memshare_activation.pth"
_SOURCE = Path("trtllm_memshare") / "trtllm" / "pytorch" / _NAME


class BuildWithActivation(build_py):
    """Copies the file to the root of what becomes site-packages, for wheels and for editable installs."""

    def run(self) -> None:
        super().run()
        root = self.distribution.get_command_obj("install").install_lib if self.editable_mode else self.build_lib
        self.copy_file(str(_SOURCE), str(Path(root) / _NAME))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / _NAME)]


setup(cmdclass={"build_py": BuildWithActivation})
