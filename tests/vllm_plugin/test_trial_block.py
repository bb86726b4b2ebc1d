"""What trials write into vLLM's pool does not stay there."""

from types import SimpleNamespace

import pytest
import torch

from trtllm_memshare.vllm.trial_block import trial_block

BLOCKS = 5


@pytest.mark.parametrize("parts", [1, 2])
def test_what_lay_in_the_block_is_put_back_whatever_becomes_of_the_trial(parts):
    """In two orders in memory; the second layer's heads lie outside of its blocks."""
    shape = (BLOCKS * parts, 2, 4, 6)
    caches = [torch.randn(shape), torch.randn(2, BLOCKS * parts, 4, 6).transpose(0, 1)]
    before = [cache.clone() for cache in caches]

    def fail() -> None:
        with trial_block([SimpleNamespace(kv_cache=cache) for cache in caches], BLOCKS) as block:
            assert block == BLOCKS - 1
            for cache in caches:
                cache[block * parts :] = torch.nan
            raise ValueError("V is not found")

    with pytest.raises(ValueError, match="V is not found"):
        fail()
    assert all(map(torch.equal, caches, before))


def test_caches_of_another_form_are_left_to_those_who_refuse_them():
    layers = [SimpleNamespace(kv_cache=cache) for cache in (torch.zeros(0), torch.zeros(()), [torch.zeros(2)])]
    with trial_block(layers, BLOCKS) as block:
        assert block == BLOCKS - 1
