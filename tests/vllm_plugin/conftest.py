"""What tests of vLLM share."""

from __future__ import annotations

import pytest
from vllm_plugin.engine_runs import save_null_pages


@pytest.fixture(scope="module")
def null_pages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of null pages that an engine of the bundled model reads, as ``save_null_pages`` says."""
    return save_null_pages(tmp_path_factory.mktemp("null_pages"))
