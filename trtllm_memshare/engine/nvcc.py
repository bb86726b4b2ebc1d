"""Asks nvcc for its version, and says whether it builds the plugin library. Needs nothing but Python."""

from __future__ import annotations

import re
import subprocess

from trtllm_memshare.errors import UserError, quote

_MIN_NVCC, _MAX_NVCC = (12, 8), (13, 99)


def check_nvcc() -> tuple[int, int]:
    """Major and minor release of the nvcc on PATH. Raises UserError if it does not run or is none that builds."""
    version = nvcc_version(_nvcc_says())
    if not _MIN_NVCC <= version <= _MAX_NVCC:
        raise UserError(f"nvcc must be 12.8 to 13.x, got {version[0]}.{version[1]} (install such a CUDA toolkit)")
    return version


def _nvcc_says() -> str:
    """What ``nvcc --version`` prints. Raises UserError if it does not run."""
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"nvcc does not run: {error.strerror} (reinstall the CUDA toolkit)") from error
    if done.returncode:
        said = quote((done.stderr or done.stdout).strip())
        raise UserError(f"nvcc --version ends with status {done.returncode}, got {said} (reinstall the CUDA toolkit)")
    return done.stdout


def nvcc_version(text: str) -> tuple[int, int]:
    """Major and minor release from what ``nvcc --version`` prints. Raises UserError if there is none in it."""
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise UserError(f"nvcc --version should name a release, got {quote(text.strip())} (reinstall the CUDA toolkit)")
    return int(found[1]), int(found[2])
