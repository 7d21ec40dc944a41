"""Norms that divide each feature by a quadratic mean over tokens, most of it remembered: PowerNorm and UnifiedNorm.

In training a forward pass measures its tokens, those of the processes that share the weights included, and updates
running statistics; its backward pass does not differentiate through them but subtracts a running estimate of what that
would give. In evaluation the running quadratic mean is a constant and each token is computed by itself.

During warm-up, and in UnifiedNorm always, training divides by statistics of the batch itself: what comes out for a
token depends on later tokens. Only evaluation is causal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nexa.model.layers import Features
from nexa.model.norms import NormSite, at_least_fp32
from nexa.model.statistics import WithStatistics

POWERNORM_WARMUP, UNIFIEDNORM_WARMUP = 10_000, 4_000
"""Steps, by the official code of both."""
MOMENTUM = 0.9
WINDOW = 4
RATIO_FROM, RATIO_LARGEST = 1_000, 5.0

Correct = Callable[[Tensor], Tensor]
"""Mean of gradient times output over this process's tokens [n] -> the multiple of the output [n] to subtract."""


class _Divide(torch.autograd.Function):
    """z = x * scale, whose gradient is (g - correct(mean(g z)) z) * scale: `scale` is taken for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, correct: Correct) -> Tensor:
        z = x * scale
        ctx.save_for_backward(z, scale)
        ctx.correct = correct
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        z, scale = ctx.saved_tensors
        along = (gradient * z).flatten(0, -2).mean(0)
        return (gradient - ctx.correct(along) * z) * scale, None, None


class _ScaleGradient(torch.autograd.Function):
    """y as it is; its gradient times `factor`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return (gradient * factor).to(gradient.dtype), None


