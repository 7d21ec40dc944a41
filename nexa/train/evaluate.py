"""Validation loss: summed over tokens, divided once, the same whatever the batching."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from nexa.parallel.engine import Engine
from nexa.train.data import ValidationSet


class Validation(NamedTuple):
    """A validation loss, and what the trainers of the GaLore family would have reported for the same batches."""

    loss: float
    """Mean cross-entropy in nats per scored token."""
    harness_loss: float
    """On each rank the sum of its n batches' mean losses over n + 1, then the mean of the ranks: their counter of
    batches starts at 1, so the number is too low, the more so the fewer batches there are, and it depends on
    `train.micro_batch_size` and the number of ranks."""


def validate(engine: Engine, data: ValidationSet) -> Validation:
    """Both losses of `data`, over all ranks."""
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    batches = data.batches()
    for batch in batches:
        moved = {key: value.to(engine.device, non_blocking=True) for key, value in batch.items()}
        total, scored = engine.total_loss(moved), (moved["labels"] >= 0).sum()
        totals[0] += total
        totals[1] += scored
        totals[2] += total / scored.clamp_min(1) / (len(batches) + 1)
    dist.all_reduce(totals, group=engine.topology.data_group)
    total_loss, count, harness = totals.tolist()
    assert count > 0, "a validation set holds at least one scored token"
    return Validation(total_loss / count, harness / engine.topology.data_size)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
