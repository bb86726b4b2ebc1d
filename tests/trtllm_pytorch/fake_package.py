"""A package ``tensorrt_llm`` on disk, for tests that start other processes."""

from __future__ import annotations

import textwrap
from pathlib import Path

UTIL = """
    class KVCacheManager:
        def prepare_resources(self, **arguments): ...
        free_resources = update_resources = get_batch_cache_indices = shutdown = add_dummy_requests = prepare_resources
        get_unique_primary_pool = copy_batch_block_offsets = get_num_free_blocks = prepare_resources

    def get_kv_cache_manager_cls(model_config):
        return KVCacheManager
    """


def write_fake_package(folder: Path) -> None:
    """Writes the modules that sharing waits for; the folder is made."""
    for name in ("", "_torch", "_torch/pyexecutor"):
        (folder / "tensorrt_llm" / name).mkdir(parents=True, exist_ok=True)
        (folder / "tensorrt_llm" / name / "__init__.py").touch()
    (folder / "tensorrt_llm/_torch/pyexecutor/_util.py").write_text(textwrap.dedent(UTIL))
