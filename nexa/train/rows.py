"""The rows of a global batch: what each lost, gathered from all ranks in the batch's own order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nexa.parallel.topology import Topology


def gather_rows(losses: Tensor, tokens: Tensor, topology: Topology) -> Tensor:
    """Summed loss and scored tokens of the b rows of each of this rank's A micro-batches, [A, b] both -> [2, A D b], of
    all rows of the global batch in the order of `TrainingData` with D data-parallel ranks, where the losses are.

    Collective.
    """
    mine = torch.stack((losses.float(), tokens.to(losses.device, non_blocking=True)))
    every = mine.new_empty(topology.data_size * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(every, mine, group=topology.data_group)
    return every.view(topology.data_size, *mine.shape).permute(1, 2, 0, 3).flatten(1)


def own_rows(every: Tensor, topology: Topology, micro_batch: int) -> Tensor:
    """[A D b], something of each row of the global batch -> [A, b], that of this rank's rows."""
    return every.view(-1, topology.data_size, micro_batch)[:, topology.data_rank]


def losses_by_source(names: Sequence[str], sums: Tensor, tokens: Tensor) -> dict[str, float]:
    """Mean loss over the scored tokens of each source that has some.

    names: the source of each row; sums, tokens [rows], on the host: summed loss and scored tokens of each.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    source = torch.tensor([numbers[name] for name in names])
    totals = torch.zeros(2, len(numbers), dtype=torch.float64)
    totals.index_add_(1, source, torch.stack((sums, tokens)).double())
    loss, scored = totals.tolist()
    return {name: loss[at] / scored[at] for name, at in numbers.items() if scored[at]}
