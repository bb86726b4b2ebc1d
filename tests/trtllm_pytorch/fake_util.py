"""``tensorrt_llm._torch.pyexecutor._util`` by release: how the class of the KV cache manager is chosen and used.

Mirrors ``_util.py`` of autumn 2025 (1.1), February 2026 (nearest to 1.2.1) and main of August and September 2026.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

from trtllm_pytorch.fake_executor import make_mapping
from trtllm_pytorch.fake_framework import FakeKVCacheCompressionManager
from trtllm_pytorch.fake_v1 import FakeKVCacheManager, FakeMainKVCacheManager, FakeOldKVCacheManager
from trtllm_pytorch.fake_v2 import FakeKVCacheManagerV2, FakeMainKVCacheManagerV2

_CLASSES = {
    "1.1": (FakeOldKVCacheManager, None),
    "1.2": (FakeKVCacheManager, None),
    "1.3 V2": (FakeKVCacheManager, FakeKVCacheManagerV2),
    "main V1": (FakeMainKVCacheManager, FakeMainKVCacheManagerV2),
    "main V2": (FakeMainKVCacheManager, FakeMainKVCacheManagerV2),
}


def make_util_module(release: str) -> ModuleType:
    """The module of a release."""
    v1, v2 = _CLASSES[release]
    module = ModuleType("tensorrt_llm._torch.pyexecutor._util")
    module.KVCacheManager = v1
    if v2 is not None:
        module.KVCacheManagerV2 = v2
    if release == "1.1":

        def get_kv_cache_manager_cls(model_config):
            return v1

        class KvCacheCreator:
            """Makes one to measure memory with too; only this method is told which."""

            def __init__(self, make):
                self._make = make

            def build_managers(self, resources, estimating_kv_cache=False):
                resources["kv_cache_manager"] = self._make()

        module.KvCacheCreator = KvCacheCreator
    else:

        def get_kv_cache_manager_cls(
            model_config, kv_cache_config=None, is_disagg=False, cache_transceiver_config=None
        ):
            return v2 if v2 is not None and getattr(kv_cache_config, "use_kv_cache_manager_v2", False) is True else v1

    module.get_kv_cache_manager_cls = get_kv_cache_manager_cls
    if release.startswith("main"):

        def create_kv_cache_compression_manager(
            config, *, model_engine=None, kv_cache_config=None, estimating_kv_cache=False
        ):  # main of September 2026, which calls it without a configuration and while it estimates as well
            return SimpleNamespace(config=config) if getattr(config, "algorithm", "") == "triattention" else None

        module.create_kv_cache_compression_manager = create_kv_cache_compression_manager
        module.KVCacheCompressionManager = FakeKVCacheCompressionManager
    return module


class FakeKvCacheCreator:
    """``KvCacheCreator``: asks for the class once, makes a small manager to measure memory with, then the real one.

    Attributes:
      estimated: the first of them; None in 1.1, whose managers cannot be told apart.
    """

    def __init__(self, util_module, model_config, kv_cache_config) -> None:
        self._util, self._model_config, self._config = util_module, model_config, kv_cache_config
        self._cls = util_module.get_kv_cache_manager_cls(*self._arguments())
        self.estimated = None

    def _arguments(self):
        takes_one = self._util.KVCacheManager is FakeOldKVCacheManager
        return (self._model_config,) if takes_one else (self._model_config, self._config)

    def create(self, compression=None, **keywords):
        if compression is not None:  # main makes it before the caches: it may have to be handed to them
            self._util.create_kv_cache_compression_manager(compression, model_engine=None)
        cls, c = self._cls, self._model_config.pretrained_config
        v2 = getattr(self._util, "KVCacheManagerV2", None)
        needs_v1 = keywords.get("kv_connector_manager") is not None or keywords.get("max_beam_width", 1) > 1
        if v2 is not None and issubclass(cls, v2) and needs_v1:
            cls = self._util.KVCacheManager
        values = {
            "num_layers": c.num_hidden_layers, "num_kv_heads": c.num_key_value_heads,
            "head_dim": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
            "tokens_per_block": 8, "max_seq_len": 256, "max_batch_size": 4, "mapping": make_mapping(), **keywords,
        }  # fmt: skip
        if cls is not FakeOldKVCacheManager:
            self.estimated = cls(self._config, "SELF", is_estimating_kv_cache=True, **{
                k: v for k, v in values.items() if k != "is_estimating_kv_cache"
            })  # fmt: skip
        return cls(self._config, "SELF", **values)
