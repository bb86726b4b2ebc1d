"""Calibration of null pages: what is promised of every query, what is refused, and what fp8 and int8 pools hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from engine.centred_model import write_centred_checkpoint
from transformers import AutoModelForCausalLM

from trtllm_memshare.engine.attention_queries import first_layer_queries, observe_queries
from trtllm_memshare.engine.null_directions import largest_logits, mean_directions, needed_length, turn_away
from trtllm_memshare.engine.null_page import TARGET_GAP, NullPageRefused, calibrate_null_pages, stored_keys
from trtllm_memshare.errors import UserError
from trtllm_memshare.search.block_distance import rotate

BASES = (10_000.0, 1e6)
MODELS = (("llama", 10_000.0), ("qwen2", 10_000.0), ("qwen3", 1e6))


def texts(count: int, length: int = 150, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 70, length).tolist() for _ in range(count)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{p[1]:g}")
def centred(request, tmp_path_factory):
    family, base = request.param
    rope = {"rope_type": "default", "rope_theta": base}
    folder = tmp_path_factory.mktemp(family)
    write_centred_checkpoint(folder, family, max_position_embeddings=40_000, rope_parameters=rope, rope_theta=base)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def attend_eagerly(model, tokens: list[int]):
    """Rotated queries and keys of each layer as transformers' eager attention takes them: [layers, heads, n, dim]."""
    seen = []

    def spy(module, query, key, value, attention_mask, scaling=None, **_):
        seen.append((query[0], key[0], scaling))
        weights = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)) * scaling
        weights += torch.full(weights.shape[-2:], -torch.inf).triu(1)
        values = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return (weights.softmax(-1) @ values).transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("spy", spy)
    before, model.config._attn_implementation = model.config._attn_implementation, "spy"
    with torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False)
    model.config._attn_implementation = before
    queries, keys = (torch.stack([s[i] for s in seen]) for i in (0, 1))
    return queries, keys, seen[0][2]


