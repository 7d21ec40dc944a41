"""LAMB: Adam's direction with the length of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexa.numerics import euclidean_norm
from nexa.optim.rule import Rule, Slot, State
from nexa.optim.rules.adamw import AdamW


@dataclass(frozen=True)
class Lamb(Rule):
    """LAMB (You et al. 2020, arXiv 1904.00962), for each tensor.

        r = m^ / (sqrt(v^) + eps) + decay W
        W <- W - lr (|W| / |r|) r,   the ratio 1 where one of the norms is 0

    Some codes bound |W| by 10 in the ratio, which for large matrices makes the rate depend on their size; the paper's
    experiments do not. State: that of AdamW. Defaults are the paper's.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    @property
    def _adam(self) -> AdamW:
        return AdamW(self.betas, self.eps)

    def fresh(self, weight: Tensor) -> State:
        """AdamW's."""
        return self._adam.fresh(weight)

    def update(self, slots: Sequence[Slot], lr: float, decay: float) -> None:
        """See the class."""
        if not slots:
            return
        for slot, raw in zip(slots, self._adam.directions(slots), strict=True):
            step = raw.add_(slot.weight, alpha=decay)
            length, of_step = euclidean_norm(slot.weight), euclidean_norm(step)
            ratio = length / of_step
            ratio = torch.where((length > 0) & (of_step > 0), ratio, torch.ones_like(ratio))
            slot.weight.add_(step.mul_(ratio), alpha=-lr)
