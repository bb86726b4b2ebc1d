"""Settings that a test lays over any preset: those that the preset reads."""

from trtllm_memshare.search.config import PRESETS, MemShareConfig, make_config
from trtllm_memshare.search.unread import find_unread


def make_effective(preset, **settings):
    """``make_config`` without what it would refuse for having no effect."""
    while True:
        unread = find_unread(MemShareConfig.model_construct(**{**PRESETS[preset], **settings}))
        if unread is None or unread[0] not in settings:
            return make_config(preset, **settings)
        del settings[unread[0]]
