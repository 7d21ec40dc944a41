"""How the processes of a run put together what each of them measured."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from nexa.diagnostics.base import Sharing, unchanged
from nexa.parallel.collectives import gather_tokens
from nexa.parallel.topology import Topology

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def _combine(x: Tensor, how: Literal["sum", "max"], groups: tuple[dist.ProcessGroup, ...]) -> Tensor:
    for group in groups:
        dist.all_reduce(x, op=_OPERATIONS[how], group=group)
    return x


def sharing_of(topology: Topology, sequence: bool) -> Sharing:
    """For a run: data-parallel ranks have other sequences, tensor-parallel ones other heads of the same.

    sequence: whether a rank's residual stream is its share of the tokens; it is then gathered to be measured, block by
    block, so that tensor-parallel ranks measure the same streams.
    """
    groups = topology.data_group, topology.tensor_group
    return Sharing(
        whole=partial(gather_tokens, group=topology.tensor_group) if sequence else unchanged,
        sequences=partial(_combine, groups=groups[:1]),
        heads=partial(_combine, groups=groups),
    )
