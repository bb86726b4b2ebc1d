"""The adapter: a few steps on a tiny model, what is written, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.studies.adapter import training
from benchmarks.studies.adapter.training import AdapterConfig, Transcripts, train
from build_scripts.tiny_reasoner.tokenizer import build_tokenizer
from trtllm_memshare.errors import UserError

FEW = AdapterConfig(rank=2, max_terms=2, num_steps=4, tokens_per_step=900, log_every=2)


def test_a_few_steps_lower_the_loss_and_leave_an_adapter_and_a_merged_checkpoint(tiny_checkpoint, tmp_path):
    report = train(tiny_checkpoint, tmp_path, FEW, "cpu")
    assert [entry["step"] for entry in report["log"]] == [0, 2, 4]
    assert report["log"][-1]["validation_loss"] < report["log"][0]["validation_loss"]
    assert report["adapter_bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    before, after = (AutoModelForCausalLM.from_pretrained(d) for d in (tiny_checkpoint, tmp_path / "merged"))
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert moved
    assert all("proj" in name for name in moved)  # linear layers; embeddings and norms stay
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 1


def test_an_adapter_that_is_too_large_is_refused_with_the_rank_that_fits(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MAX_ADAPTER_BYTES", 6000)
    with pytest.raises(UserError, match=r"at most 0 MiB .* \(set --rank 3\)"):
        train(tiny_checkpoint, tmp_path, AdapterConfig(rank=4), "cpu")
    assert not list(tmp_path.iterdir())


def test_the_end_token_is_a_target_and_padding_is_another_one():
    drawn = Transcripts(build_tokenizer(4096), 3, 0)
    assert drawn.pad != drawn.end
    batches = drawn.batches(1200)
    next(batches)
    for _ in range(3):
        rows = batches.send(0.0)
        assert rows.size <= 1200 or len(rows) == 1
        assert ((rows == drawn.end).sum(1) == 1).all()
        padded = np.cumsum(rows == drawn.end, 1) - (rows == drawn.end) > 0
        assert (rows[padded] == drawn.pad).all()


def test_problems_of_the_data_sets_are_never_drawn():
    tokenizer = build_tokenizer(4096)
    drawn = Transcripts(tokenizer, 4, 0)
    seen = {tokenizer.decode(drawn.draw()).split("\n")[0] for _ in range(300)}
    unseen = {tokenizer.decode(drawn.draw(held_out=True)).split("\n")[0] for _ in range(20)}
    assert not seen & unseen
