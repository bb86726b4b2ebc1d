"""The torch runner against transformers' own generation and attention."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from conftest import write_random_checkpoint
from tolerances import SAME_LOGITS
from transformers import AutoModelForCausalLM

from trtllm_memshare.cache.kv_cache_manager import KVCacheManager
from trtllm_memshare.runners.protocol import StepBatch
from trtllm_memshare.runners.torch import gather
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.search.policy import SharingPolicy, make_pairs
from trtllm_memshare.search.types import Candidate, PairBatch

SIZE = 8


def batch_of(manager, requests, lengths, chunks, tokens, num_contexts, **extra) -> StepBatch:
    """Packs sequences whose last `chunk` tokens up to `length` take part in the step."""
    spans = [(i, n - c, n) for i, n, c in zip(requests, lengths, chunks, strict=True)]
    return StepBatch(
        input_ids=np.concatenate([tokens[i][b:e] for i, b, e in spans]).astype(np.int32),
        position_ids=np.concatenate([np.arange(b, e) for _, b, e in spans]).astype(np.int32),
        num_contexts=num_contexts,
        chunk_lengths=np.array(chunks, np.int32),
        sequence_lengths=np.array(lengths, np.int32),
        block_offsets=manager.block_offsets(requests),
        **extra,
    )


def make_manager(runner) -> KVCacheManager:
    return KVCacheManager(runner.num_blocks, runner.num_layers, SIZE, 16, 8, make_config("off"))


def reference_logits(checkpoint, tokens) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor(tokens)[None]).logits[0]


@pytest.mark.parametrize(("fold", "gathered_bytes"), [(True, gather.GATHERED_BYTES), (False, 1)])
def test_packed_chunks_and_generation_give_the_stock_logits(family_checkpoint, monkeypatch, fold, gathered_bytes):
    """Two prompts in uneven chunks beside two sequences that generate, in the same calls and one by one."""
    monkeypatch.setattr(gather, "GATHERED_BYTES", gathered_bytes)
    runner = TorchRunner(load_model(family_checkpoint), 40, SIZE, fold_aliases=fold)
    manager, rng = make_manager(runner), np.random.default_rng(0)
    tokens = {i: rng.integers(4, 70, n) for i, n in enumerate((40, 23, 31, 9))}
    for request, ids in tokens.items():
        assert manager.add_sequence(request, ids.astype(np.int32))
    expected = {i: reference_logits(family_checkpoint, t.tolist()) for i, t in tokens.items()}
    steps = [
        ([0, 1, 2], [7, 20, 5], [7, 20, 5], 3),
        ([0, 2, 1], [25, 30, 21], [18, 25, 1], 2),
        ([3, 0, 1, 2], [9, 26, 22, 31], [9, 1, 1, 1], 1),
        ([0, 1], [27, 23], [1, 1], 0),
    ]
    for requests, lengths, chunks, contexts in steps:
        output = runner.step(runner.prepare(batch_of(manager, requests, lengths, chunks, tokens, contexts)))
        wanted = torch.stack([expected[i][n - 1] for i, n in zip(requests, lengths, strict=True)])
        torch.testing.assert_close(output.logits, wanted, **SAME_LOGITS)


@pytest.mark.parametrize("fold", [True, False])
def test_values_that_are_not_finite_stay_with_the_request_that_holds_them(family_checkpoint, fold):
    """Neither a block that it left, nor one that it holds beside others in the step, is read for anybody else."""
    runner = TorchRunner(load_model(family_checkpoint), 40, SIZE, fold_aliases=fold)
    runner.pool.fill_(torch.nan)  # as if requests that ended had left it in every block
    manager, rng = make_manager(runner), np.random.default_rng(0)
    tokens = {i: rng.integers(4, 70, n) for i, n in enumerate((40, 23, 31))}
    for request, ids in tokens.items():
        assert manager.add_sequence(request, ids.astype(np.int32))
    steps = [([0, 1, 2], [38, 21, 9], [38, 21, 9], 3), ([2, 0, 1], [20, 39, 22], [11, 1, 1], 1)]
    for requests, lengths, chunks, contexts in steps:
        batch = batch_of(manager, requests, lengths, chunks, tokens, contexts)
        assert runner.step(runner.prepare(batch)).logits.isfinite().all()
    table = manager.block_offsets([0])[0, 0, 0] // (2 * runner.num_layers)
    runner.pool[table[:5]] = torch.nan  # block 0 among them
    logits = runner.step(runner.prepare(batch_of(manager, [0, 1], [40, 23], [1, 1], tokens, 0))).logits
    assert logits[0].isnan().all()
    wanted = reference_logits(family_checkpoint, tokens[1].tolist())[22]
    torch.testing.assert_close(logits[1], wanted, **SAME_LOGITS)


@pytest.fixture
def filled(family_checkpoint):
    """A runner with one sequence of 41 tokens in the cache; 40 fill five blocks."""
    runner = TorchRunner(load_model(family_checkpoint), 12, SIZE, fold_aliases=False)
    manager = make_manager(runner)
    tokens = {0: np.random.default_rng(1).integers(4, 70, 41)}
    assert manager.add_sequence(0, tokens[0].astype(np.int32))
    runner.step(runner.prepare(batch_of(manager, [0], [40], [40], tokens, 1)))
    return runner, manager, tokens


def decode(runner, manager, tokens, table=None, fold=False, **extra) -> torch.Tensor:
    runner._fold_aliases = fold
    batch = batch_of(manager, [0], [41], [1], tokens, 0, **extra)
    if table is not None:
        batch.block_offsets[0, 0, :, 1] = batch.block_offsets[0, 0, :, table]
    return runner.step(runner.prepare(batch)).logits


def test_a_remap_onto_a_bit_identical_block_changes_no_logit(filled):
    runner, manager, tokens = filled
    table = manager.block_offsets([0])[0, 0, 0] // (2 * runner.num_layers)
    runner.pool[table[3]] = runner.pool[table[1]]
    before = decode(runner, manager, tokens)
    assert torch.equal(decode(runner, manager, tokens, table=3), before)
    torch.testing.assert_close(decode(runner, manager, tokens, table=3, fold=True), before, **SAME_LOGITS)


def test_folding_equals_reading_every_alias_and_dropping_differs(filled):
    runner, manager, tokens = filled
    full = decode(runner, manager, tokens)
    repeated = decode(runner, manager, tokens, table=3)
    folded = decode(runner, manager, tokens, table=3, fold=True)
    dropped = decode(runner, manager, tokens, table=3, fold=True, count_aliases=False)
    torch.testing.assert_close(folded, repeated, **SAME_LOGITS)
    assert (full - repeated).abs().max() > 1e-3
    assert (dropped - repeated).abs().max() > 1e-3


@pytest.mark.parametrize("field", [0, 1])
def test_changing_k_or_v_in_the_pool_changes_the_decision(filled, field):
    runner, manager, tokens = filled
    table = (manager.block_offsets([0])[0, 0, 0] // (2 * runner.num_layers)).tolist()
    runner.pool[table[3]] = runner.pool[table[1]]
    pool, rows = manager.pool, np.arange(SIZE, dtype=np.int32)
    pool.origin_position[table[3]] = pool.origin_position[table[1]]  # equal as stored: no rotation between the two
    candidate = Candidate(
        0,
        0,
        1,
        table[1],
        0,
        table[3],
        table[1] * SIZE + rows,
        table[3] * SIZE + rows,
        pool.generation[[table[3]] * SIZE],
    )
    policy = SharingPolicy(make_config("aligned", max_distance=0.1))

    def decisions():
        pairs = make_pairs([candidate], pool.origin_position, SIZE, undo_rope=True)
        output = runner.step(runner.prepare(batch_of(manager, [0], [41], [1], tokens, 0, pairs=pairs)))
        return policy.decide([candidate], output.block_distances.read()[0])

    assert len(decisions()) == 1
    runner.pool[table[3], -1, field] += 1.0
    assert decisions() == []
    assert policy.rejected == {"distance": 1}


def test_bfloat16_pool_is_read_back_in_the_model_s_dtype(family_checkpoint):
    runner = TorchRunner(load_model(family_checkpoint), 12, SIZE, kv_dtype=torch.bfloat16)
    manager, tokens = make_manager(runner), {0: np.arange(4, 34)}
    assert manager.add_sequence(0, tokens[0].astype(np.int32))
    runner.step(runner.prepare(batch_of(manager, [0], [29], [29], tokens, 1)))
    logits = runner.step(runner.prepare(batch_of(manager, [0], [30], [1], tokens, 0))).logits
    expected = reference_logits(family_checkpoint, tokens[0].tolist())[-1:]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def steps_on(device, checkpoint, dtype=torch.float32, **options):
    """Logits, distances and the pool after prompts in chunks, a mixed step and pure decode steps; on the CPU."""
    runner = TorchRunner(load_model(checkpoint, device).to(dtype), 40, SIZE, **options)
    manager, rng = make_manager(runner), np.random.default_rng(0)
    tokens = {i: rng.integers(4, 70, n) for i, n in enumerate((40, 23, 31))}
    for request, ids in tokens.items():
        assert manager.add_sequence(request, ids.astype(np.int32))
    rows = np.arange(4 * SIZE, dtype=np.int32).reshape(4, SIZE)
    pairs = PairBatch(rows[:3], rows[1:] - 3, np.full((3, SIZE), 1234, np.int32))
    results = []
    for requests, lengths, chunks, contexts in (
        ([0, 1, 2], [20, 20, 28], [20, 20, 28], 3),
        ([0, 1, 2], [36, 21, 29], [16, 1, 1], 1),
        ([2, 0, 1], [30, 37, 22], [1, 1, 1], 0),
        ([2, 0, 1], [31, 38, 23], [1, 1, 1], 0),
        ([0], [39], [1], 0),
    ):
        batch = batch_of(manager, requests, lengths, chunks, tokens, contexts, pairs=pairs)
        output = runner.step(runner.prepare(batch))
        results += [output.logits.cpu().clone(), torch.from_numpy(output.block_distances.read()[0].copy())]
    return runner, [*results, runner.pool.float().cpu()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gpu_gives_the_logits_distances_and_pool_of_the_cpu(family, tmp_path):
    checkpoint = write_random_checkpoint(tmp_path, family, hidden_size=128)  # the smallest head that the kernel takes
    expected = steps_on("cpu", checkpoint)[1]
    runner, results = steps_on("cuda", checkpoint)
    assert runner.search.description.startswith("CUDA kernel"), runner.search.description
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, **SAME_LOGITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_runner_on_a_gpu_keeps_cudnn_from_planning_each_shape_anew(tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    TorchRunner(load_model(write_random_checkpoint(tmp_path, "llama"), "cuda"), 4, SIZE)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="FlashInfer is not installed")
@pytest.mark.parametrize("use_graphs", [False, True])
def test_flashinfer_and_graphs_give_the_logits_distances_and_pool_of_the_cpu(use_graphs, tmp_path):
    """At the smallest head that FlashInfer takes, in fp16; four query heads to a KV head take its tensor cores."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "initializer_range": 0.05}
    checkpoint = write_random_checkpoint(tmp_path, "llama", **sizes)
    expected = steps_on("cpu", checkpoint, torch.float16)[1]
    runner, results = steps_on("cuda", checkpoint, torch.float16, use_graphs=use_graphs)
    assert runner.decode_description.startswith("FlashInfer")
    assert ("CUDA graphs" in runner.decode_description) == use_graphs
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_another_dtype_is_of_the_weights_and_not_of_the_rotation(family_checkpoint):
    """Frequencies in bfloat16 are off by up to 1 in 256: at 4,000 tokens by whole turns."""
    plain, cast = load_model(family_checkpoint), load_model(family_checkpoint, dtype=torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    for name, weight in plain.state_dict().items():
        assert torch.equal(cast.state_dict()[name], weight.bfloat16()), name
