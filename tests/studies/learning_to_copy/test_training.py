"""Training the model of the traces, on a few steps of a small corpus."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from benchmarks.studies.learning_to_copy.shape import model_config
from benchmarks.studies.learning_to_copy.training import TraceTrainingConfig, add_dropout, mean_loss, train
from trtllm_memshare.engine.checkpoint import read_checkpoint
from trtllm_memshare.evaluation.corpus import CAN_TRAIN

CONFIG = TraceTrainingConfig(num_steps=3, tokens_per_step=128, vocab_size=272, window=64, bf16=False, seed=5)
SHAPE = model_config(CONFIG.vocab_size, CONFIG.window, 0, 1)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    for name, count in (("r1_aime24", 12), ("r1_math500", 6)):
        rows = [
            {
                "id": i,
                "problem": f"Add {i} and {i}.",
                "reasoning": f"{i} and {i} make {2 * i}. " * 8,
                "content": f"{2 * i}",
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # The two files must not hold one problem twice.
    path = folder / "r1_math500.jsonl"
    path.write_text(path.read_text().replace("Add", "Sum"))
    return folder


@pytest.mark.skipif(not CAN_TRAIN, reason="training a tokenizer needs transformers 5")
def test_a_run_leaves_a_checkpoint_that_can_be_served_and_repeats_bit_for_bit(traces, tmp_path):
    for name in ("first", "second"):
        train(CONFIG, tmp_path / name, "cpu", traces)
    checkpoint = read_checkpoint(tmp_path / "first")
    assert (checkpoint.vocab_size, checkpoint.max_position_embeddings, checkpoint.rope_theta) == (272, 64, 1e6)
    written = json.loads((tmp_path / "first" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6  # transformers 4 reads the first
    log = json.loads((tmp_path / "first" / "training_log.json").read_text())
    assert {"validation_loss", "copy_loss_16"} <= log["log"][-1].keys()
    assert log["config"]["num_steps"] == log["log"][-1]["step"] == log["kept_step"] == 3
    assert log["tokens"]["train"] > 0 < log["tokens"]["validation"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.skipif(not CAN_TRAIN, reason="training a tokenizer needs transformers 5")
def test_the_matrices_go_to_muon_or_to_adamw_and_all_weights_move(traces, tmp_path):
    """A weight that no optimizer holds would stay where the seed put it."""
    runs = {}
    for name, changes in {"adamw": {}, "muon": {"muon_learning_rate": 0.02}, "still": {"num_steps": 1}}.items():
        rate = 1e-12 if name == "still" else CONFIG.adam_learning_rate
        train(replace(CONFIG, adam_learning_rate=rate, weight_decay=0.0, **changes), tmp_path / name, "cpu", traces)
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    for name, still in runs["still"].items():
        moved = {run: (runs[run][name] - still).abs().max() for run in ("adamw", "muon")}
        assert min(moved.values()) > 1e-6, name
        if still.ndim == 2 and "embed" not in name:
            assert not torch.allclose(runs["adamw"][name], runs["muon"][name]), name


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(SHAPE).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        plain = model(ids).logits
        rate = 0.5
        add_dropout(model, lambda: rate)
        assert torch.equal(model(ids).logits, plain)
        assert not torch.allclose(model.train()(ids).logits, plain)
        rate = 0.0
        assert torch.equal(model(ids).logits, plain)


def test_the_mean_loss_counts_every_token_once_and_leaves_the_model_in_training():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(SHAPE).train()
    documents = [np.arange(5), np.arange(40) % 7, np.arange(200) % 11]
    got = mean_loss(model, documents, 64)
    assert model.training
    with torch.inference_mode():
        total = sum(
            float(model.eval()(i[None], labels=i[None]).loss) * (len(i) - 1)
            for i in (torch.from_numpy(d[:64]) for d in documents)
        )
    assert got == pytest.approx(total / (4 + 39 + 63), rel=1e-5)
