"""The host build of the kernels, once per test session."""

from __future__ import annotations

import pytest
from plugins.kernels_on_host import SIGNATURES_ENTRY, compile_for_host


@pytest.fixture(scope="session")
def host_kernel(tmp_path_factory):
    """The launcher of the block distance and every kernel that it chooses among."""
    return compile_for_host(tmp_path_factory.mktemp("host_kernel"), "block_distance.cpp")


@pytest.fixture(scope="session")
def signature_library(tmp_path_factory):
    """The launcher of the signatures with every kernel that it chooses among, behind the plugin library's C entry."""
    return compile_for_host(tmp_path_factory.mktemp("signatures"), "page_signatures.cpp", also=[SIGNATURES_ENTRY])
