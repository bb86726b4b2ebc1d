"""Downloads single wheels for a machine that is not this one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from build_scripts.gpu_kit.layout import ROOT, KitError

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
              "manylinux2014_x86_64", "manylinux1_x86_64")  # fmt: skip


def download_wheel(name: str, folder: Path, python: str | None) -> None:
    """One wheel, alone; its version as ``name`` or ``constraints.txt`` pins it, else the newest.

    Args:
      python: of the machine it is for, None = this one.
    """
    pinned = re.search(
        rf"^{re.sub('[-_]', '[-_]', name)}==[^;\s]+", (ROOT / "constraints.txt").read_text(), re.M | re.I
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if python is not None:
        command += ["--implementation", "cp", "--python-version", python]
        command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    wanted = pinned[0] if pinned else name
    done = subprocess.run([*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KitError(f"pip must find a wheel of {wanted} for Python {python}, got: {done.stderr.strip()[-500:]}")
