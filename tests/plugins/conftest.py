"""The host build of the kernel, once per test session."""

from __future__ import annotations

import shutil

import pytest
from plugins.host_kernel import compile_host_kernel


@pytest.fixture(scope="session")
def host_kernel(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the kernel's arithmetic for the host")
    return compile_host_kernel(compiler, tmp_path_factory.mktemp("host_kernel"))
