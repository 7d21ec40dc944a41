"""Validation loss: summed over tokens, divided once, the same whatever the batching."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from nexa.parallel.engine import Engine
from nexa.train.data import ValidationSet


def validation_loss(engine: Engine, data: ValidationSet) -> float:
    """Mean cross-entropy in nats per scored token of `data`, over all ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in data.batches():
        moved = {key: value.to(engine.device, non_blocking=True) for key, value in batch.items()}
        totals[0] += engine.total_loss(moved)
        totals[1] += (moved["labels"] >= 0).sum()
    dist.all_reduce(totals, group=engine.topology.data_group)
    total, count = totals.tolist()
    assert count > 0, "a validation set holds at least one scored token"
    return total / count


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