class RunningNorm(WithStatistics):
    """y = weight * x / sqrt(running_square + eps) + bias in evaluation; in training as the kind says.

    updates: training forward passes so far. running_gradient: running estimate of mean(g z), with g the gradient of the
    mean loss of the whole batch and z the output before the weight. Both are per feature, over tokens.
    """

    updates: Tensor
    running_square: Tensor
    running_gradient: Tensor

    def __init__(self, features: Features, eps: float, warmup: int, gain: float = 1.0) -> None:
        """warmup: steps whose forward passes divide by what they measure themselves."""
        super().__init__()
        self.features, self.eps = features, eps
        self.warmup = warmup * features.tokens.passes_per_step
        self.weight, self.bias = features.vector(gain), features.vector(0.0)
        self.statistic("updates", 0.0)
        self.statistic("running_square", 1.0, features)
        self.statistic("running_gradient", 0.0, features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]; in training mode also a step of the running statistics."""
        if self.training:
            y: Tensor = self._train(x)
        else:
            unit = self.rescaled(at_least_fp32(x)) * torch.rsqrt(self.running_square + self.eps)
            y = unit.to(x.dtype) * self.weight
        return y + self.bias

    # what changes statistics, and what communicates in its backward pass, is not for the compiler to move
    @torch.compiler.disable
    def _train(self, x: Tensor) -> Tensor:
        wide = self.rescaled(at_least_fp32(x))
        with torch.no_grad():
            square = self.features.tokens.average(wide.square().flatten(0, -2).mean(0))
            self.updates.add_(1)
            used, correct, ratio = self.observe(square)
            scale = torch.rsqrt(used + self.eps)
        unit = _Divide.apply(wide, scale, self._over_all_tokens(correct))
        weighted: Tensor = unit.to(x.dtype) * self.weight
        return weighted if ratio is None else _ScaleGradient.apply(weighted, ratio)

    def _over_all_tokens(self, correct: Correct) -> Correct:
        """`correct` for the mean over all processes, in units that no layout changes."""
        tokens = self.features.tokens

        def here(along: Tensor) -> Tensor:
            return correct(tokens.average(along) / tokens.gradient_scale) * tokens.gradient_scale

        return here

    def rescaled(self, wide: Tensor) -> Tensor:
        """[..., n] -> [..., n], of which statistics are taken."""
        return wide

    @abstractmethod
    def observe(self, square: Tensor) -> tuple[Tensor, Correct, Tensor | None]:
        """Take in the mean square [n] of all tokens of this pass, number `updates`.

        Returns the mean square to divide by [n], what the backward pass subtracts, and a factor on the gradient that
        weight and input receive [n] or None.
        """


class PowerNorm(RunningNorm):
    """PowerNorm (Shen et al. 2020, arXiv 2003.07845, with what the official code adds).

    First each token is divided by its own rms over the features, as in the code (one group) and not in the paper. Then
    the first `warmup` passes divide by their own quadratic mean, later ones by the running one of the passes before.
    The backward pass divides by the same number as the forward pass; after warm-up the code divides by the
    quadratic mean of the batch there, which the paper's algorithm does not.
    """

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        warmup = POWERNORM_WARMUP if site.warmup_steps is None else site.warmup_steps
        return cls(site.features, site.eps, warmup, site.gain)

    def rescaled(self, wide: Tensor) -> Tensor:
        """Each token over its root mean square."""
        mean = self.features.total(wide.square().sum(-1, keepdim=True)) / self.features.size
        return wide * torch.rsqrt(mean + self.eps)

    def observe(self, square: Tensor) -> tuple[Tensor, Correct, Tensor | None]:
        """nu += (1 - momentum) mean((g - nu z) z), of which the backward pass subtracts the nu before."""
        used = torch.where(self.updates <= self.warmup, square, self.running_square)
        mean_of_all = torch.where(self.updates < self.warmup, 1 / self.updates, 0.0)
        self.running_square.add_(mean_of_all * (square - self.running_square))
        self.running_square.lerp_(square, 1 - MOMENTUM)
        unit_square = square / (used + self.eps)

        def correct(along: Tensor) -> Tensor:
            before = self.running_gradient.clone()
            self.running_gradient.add_((1 - MOMENTUM) * (along - before * unit_square))
            return before

        return used, correct, None


class UnifiedNorm(RunningNorm):
    """Unified Normalization (Yang et al. 2022, arXiv 2208.01313), without its filter of outliers, as for text.

    After warm-up a pass divides by the geometric mean of the quadratic means of the last four passes, its own
    included. From pass 1000 on, and not in warm-up, the gradient of weight and input is multiplied by the ratio of
    this root to the running one, at most 5 and at least 1/5.
    """

    recent_squares: Tensor
    recent_gradients: Tensor

    def __init__(self, features: Features, eps: float, warmup: int, gain: float = 1.0) -> None:
        super().__init__(features, eps, warmup, gain)
        self.statistic("recent_squares", 0.0, features, rows=WINDOW)
        self.statistic("recent_gradients", 0.0, features, rows=WINDOW)

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        warmup = UNIFIEDNORM_WARMUP if site.warmup_steps is None else site.warmup_steps
        return cls(site.features, site.eps, warmup, site.gain)

    def observe(self, square: Tensor) -> tuple[Tensor, Correct, Tensor | None]:
        """The backward pass subtracts an exponential mean of (in warm-up: this pass's) window means of mean(g z)."""
        warm = self.updates <= max(self.warmup, WINDOW)
        used = torch.where(warm, square, _push(self.recent_squares, square).log().mean(0).exp())
        ratio = torch.sqrt((used + self.eps) / (self.running_square + self.eps))
        ratio = ratio.clamp(1 / RATIO_LARGEST, RATIO_LARGEST)
        ratio = torch.where(self.updates <= max(self.warmup, RATIO_FROM), 1.0, ratio)
        self.running_square.lerp_(used, 1 - MOMENTUM)

        def correct(along: Tensor) -> Tensor:
            mean = torch.where(warm, along, _push(self.recent_gradients, along).mean(0))
            self.running_gradient.lerp_(mean, 1 - MOMENTUM)
            return self.running_gradient.clone()

        return used, correct, ratio


def _push(window: Tensor, newest: Tensor) -> Tensor:
    """`window` [k, n] without its first row and with `newest` [n] as its last, changed in place."""
    return window.copy_(torch.cat((window[1:], newest[None])))
