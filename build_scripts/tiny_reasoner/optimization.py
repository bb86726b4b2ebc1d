"""The loop that trains a small model: Muon for matrices, or not, AdamW for the rest, one schedule for both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Learning rates dimensionless, ``minutes`` the wall-clock budget.

    ``muon_learning_rate`` 0 gives the matrices to AdamW too.

    Rates follow the share of ``num_steps`` done; with ``minutes`` set they follow the share of the time instead, which
    fits a machine of unknown speed but repeats bit for bit only when ``num_steps`` decides.
    """

    num_steps: int
    minutes: float | None
    muon_learning_rate: float
    adam_learning_rate: float
    weight_decay: float = 0.01  # of the matrices
    bf16: bool = True
    log_every: int = 250  # steps


def optimize(
    model: Any,
    batches: Generator[np.ndarray, float, None],
    pad_id: int,
    schedule: Schedule,
    measure: Callable[[int], dict[str, float]],
    keep: Callable[[list[dict[str, float]]], None],
) -> None:
    """Trains ``model`` in place on next-token prediction.

    Args:
      model: a transformers decoder.
      batches: started; ``send`` takes the share of training done and gives int64 ``[sequences, length]``.
      pad_id: token that is no target.
      measure: called with the step each time something is logged; what it returns goes into the log.
      keep: called with the log so far after each entry.
    """
    device = model.device
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = _optimizers(matrices, others, schedule)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    log: list[dict[str, float]] = []
    started, done, step = time.monotonic(), 0.0, 0
    with tqdm(total=100, unit="%", desc="training") as bar:
        while done < 1.0:
            warm, cooled = min(1.0, (step + 1) / 100), min(1.0, (1.0 - done) / 0.5)
            for optimizer, rates in zip(optimizers, base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * warm * max(cooled, 0.01)
            batch = torch.from_numpy(batches.send(done)).to(device)
            with torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=schedule.bf16):
                logits = model(batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten(), ignore_index=pad_id
            )
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            minutes = (time.monotonic() - started) / 60
            done = minutes / schedule.minutes if schedule.minutes else step / schedule.num_steps
            bar.n = round(min(done, 1.0) * 100, 1)
            bar.set_postfix(step=step, loss=f"{loss.item():.4f}", refresh=step % 10 == 0)
            if step % schedule.log_every == 0 or done >= 1.0:
                log.append({"step": step, "minutes": round(minutes, 2), "loss": loss.item(), **measure(step)})
                tqdm.write(json.dumps(log[-1]))
                keep(log)


def _optimizers(matrices: list[Any], others: list[Any], schedule: Schedule) -> list[torch.optim.Optimizer]:
    decay, groups = schedule.weight_decay, [{"params": others, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if schedule.muon_learning_rate > 0:
        muon = torch.optim.Muon(matrices, schedule.muon_learning_rate, weight_decay=decay, adjust_lr_fn="original")
        optimizers.append(muon)
    else:
        groups.append({"params": matrices, "weight_decay": decay})
    return [*optimizers, torch.optim.AdamW(groups, lr=schedule.adam_learning_rate, betas=(0.9, 0.95))]
