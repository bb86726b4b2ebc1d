"""Groups of sliding windows beside the one of full attention, over stand-ins of vLLM's managers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trtllm_memshare.errors import UserError
from trtllm_memshare.vllm.groups import OtherGroups, find_full_group
from trtllm_memshare.vllm.probe import check_model, check_null_entries, check_served


def a_group(kind, **more):
    return SimpleNamespace(kv_cache_spec=type(kind, (), {"sliding_window": None, **more})())


FULL, WINDOW = a_group("FullAttentionSpec"), a_group("SlidingWindowSpec", sliding_window=64)
LATENTS, STATE = a_group("MLAAttentionSpec"), a_group("MambaSpec")


def test_one_group_of_full_attention_is_found_wherever_it_stands():
    assert find_full_group([FULL]) == 0
    assert find_full_group([WINDOW, FULL, WINDOW]) == 1
    assert find_full_group([LATENTS]) == 0
    assert find_full_group([STATE, WINDOW, STATE, FULL]) == 3


@pytest.mark.parametrize(
    ("groups", "got"),
    [
        ([], "got KV cache groups of none"),
        ([WINDOW], "got KV cache groups of SlidingWindowSpec"),
        ([FULL, WINDOW, FULL], "got KV cache groups of FullAttentionSpec, SlidingWindowSpec, FullAttentionSpec"),
        ([FULL, a_group("CrossAttentionSpec")], "got KV cache groups of FullAttentionSpec, CrossAttentionSpec"),
        ([STATE], "got KV cache groups of MambaSpec"),
        ([LATENTS, STATE], "got KV cache groups of MLAAttentionSpec, MambaSpec"),
        ([LATENTS, LATENTS], "got KV cache groups of MLAAttentionSpec, MLAAttentionSpec"),
        ([LATENTS, WINDOW], "or with one of MLA alone, got KV cache groups of MLAAttentionSpec, SlidingWindowSpec"),
        ([WINDOW, a_group("FullAttentionSpec", sliding_window=64)], "excludes sliding_window, got 64"),
        ([a_group("FullAttentionSpec", attention_chunk_size=8192)], "excludes attention_chunk_size, got 8192"),
    ],
)
def test_other_groups_are_refused_by_name(groups, got):
    with pytest.raises(UserError, match=got):
        find_full_group(groups)


def a_manager(window, block_size=16, most=40, **held):
    """``held``: block ids by request, 0 = vLLM's null block."""
    blocks = {name: [SimpleNamespace(block_id=i, is_null=i == 0) for i in ids] for name, ids in held.items()}
    return SimpleNamespace(
        sliding_window=window, block_size=block_size, req_to_blocks=blocks, num_cached_block={},
        max_admission_blocks_per_request=most,
    )  # fmt: skip


def test_a_window_holds_its_blocks_and_what_lies_in_flight():
    windows = OtherGroups([a_manager(20), a_manager(128, 32, 7)])
    # 19 tokens before a query and 2 in flight lie in 3 blocks of 16 at most, 127 and 2 in 6 of 32.
    assert [windows.most_held(n) for n in (1, 17, 1000)] == [2, 2 + 1, 3 + 6]
    assert [windows.most_ever(n) for n in (17, 10_000)] == [2 + 1, 40 + 7]
    assert OtherGroups([]).most_held(1000) == 0


def test_what_a_request_misses_is_counted_in_every_group():
    windows = OtherGroups([a_manager(20, a=[0, 0, 5, 6]), a_manager(300, most=7, a=[7, 8, 9, 10])])
    assert [windows.num_missing("a", n) for n in (60, 64, 65, 97)] == [0, 0, 2, 6]
    assert windows.num_missing("new", 1000) == 40 + 7  # it never holds more than vLLM says
    # Of a hit vLLM lists null blocks for all that lies before a window. One of the others nobody uses: it is taken too.
    block = lambda ref_cnt, is_null=False: SimpleNamespace(ref_cnt=ref_cnt, is_null=is_null)  # noqa: E731
    hits = [[block(0, True)] * 58 + [block(1), block(0)], [block(0, True)] * 40 + [block(1)] * 20]
    assert [windows.num_missing("new", n, hits) for n in (960, 961, 1000)] == [1, 1 + 2, 1 + 6]
    # At a new block the shorter window gives one back for the one that it takes.
    assert [windows.num_wanted(n) for n in (0, 15, 16, 32, 304)] == [2, 0, 2, 1, 0]


def test_blocks_of_a_window_are_told_from_those_that_it_has_left_behind():
    managers = [a_manager(20, a=[0, 0, 5, 6]), a_manager(300, 32, a=[7, 8])]
    windows = OtherGroups(managers)
    assert [block.block_id for block in windows.own_blocks("a", 31)] == [5, 6, 7, 8]
    assert [block.block_id for block in windows.own_blocks("a", 50)] == [6, 8]
    windows.cache_no_more("a", 99)
    assert [manager.num_cached_block for manager in managers] == [{"a": 99}, {"a": 99}]