def test_queries_are_those_of_attention_with_their_rotation_undone(centred):
    """After q-norm and bias, before the rotation; the sums over keys are those of eager attention."""
    (tokens,) = texts(1, 80)
    before = centred.config._attn_implementation
    found = observe_queries(centred, tokens, 10)
    assert centred.config._attn_implementation == before
    queries, keys, scaling = attend_eagerly(centred, tokens)
    at = np.unique(np.linspace(16, 79, 10).astype(int))
    assert found.scaling == scaling
    assert found.positions.tolist() == at.tolist()
    inv_freq = centred.model.rotary_emb.inv_freq
    again = rotate(found.unrotated.transpose(1, 2).reshape(2, len(at), 1, 4, -1), torch.from_numpy(at)[None], inv_freq)
    torch.testing.assert_close(again[:, :, 0].transpose(1, 2), queries[:, :, at], rtol=1e-4, atol=1e-4)
    logits = queries[:, :, at] @ keys.repeat_interleave(2, 1).transpose(-1, -2) * scaling
    logits.masked_fill_(torch.arange(80) > torch.from_numpy(at)[:, None], -torch.inf)
    torch.testing.assert_close(found.log_sum_exp, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_no_query_of_a_new_text_comes_near_a_null_page_wherever_it_stands(centred):
    """Positions of three bands, one beyond 32,768, are tried with queries of a text that calibration has not read."""
    pages = calibrate_null_pages(centred, texts(4))
    assert pages.bands[0] == 0
    assert pages.bands[-1] >= 40_000
    assert pages.gaps.max() <= TARGET_GAP
    assert pages.keys.shape == (len(pages.bands) - 1, 2, 2, pages.keys.shape[-1])
    queries = observe_queries(centred, texts(1, seed=7)[0], 20)
    inv_freq = centred.model.rotary_emb.inv_freq
    for band in {0, 1, int(np.searchsorted(pages.bands, 33_000, "right")) - 1}:
        for position in range(int(pages.bands[band]), int(pages.bands[band + 1]), 61):
            where = torch.full((2, queries.unrotated.shape[2]), position)
            turned = rotate(queries.unrotated.transpose(1, 2)[:, :, None], where, inv_freq)[:, :, 0].transpose(1, 2)
            keys = pages.keys[band].repeat_interleave(2, 1)
            logits = (turned * keys[:, :, None]).sum(-1) * queries.scaling
            assert (logits - queries.log_sum_exp).max() < -15


def test_a_query_that_turns_half_as_far_away_is_still_far(centred):
    """Queries far into a text come nearer than those of the short texts of calibration."""
    pages = calibrate_null_pages(centred, texts(4), 4096)
    queries = observe_queries(centred, texts(1, seed=7)[0], 20)
    inv_freq = centred.model.rotary_emb.inv_freq.double()
    logits = largest_logits(queries, pages.keys[0], 0, int(pages.bands[1]), inv_freq)
    assert pages.lengths.max() < 999  # else the margin may be cut
    assert (logits / 2 - queries.log_sum_exp).max() < -15


def test_queries_of_the_first_layer_are_those_of_the_token_wherever_it_stands(centred):
    (tokens,) = texts(1, 80)
    found = first_layer_queries(centred, torch.full((4,), 3.0), 10_000)
    assert found.unrotated.shape[:3] == (1, 4, centred.config.vocab_size)
    assert (found.log_sum_exp == 3.0).all()
    in_text = observe_queries(centred, tokens, 64)
    at = torch.tensor(tokens)[16:]
    torch.testing.assert_close(found.unrotated[0, :, at], in_text.unrotated[0], rtol=1e-4, atol=1e-4)
    half = first_layer_queries(centred, torch.full((4,), 3.0), centred.config.vocab_size // 2)
    assert torch.equal(half.unrotated, found.unrotated[:, :, ::2])


def test_tokens_that_no_calibration_text_has_stay_away_in_the_first_layer(centred):
    """Texts of the tokens 4 to 29; the queries of all 80 are at least 20 nats away."""
    few = [np.random.default_rng(seed).integers(4, 30, 150).tolist() for seed in range(4)]
    pages = calibrate_null_pages(centred, few, 4096)
    assert (pages.near_tokens, pages.num_tokens) == (0, centred.config.vocab_size)
    smallest = torch.stack([observe_queries(centred, t, 512).log_sum_exp[0].amin(-1) for t in few[:2]]).amin(0)
    queries = first_layer_queries(centred, smallest, 1000)
    logits = largest_logits(queries, pages.keys[0, :1], 0, 2048, centred.model.rotary_emb.inv_freq.double())
    assert (logits - queries.log_sum_exp).max() <= TARGET_GAP


def test_the_last_text_stays_away_at_every_position_of_a_band(tmp_path):
    """At 48 positions of 2,048 this model's worst query seems 22 nats away; at the worst of all it is 13."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    write_centred_checkpoint(tmp_path, "qwen2", 1.5, max_position_embeddings=8192, rope_parameters=rope, rope_theta=1e4)
    model, given = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), texts(4, seed=1)
    pages = calibrate_null_pages(model, given)
    queries, inv_freq = observe_queries(model, given[-1], 512), model.model.rotary_emb.inv_freq
    width = int(pages.bands[1])
    where = torch.arange(width).expand(2, width)
    turned = [
        rotate(queries.unrotated[:, head, None].expand(2, width, -1, -1)[:, :, None], where, inv_freq)[:, :, 0]
        for head in range(4)
    ]
    for head, q in enumerate(turned):  # [layers, positions, n, head_dim]
        logits = (q * pages.keys[0, :, None, None, head // 2]).sum(-1) * queries.scaling
        gap = (logits - queries.log_sum_exp[:, None, head]).amax((1, 2))
        torch.testing.assert_close(gap, pages.gaps[0, :, head], rtol=1e-4, atol=1e-2)
        assert (gap <= TARGET_GAP).all()


def test_a_small_rotary_base_takes_narrower_bands(tmp_path_factory):
    widths = []
    for base in BASES:
        folder = tmp_path_factory.mktemp("llama")
        rope = {"rope_type": "default", "rope_theta": base}
        write_centred_checkpoint(folder, "llama", max_position_embeddings=8192, rope_parameters=rope, rope_theta=base)
        pages = calibrate_null_pages(AutoModelForCausalLM.from_pretrained(folder).eval(), texts(4))
        widths.append(set(np.diff(pages.bands).tolist()))
    assert widths == [{2048}, {4096}]


def test_a_model_whose_queries_point_everywhere_is_refused_by_name(tmp_path):
    from conftest import write_random_checkpoint

    model = AutoModelForCausalLM.from_pretrained(write_random_checkpoint(tmp_path, "llama")).eval()
    with pytest.raises(NullPageRefused, match=r"no null page is found for layer [01], head [0-3]: .*% of its queries"):
        calibrate_null_pages(model, texts(4))


def test_numbers_that_are_not_finite_are_refused_and_pass_no_check(tmp_path):
    """One overflow in the text that nothing is fitted on: a comparison with it is false whichever way it is asked."""
    write_centred_checkpoint(tmp_path, "llama", max_position_embeddings=2048)
    model, given = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), texts(4)
    given[-1][100] = 75  # no other text has it
    with torch.no_grad():
        model.model.embed_tokens.weight[75] = torch.inf
    with pytest.raises(
        UserError, match=r"must be finite to find a null page, got numbers that are not, in torch\.float32"
    ):
        calibrate_null_pages(model, given, 512)


@pytest.mark.parametrize("given", [texts(2), [*texts(2), [5] * 63]])
def test_too_little_text_is_refused(centred, given):
    with pytest.raises(UserError, match="at least 3 texts of at least 64 tokens"):
        calibrate_null_pages(centred, given)


def test_the_mean_of_a_band_is_the_mean_over_its_positions():
    means = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 1e-3])
    positions = torch.arange(128)
    turned = rotate(means[0].expand(128, 4, 8)[None, :, None], positions[None], inv_freq)[0, :, 0].mean(0)
    unit = torch.nn.functional.normalize
    expected = -unit(unit(turned, dim=-1).view(2, 2, 8).mean(1), dim=-1)
    found = mean_directions(means, 128, inv_freq.double(), 2)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_direction_is_turned_away_from_the_few_queries_that_the_mean_leaves_behind(centred):
    queries = observe_queries(centred, texts(1)[0], 60)
    inv_freq = centred.model.rotary_emb.inv_freq.double()
    start = mean_directions(queries.unrotated.mean(2), 512, inv_freq, 2)
    start[0, 1] = torch.nn.functional.normalize(start[0, 1] + 0.8 * start[0, 1].flip(0), dim=-1)
    chosen = torch.tensor([[False, True], [False, False]])
    turned = turn_away(queries, start, chosen, 512, inv_freq, -30.0)
    assert (turned[~chosen] == start[~chosen]).all()
    needed = [needed_length(largest_logits(queries, u, 0, 512, inv_freq), queries, -30.0, 2) for u in (start, turned)]
    assert needed[1][0, 1] < needed[0][0, 1]
    assert (turned == turn_away(queries, start, chosen, 512, inv_freq, -30.0)).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int8, [127, -64, 0, 32]),
        (torch.float8_e4m3fn, [448.0, -224.0, 0.0, 112.0]),
        (torch.bfloat16, [2.0, -1.0, 0.0, 0.5]),
        (torch.float32, [2.0, -1.0, 0.0, 0.5]),
    ],
)
def test_a_pool_with_a_scale_gets_the_longest_key_along_the_direction(dtype, expected):
    held = stored_keys(torch.tensor([2.0, -1.0, 0.0, 0.5]), dtype)
    assert held.dtype == dtype
    assert held.float().tolist() == expected


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "float16", "bfloat16"])
def test_gaps_are_those_of_the_key_that_the_pool_holds(centred, name):
    """q.k of the stored elements times the scale, by hand, in the first band."""
    dtype = getattr(torch, name)
    scales = torch.tensor([0.5, 0.25]) if name in ("int8", "float8_e4m3fn") else None
    pages = calibrate_null_pages(centred, texts(4), 4096, dtype, scales)
    assert pages.gaps.max() <= TARGET_GAP
    if scales is not None:
        stored = pages.keys[0] / scales[:, None, None]
        assert stored.abs().amax(-1).unique().tolist() == [127.0 if name == "int8" else 448.0]
        assert (stored == stored.to(dtype).float()).all()
    queries = observe_queries(centred, texts(4)[-1], 512)
    inv_freq = centred.model.rotary_emb.inv_freq.double()
    logits = largest_logits(queries, pages.keys[0], 0, int(pages.bands[1]), inv_freq, every=True)
    torch.testing.assert_close(pages.gaps[0], (logits - queries.log_sum_exp).amax(-1), rtol=1e-4, atol=1e-3)


def test_a_pool_whose_scale_is_too_small_for_a_null_page_is_refused(centred):
    with pytest.raises(NullPageRefused, match=r"layer [01], head [0-3] .* below the real keys in a pool of int8"):
        calibrate_null_pages(centred, texts(4), 4096, torch.int8, torch.full((2,), 1e-3))


def test_the_report_has_every_head_and_band(centred, tmp_path):
    from trtllm_memshare.engine.null_page_files import describe_null_pages, save_null_pages

    pages = calibrate_null_pages(centred, texts(4), 6000)
    assert describe_null_pages(tmp_path) == "none"
    save_null_pages(tmp_path, pages)
    report = json.loads((tmp_path / "null_pages.json").read_text())
    assert report["bands"] == pages.bands.tolist()
    gaps = [
        [layer["kv_heads"][head // 2]["gaps_by_head"][str(head)] for head in range(4)] for layer in report["layers"]
    ]
    np.testing.assert_allclose(gaps, pages.gaps.permute(1, 2, 0), atol=0.006)
    lengths = [[group["lengths"] for group in layer["kv_heads"]] for layer in report["layers"]]
    np.testing.assert_allclose(lengths, pages.lengths.permute(1, 2, 0), atol=0.006)
    assert describe_null_pages(tmp_path) == pages.describe() == report["summary"]
    assert f"worst gap {pages.gaps.max():.1f} nats" in report["summary"]
