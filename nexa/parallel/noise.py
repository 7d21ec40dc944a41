"""The gradients of single micro-batches, in any layout: what the noise of the whole one is estimated from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexa.numerics import euclidean_norm
from nexa.parallel import private
from nexa.parallel.topology import Topology
from nexa.sharding import shard_of


class MicroBatchProbe:
    """Adds up the squared norms of the gradients of a step's micro-batches, on all ranks.

    Made before the first micro-batch of a step. A hook on each parameter sees its gradient before it is added to those
    of other micro-batches or reduced over ranks, at every ZeRO stage: no pass is taken a second time, and nothing waits
    for the device. The cost is reading each gradient once more.
    """

    def __init__(self, engine: Any, topology: Topology) -> None:
        """engine: DeepSpeed's."""
        self._topology = topology
        # what `Engine.forward_backward` multiplied with, and the loss scale of fp16
        self._scale = 1.0 / (topology.data_size * private.loss_scale(engine))
        self._square = torch.zeros((), dtype=torch.float64, device=topology.device)
        counted = [p for p in engine.module.parameters() if topology.tensor_rank == 0 or not shard_of(p).is_whole]
        # what all tensor ranks have whole counts on the first one
        self._hooks = [parameter.register_hook(self._add) for parameter in counted]

    def _add(self, gradient: Tensor) -> None:
        self._square += euclidean_norm(gradient.detach()).double().square()

    def finish(self) -> Tensor:
        """sum_i |g_i|^2 over the micro-batches i of all ranks, where sum_i g_i is the gradient of the mean loss of the
        whole batch; fp64 scalar on the device. Collective. Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()
        square = self._square * self._scale**2
        dist.all_reduce(square, group=self._topology.data_group)
        dist.all_reduce(square, group=self._topology.tensor_group)
        return square
