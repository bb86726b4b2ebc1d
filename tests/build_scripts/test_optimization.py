"""The loop that trained the bundled model: rates, targets, what is logged, and when it ends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from build_scripts.tiny_reasoner import optimization
from build_scripts.tiny_reasoner.optimization import Schedule, optimize

PAD, WORDS = 0, 8
CYCLE = np.tile(np.arange(1, WORDS), 3)[None, :16].astype(np.int64)  # each word has one that follows


class NextWord(torch.nn.Module):
    """Foretells the next word from the last one alone."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(WORDS, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, WORDS, bias=False)

    def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.norm(self.embed(ids))))


def batches_of(batch: np.ndarray, asked: list[float] | None = None):
    def generate():
        done = yield
        while True:
            if asked is not None:
                asked.append(done)
            done = yield batch

    generator = generate()
    next(generator)
    return generator


def train(schedule: Schedule, batch: np.ndarray = CYCLE, asked: list[float] | None = None):
    """The model, the log, and the logs that were kept."""
    model, kept = NextWord(), []
    optimize(
        model,
        batches_of(batch, asked),
        PAD,
        schedule,
        lambda step: {"double": 2.0 * step},
        lambda log: kept.append(list(log)),
    )
    return model, kept[-1], kept


@pytest.mark.parametrize("muon", [0.02, 0.0])
def test_it_learns_what_follows_and_logs_on_the_way(muon):
    asked: list[float] = []
    schedule = Schedule(60, None, muon, 0.05, bf16=False, log_every=25)
    model, log, kept = train(schedule, asked=asked)
    assert [entry["step"] for entry in log] == [25, 50, 60]
    assert [entry["double"] for entry in log] == [50, 100, 120]
    assert [len(entries) for entries in kept] == [1, 2, 3]
    assert log[-1]["loss"] < log[0]["loss"] < np.log(WORDS)
    assert model(torch.from_numpy(CYCLE), False).logits[0, :-1].argmax(-1).tolist() == CYCLE[0, 1:].tolist()
    assert asked == pytest.approx(np.arange(60) / 60)  # batches are told how much is done


def test_padding_is_no_target():
    """A batch of padding behind one word has no target but padding: its loss has nothing to be the mean of."""
    padded = np.concatenate([CYCLE, np.full_like(CYCLE, PAD)], 1)
    schedule = Schedule(1, None, 0.02, 0.05, bf16=False)
    (whole,), (with_padding,) = (train(schedule, batch)[1] for batch in (CYCLE, padded))
    assert with_padding["loss"] == pytest.approx(whole["loss"])


def test_rates_rise_over_a_hundred_steps_and_fall_over_the_second_half(monkeypatch):
    rates: list[float] = []

    class Recorded(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    train(Schedule(400, None, 0.0, 0.01, bf16=False, log_every=1000), CYCLE[:, :3])
    assert rates[0] == pytest.approx(0.0001)
    assert rates[99:200] == pytest.approx([0.01] * 101)
    assert rates[300] == pytest.approx(0.005)
    assert rates[-1] == pytest.approx(0.0001)  # never below a hundredth
    assert np.all(np.diff(rates[:100]) > 0)
    assert np.all(np.diff(rates[201:397]) < 0)


def test_matrices_go_to_muon_and_everything_else_to_adam_without_decay():
    model = NextWord()
    matrices, others = [model.head.weight], [model.embed.weight, *model.norm.parameters()]
    muon, adam = optimization._optimizers(matrices, others, Schedule(1, None, 0.02, 0.05, weight_decay=0.1))
    assert isinstance(muon, torch.optim.Muon)
    assert (muon.param_groups[0]["params"], muon.param_groups[0]["weight_decay"]) == (matrices, 0.1)
    assert (adam.param_groups[0]["params"], adam.param_groups[0]["weight_decay"]) == (others, 0.0)
    (alone,) = optimization._optimizers(matrices, others, Schedule(1, None, 0.0, 0.05, weight_decay=0.1))
    assert [group["weight_decay"] for group in alone.param_groups] == [0.0, 0.1]


def test_a_budget_of_minutes_ends_by_the_clock(monkeypatch):
    seconds = iter(range(0, 1000, 15))
    monkeypatch.setattr(optimization.time, "monotonic", lambda: float(next(seconds)))
    asked: list[float] = []
    _, log, _ = train(Schedule(10**6, 1.0, 0.02, 0.05, bf16=False), asked=asked)
    assert log == [{"step": 4, "minutes": 1.0, "loss": pytest.approx(log[0]["loss"]), "double": 8.0}]
    assert asked == pytest.approx([0, 0.25, 0.5, 0.75])
