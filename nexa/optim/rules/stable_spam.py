"""Stable-SPAM (Huang et al., arXiv 2502.17055): Adam on gradients brought to a steady size, with resets.

For each tensor, with the number k of updates since the last reset (below) and momentum factor s:

    c <- g3 c + (1 - g3) max|g|;  where |g| > c^:  g = g / max|g| c^                       (AdaClip)
    a <- g1 s a + (1 - g1 s) |g|,  b <- g2 b + (1 - g2) |g|^2;  g <- g / |g| a^ / (sqrt(b^) + eps)     (AdaGN)
    Adam on g with betas b1 s, b2; every `reset_every` updates its moments become 0        (MoRet)

^ is the bias correction by k. s = 0.75 + 0.25 cos(pi n / (total_steps + 1)) at update n, or 1 without `total_steps`.
Defaults: gammas 0.85, 0.99999, 0.999 (training in bfloat16), reset every 1000, betas 0.9, 0.999, eps 1e-8.

The paper zeroes the moments and then updates. Here, as in the official code, at a reset the old moments serve that
update with k = 1, and the zeroed ones start with the next at k = 2. k is 1 for the corrections of Adam only: those of
a, b and c see the reset at the next update. A gradient of zeros is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexa.numerics import euclidean_norm
from nexa.optim.rule import Slot, State
from nexa.optim.rules.direction import Direction, counted, fresh

SMALLEST = 1e-30
"""In the place of a norm of 0."""


@dataclass(frozen=True)
class StableSpam(Direction):
    """See the module."""

    gamma1: float = 0.85
    gamma2: float = 0.99999
    gamma3: float = 0.999
    reset_every: int = 1000
    total_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    like_adam = True

    def fresh(self, weight: Tensor) -> State:
        """Moments, and the scalars `largest` (c), `norm` (a) and `norm_sq` (b)."""
        scalars = {key: torch.zeros((), device=weight.device) for key in ("largest", "norm", "norm_sq")}
        return {**fresh(weight, "exp_avg", "exp_avg_sq"), **scalars}

    def factor(self, step: int) -> float:
        """s of update `step`."""
        if self.total_steps is None:
            return 1.0
        return 0.75 + 0.25 * math.cos(math.pi * step / (self.total_steps + 1))

    def since(self, step: int) -> tuple[int, int]:
        """k of update `step`: for the sizes of gradients, and for Adam."""
        resets, after = divmod(step, self.reset_every)
        if resets and not after:
            return (step if resets == 1 else self.reset_every + 1), 1
        return (after + 1, after + 1) if resets else (step, step)

    def directions(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Adam's direction from the gradients of steady size."""
        return [self._direction(slot, step) for slot, step in zip(slots, counted(slots), strict=True)]

    def _direction(self, slot: Slot, step: int) -> Tensor:
        """Adam's equations with corrections of k."""
        k, (first, second) = self.since(step)[1], (self.betas[0] * self.factor(step), self.betas[1])
        gradient, average, square = self._steadied(slot, step), slot.state["exp_avg"], slot.state["exp_avg_sq"]
        average.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = square.sqrt().div_((1 - second**k) ** 0.5).add_(self.eps)
        direction = average.div(root).div_(1 - first**k)
        if step % self.reset_every == 0:
            average.zero_()
            square.zero_()
        return direction

    def _steadied(self, slot: Slot, step: int) -> Tensor:
        """AdaClip and AdaGN."""
        state, gradient, k = slot.state, slot.gradient, self.since(step)[0]
        norm_beta = self.gamma1 * self.factor(step)
        most = torch.linalg.vector_norm(gradient, math.inf)
        state["largest"].lerp_(most, 1 - self.gamma3)
        bound = state["largest"] / (1 - self.gamma3**k)
        gradient = torch.where(gradient.abs() > bound, gradient * (bound / most.clamp(min=SMALLEST)), gradient)
        norm = euclidean_norm(gradient)
        state["norm"].lerp_(norm, 1 - norm_beta)
        state["norm_sq"].lerp_(norm.square(), 1 - self.gamma2)
        size = (state["norm_sq"] / (1 - self.gamma2**k)).sqrt_().add_(self.eps)
        return gradient * (state["norm"] / (1 - norm_beta**k) / size / norm.clamp(min=SMALLEST))
