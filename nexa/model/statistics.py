"""Buffers that belong to a checkpoint: what a module measures while it trains, next to what it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nexa.model.layers import Features


class WithStatistics(nn.Module):
    """A module that keeps statistics of what it has seen, in fp32 or wider whatever the precision of its weights.

    Every buffer of a model is one: it is in `state_dict()`, in checkpoints and exports under its name, and equal on all
    ranks that hold it. It is changed in place (so that it stays what the checkpoint writes) and in training only.
    """

    def statistic(self, name: str, value: float, features: Features | None = None, rows: int = 0) -> Tensor:
        """Make the buffer `name`, all `value`: [1], or of `features` a number each [size], or `rows` [rows, size].

        With shared features this process has its own part of it, as of a parameter.
        """
        size = () if features is None else (features.size,)
        shape = (*((rows,) if rows else ()), *size) or (1,)
        local = shape if features is None else (*shape[:-1], features.local)
        buffer = torch.full(local, value, dtype=torch.float32)
        if features is not None:
            features.mark(buffer, len(shape) - 1, shape)
        self.register_buffer(name, buffer)
        return buffer

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        """What `to`, `bfloat16` and the like do; here a statistic moves with its marks and does not lose precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None
            assert new is not None
            if torch.finfo(new.dtype).bits < torch.finfo(old.dtype).bits:
                new = old.to(device=new.device, dtype=torch.float32)
            for mark, value in vars(old).items():
                setattr(new, mark, value)
            self._buffers[name] = new
        return self


def tensors_of(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of all that a checkpoint holds of `model`: parameters (a tied one once), statistics."""
    yield from model.named_parameters()
    yield from model.named_buffers()
