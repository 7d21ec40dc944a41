"""Takes norms out of the model one by one: when, a pure function of the step, and with which constant."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nexa.config.schema import RemovalConfig
from nexa.model.removal import MOMENTUM, Removable, removed_after, sites
from nexa.train.hook import Hook, Row

if TYPE_CHECKING:
    from nexa.train.loop import Trainer

logger = logging.getLogger("nexa")


class RemovalHook(Hook):
    """Averages what the norms measure over ranks and steps, and freezes the next norm when its step is done."""

    def __init__(self, removal: RemovalConfig, layers: int) -> None:
        self._removal, self._names = removal, sites(removal, layers)
        self._norms: list[Removable] = []

    def start(self, trainer: Trainer) -> None:
        """Ask the norms for their sums."""
        for name in self._names:
            norm = trainer.engine.module.get_submodule(name)
            assert isinstance(norm, Removable), name
            norm.tally = torch.zeros(2, device=trainer.engine.device)
            self._norms.append(norm)

    def measure(self, trainer: Trainer) -> Row:
        """Close the step; `removal/norms_left` in its row. One all-reduce, of two numbers a norm, and no waiting."""
        self._average()
        step, every = trainer.state.step, trainer.config.log.every
        before, now = (min(removed_after(self._removal, at), len(self._names)) for at in (step - 1, step))
        left = len(self._names) - now
        for name, norm in zip(self._names[before:now], self._norms[before:now], strict=True):
            norm.removed.fill_(1.0)
            logger.info("step %d: %s divides by a constant from now on; norms left: %d", step, name, left)
        shown = now > before or (every > 0 and step % every == 0)
        return {"removal/norms_left": left} if shown else {}

    @torch.no_grad()
    def _average(self) -> None:
        """Running averages of all norms; every rank has the same afterwards, whatever tokens it saw."""
        tallies = torch.stack([norm.tally for norm in self._norms if norm.tally is not None])
        dist.all_reduce(tallies)
        means = tallies[:, 0] / tallies[:, 1]
        for norm, mean in zip(self._norms, means, strict=True):
            old = norm.fixed_rms
            new = torch.where(old > 0, MOMENTUM * old + (1 - MOMENTUM) * mean, mean)
            old.copy_(torch.where(norm.removed > 0, old, new))
            if norm.tally is not None:
                norm.tally.zero_()
