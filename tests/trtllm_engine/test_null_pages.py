"""Null pages on a TensorRT engine: entries at them are read like any other, and nothing comes of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from engine.centred_model import write_centred_checkpoint
from tolerances import SAME_LOGITS
from trtllm_engine.conftest import write_engine_dir

from trtllm_memshare.cache.offsets import NULL_OFFSET
from trtllm_memshare.engine import null_page
from trtllm_memshare.engine.null_page import NullPageSet, calibrate_null_pages
from trtllm_memshare.engine.null_page_files import save_null_pages
from trtllm_memshare.errors import UserError
from trtllm_memshare.runners.engines import load_engine
from trtllm_memshare.runners.null_pages import of_rank
from trtllm_memshare.runners.open import open_runner
from trtllm_memshare.runners.torch.runner import TorchRunner, load_model
from trtllm_memshare.search.config import make_config
from trtllm_memshare.serving.executor import Executor
from trtllm_memshare.serving.request import SamplingParams
from trtllm_memshare.serving.sampling import Sampler

SIZE = 16
CONFIG = make_config("pressure", need="age", protected_tokens=32, min_kept=0.4, min_run_tokens=500)


@pytest.fixture(scope="module")
def centred(tmp_path_factory):
    """A checkpoint, and its null pages in bands of 128 positions."""
    folder = write_centred_checkpoint(tmp_path_factory.mktemp("centred"), "qwen2", max_position_embeddings=512)
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(null_page, "_WIDEST_BAND", 128)
        pages = calibrate_null_pages(load_model(folder), [rng.integers(4, 70, 150).tolist() for _ in range(4)])
    return folder, pages


class Noted(Sampler):
    """Notes logits by request and position, and goes on with tokens that hang on nothing else."""

    def __init__(self):
        super().__init__()
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def sample(self, logits, requests):
        for row, request in zip(logits, requests, strict=True):
            self.logits[request.request_id, len(request.tokens)] = row.clone()
        return [int(np.random.default_rng([r.request_id, len(r.tokens)]).integers(4, 70)) for r in requests]


def serve(runner, boundaries, config=CONFIG):
    """Logits of four requests of 20 + 150 tokens over 30 blocks, where the full cache would need 44."""
    noted = Noted()
    executor = Executor(runner, config, boundaries, 512, max_batch_size=8, max_num_tokens=96, sampler=noted)
    prompts = [np.random.default_rng(i).integers(4, 70, 20).tolist() for i in range(4)]
    handles = [executor.submit(p, SamplingParams(150)) for p in prompts]
    executor.run_until_idle()
    executor.manager.check_integrity()
    assert [len(h.result(0).token_ids) for h in handles] == [150] * 4
    return torch.stack([noted.logits[key] for key in sorted(noted.logits)]), executor


@pytest.mark.parametrize("use_graphs", [False, True])
def test_reading_null_entries_in_an_engine_gives_the_logits_of_skipping_them(
    make_runner, centred, boundaries, use_graphs
):
    folder, pages = centred
    skipping = TorchRunner(load_model(folder), 34, SIZE, null_page_set=pages)
    expected, _ = serve(skipping, boundaries)
    runner = make_runner(folder, 34, sizes={"max_seq_len": 512}, null_page_set=pages, use_graphs=use_graphs)
    logits, executor = serve(runner, boundaries)
    torch.testing.assert_close(logits, expected, **SAME_LOGITS)
    assert executor.manager.stats().forgotten > 0
    assert executor.stats.num_pauses == 0
    null = np.array(runner.null_pages.blocks) * runner.num_layers * 2
    seen = [{int(e) for e in np.intersect1d(offsets[0, :, 0], null)} for offsets in runner.fake.seen_offsets]
    assert set.union(*seen) == {int(null[0]), int(null[1])}  # both bands that the requests go through
    assert not any((offsets[0, :, 0, 0] == NULL_OFFSET).any() for offsets in runner.fake.seen_offsets)
    written = pages.keys[:, :, :, None].expand(-1, -1, -1, SIZE, -1)
    assert torch.equal(runner.pool[: len(pages.keys), :, 0], written)
    assert not runner.pool[: len(pages.keys), :, 1].any()


def test_pages_that_are_no_null_pages_would_be_noticed(make_runner, centred, boundaries):
    folder, pages = centred
    expected, _ = serve(TorchRunner(load_model(folder), 34, SIZE, null_page_set=pages), boundaries)
    near = dataclasses.replace(pages, keys=pages.keys * 1e-3)
    logits, _ = serve(make_runner(folder, 34, sizes={"max_seq_len": 512}, null_page_set=near), boundaries)
    assert (logits - expected).abs().max() > 0.1


def test_an_engine_reads_every_entry_so_nothing_can_be_dropped_and_null_needs_pages(make_runner, centred, boundaries):
    runner = make_runner(centred[0], 34, sizes={"max_seq_len": 512})
    dropped = make_config("pressure", need="age", retired_becomes="dropped")
    with pytest.raises(UserError, match="dropped needs a runner that skips entries"):
        Executor(runner, dropped, boundaries, 512)
    with pytest.raises(UserError, match="null pages, got one without"):
        Executor(runner, CONFIG, boundaries, 512)


def test_an_engine_directory_brings_its_null_pages(tmp_path, centred, fake_tensorrt):
    folder, pages = centred
    engine_dir = write_engine_dir(tmp_path / "engine", folder, max_seq_len=512)
    assert open_runner(load_engine(engine_dir), 40).null_pages is None
    save_null_pages(engine_dir, pages)
    runner = open_runner(load_engine(engine_dir), 40)
    assert runner.null_pages.blocks == list(range(len(pages.keys)))
    assert torch.equal(runner.pool[: len(pages.keys), :, 0, :, 5], pages.keys)


@pytest.mark.parametrize(
    ("kv_heads", "tp_size", "heads"),
    [(8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]), (2, 4, [[0], [0], [1], [1]]), (2, 2, [[0], [1]]), (1, 2, [[0], [0]])],
)
def test_each_rank_gets_its_layers_and_heads(kv_heads, tp_size, heads):
    keys = torch.arange(6.0)[:, None] * 100 + torch.arange(float(kv_heads))
    pages = NullPageSet(keys[None, :, :, None], np.array([0, 512], np.int32), torch.zeros(1, 6, kv_heads))
    for pp_rank in range(3):
        for tp_rank in range(tp_size):
            part = of_rank(pages, 2, len(heads[0]), pp_rank, tp_rank, tp_size).keys[0, :, :, 0]
            assert part.tolist() == [
                [layer * 100 + h for h in heads[tp_rank]] for layer in (2 * pp_rank, 2 * pp_rank + 1)
            ]