def test_null_pages_are_refused_beside_windows_and_with_latents():
    def config(**model):
        return SimpleNamespace(model_config=SimpleNamespace(**model))

    check_null_entries(config(), False, "read")
    check_null_entries(config(), False, "skip")
    check_null_entries(config(), True, "skip")
    with pytest.raises(
        UserError, match=r"null_entries read needs a model whose layers.*sliding windows or linear attention in some"
    ):
        check_null_entries(config(), True, "read")
    check_null_entries(config(use_mla=True), False, "skip")
    with pytest.raises(UserError, match=r"got one with multi-head latent attention \(MLA\) \(leave null_pages out"):
        check_null_entries(config(use_mla=True), False, "read")


def a_config(*kinds, mode="none", unit=None, **model):
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(layer_types=kinds or None), **model),
        cache_config=SimpleNamespace(mamba_cache_mode=mode, prefix_match_unit=unit),
    )


def test_what_a_configuration_says_is_refused_before_weights_are_loaded():
    for config in (
        a_config("sliding_attention", "full_attention"),
        a_config("linear_attention", "full_attention", is_hybrid=True),
        a_config(is_hybrid=True),
        a_config(use_mla=True),
    ):
        check_model(config, "skip")
        with pytest.raises(UserError, match="null_entries read needs a model whose layers all have full attention"):
            check_model(config, "read")
    for config in (
        a_config("full_attention", "full_attention"),
        a_config("sliding_attention", "sliding_attention"),
        a_config(),
    ):
        check_model(config, "read")
    for config, got in (
        (a_config(is_attention_free=True), "got one without attention"),
        (a_config(is_diffusion=True), "got one that writes by diffusion"),
        (
            a_config(is_hybrid=True, use_mla=True, mode="align"),
            "got one with latent attention .* beside linear",
        ),
        (a_config(use_mla=True), "got one with sparse attention by an indexer"),
    ):
        if "indexer" in got:
            config.model_config.hf_text_config.index_topk = 2048
        with pytest.raises(UserError, match=got):
            check_model(config, "skip")
    check_model(a_config(is_hybrid=True, mode="align"), "skip")
    with pytest.raises(UserError, match=r"that end with a block, got --prefix-match-unit 16 \(leave --prefix-match"):
        check_model(a_config(is_hybrid=True, mode="align", unit=16), "skip")


def test_states_that_are_kept_in_another_way_are_refused_when_there_are_groups_too():
    with pytest.raises(UserError, match="in mamba_cache_mode none or align, got all"):
        check_served(a_config(mode="all"), [STATE, FULL])


def test_a_state_is_one_block_of_a_request_whatever_its_length():
    managers = [
        SimpleNamespace(block_size=4096, req_to_blocks={"a": [SimpleNamespace(is_null=False)]}, num_cached_block={},
                        max_admission_blocks_per_request=most)
        for most in (None, 1)
    ]  # fmt: skip
    states = OtherGroups(managers)
    for num_tokens in (1, 4096):
        assert states.most_held(num_tokens) == states.most_ever(num_tokens) == 2
        assert [states.num_missing(name, num_tokens) for name in ("a", "b")] == [0, 2]
    assert [states.num_wanted(n) for n in (0, 1, 4095)] == [2, 0, 0]


def test_a_state_that_can_be_a_hit_goes_on_in_a_new_block():
    """Beside the two groups one in which a kernel keeps another state when it has read a prompt."""
    block = lambda ref_cnt, is_null=False: SimpleNamespace(ref_cnt=ref_cnt, is_null=is_null)  # noqa: E731
    managers = [
        SimpleNamespace(
            block_size=16, mamba_cache_mode="align", max_admission_blocks_per_request=None, num_cached_block={},
            kv_cache_spec=SimpleNamespace(num_prefill_checkpoint_blocks=more),
            req_to_blocks={"a": [block(0, True), block(1)]},
        )
        for more in (0, 0, 1)
    ]  # fmt: skip
    states = OtherGroups(managers)
    assert [states.most_held(n) for n in (1, 16, 1000)] == [3, 3, 3]
    assert [states.most_ever(n) for n in (16, 1000)] == [3, 2 + 2 + 3]
    assert [states.num_missing("a", n) for n in (20, 32, 33, 500)] == [0, 0, 3, 1 + 1 + 2]
    assert states.num_missing("new", 1000) == 1 + 1 + 2  # what lies between is never there
    hits = [[block(0, True)] * 3 + [block(used)] for used in (0, 1, 1)]
    assert [states.num_missing("new", n, hits) for n in (64, 65, 1000)] == [1, 1 + 3, 1 + 4]
    assert [states.num_wanted(n) for n in (0, 15, 16, 17, 32)] == [3, 0, 3, 0, 3]
    assert [len(states.own_blocks("a", n)) for n in (15, 16, 31, 32)] == [3, 3, 3, 0]
