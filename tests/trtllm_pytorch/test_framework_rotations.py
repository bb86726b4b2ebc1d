"""Route framework needs keys that are rotated outside of the attention kernel, and looks whether they are."""

from __future__ import annotations

import pytest
from trtllm_pytorch.conftest import make_settings
from trtllm_pytorch.fake_attention import FakeAttentionModule, make_attention_module
from trtllm_pytorch.fake_executor import make_cache_config
from trtllm_pytorch.fake_util import FakeKvCacheCreator
from trtllm_pytorch.test_framework import CONFIG, SHORT

from trtllm_memshare.trtllm.pytorch.probe import install


def test_shadow_drops_nothing_whatever_kernels_rotate(release, model_config):
    module, attention = release("main V2"), make_attention_module()
    original = attention.TrtllmAttention.__init__
    values = make_settings(**SHORT, null_pages="unused", route="framework", shadow=True)
    assert install(module, values, lambda: attention)
    assert attention.TrtllmAttention.__init__ is original
    FakeAttentionModule(attention.TrtllmAttention, 0)
    config = make_cache_config(40, 8, use_kv_cache_manager_v2=True)
    made = module.create_kv_cache_compression_manager(CONFIG, model_engine=None)
    made.bind_kv_cache_managers(FakeKvCacheCreator(module, model_config, config).create())
    assert made.memshare is not None


@pytest.mark.parametrize(("what", "is_on"), [("support_fused_rope", True), ("pos_embd_params", False)])
def test_whose_kernel_rotates_has_to_be_known(release, what, is_on, caplog):
    attention = make_attention_module()
    if what == "pos_embd_params":
        attention.TrtllmAttention.__init__ = lambda self, layer_idx: None
    else:
        attention.TrtllmAttention = type("Attention", (), {"__init__": attention.TrtllmAttention.__init__})
    values = make_settings(**SHORT, null_pages="unused", route="framework")
    assert install(release("main V2"), values, lambda: attention) == is_on
    assert ("takes no pos_embd_params" in caplog.text) != is_on
