"""``--max-model-len auto``: vLLM fills its pool with one request, and null pages take blocks of it.

Needs vLLM in the environment (``make test-vllm``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

import trtllm_memshare

pytest.importorskip("vllm.version", reason="vLLM is not in this environment (make test-vllm has its own)")

from vllm_plugin.schedulers import make_engine_args, make_scheduler

from trtllm_memshare.errors import UserError

MODEL = str(Path(trtllm_memshare.__file__).parent / "assets" / "tiny_reasoner")


def scheduler_of(length, num_blocks=40, **groups):
    """A scheduler of the bundled model, which has 4,096 positions; -1 is vLLM's auto."""
    arguments = make_engine_args(MODEL, None, num_blocks, bool(groups))
    arguments.max_model_len = length
    return make_scheduler(arguments, num_blocks, False, **groups)


@pytest.mark.parametrize("groups", [{}, {"windows": (24, 100)}, {"num_states": 2}], ids=["alone", "windows", "states"])
def test_an_automatic_length_is_the_longest_that_fits_beside_null_pages(groups):
    scheduler = scheduler_of(-1, **groups)
    length = scheduler.max_model_len
    assert length == scheduler.vllm_config.model_config.max_model_len, "the frontend is told this one"
    assert length == 38 * 16 or groups
    assert scheduler_of(length, **groups).max_model_len == length
    with pytest.raises(UserError, match=f"one request of max_model_len {length + 1}, "):
        scheduler_of(length + 1, **groups)


def test_an_automatic_length_that_fits_stays_as_vllm_chose_it():
    assert scheduler_of(-1, num_blocks=400).max_model_len == 4096


def test_where_nothing_fits_the_pool_is_named():
    with pytest.raises(UserError, match="got 0"):
        scheduler_of(-1, num_blocks=2)
