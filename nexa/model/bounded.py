"""Norms that squeeze every element into an interval: without statistics (ELN) or with those of a block's input (BHyT).

As in `norms`: [..., n] to [..., n] over the last dimension, arithmetic in fp32 (fp64 for fp64 input), the result in the
input's dtype, scalars of shape [1].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexa.model.layers import Features
from nexa.model.norms import NormSite, Part, at_least_fp32, dyt_alpha


class ELN(nn.Module):
    """Element-wise layer normalisation: y = weight * x / sqrt(x^2 + C) + bias, C = c^2 + eps with one learnable c.

    Stollenwerk 2025 (arXiv 2503.21708), where it is DyISRU and C is beta: the element-wise counterpart of RMSNorm, with
    bounds +-weight as DyT has. Verified there and in the code of its experiments: the form, one C for each norm, weight
    1 and bias 0 at first, an epsilon beside C. Our choices: that code learns C itself, which may turn negative, or
    softplus of it; here it is the square of c, so that it stays positive and Adam's steps mean something when C is
    large. And that code starts C at 100 unless told otherwise for each model; here c starts at 1 / alpha of DyT's
    table, so that both functions start with the same slope weight / c at 0.
    """

    def __init__(self, features: Features, c: float, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = features.vector(gain), features.vector(0.0)
        self.c = nn.Parameter(torch.full((1,), c))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`, whose part and model width choose c."""
        return cls(site.features, 1 / dyt_alpha(site.width, site.part), site.eps, site.gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide = at_least_fp32(x)
        squared = at_least_fp32(self.c).square() + self.eps
        return (wide * torch.rsqrt(wide.square() + squared)).to(x.dtype) * self.weight + self.bias


KAPPA = 10.0
BHYT_LAMBDA: dict[Part, float] = {"attention": 2.0, "feed_forward": 1.0, "embedding": 2.0, "final": 2.0}
"""Initial lambda of BHyT: before attention and feed-forward the first of the pairs that the official script tries (the
other is 3 and 3), elsewhere the default of its constructor."""


class BHyT(nn.Module):
    """Bounded hyperbolic tangent: y = weight * tanh(lambda x / (kappa rms(x))), kappa = 10 (arXiv 2601.09719).

    The one before the feed-forward takes no statistics of its own: `second_variance` says what its mean square is
    taken to be. As in the official code, no gradient flows through that approximation's lambda and matrices, while it
    does through the mean square of the block's input.
    """

    def __init__(self, features: Features, eps: float, scale: float, gain: float = 1.0) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.weight = features.vector(gain)
        # the name is a keyword of Python: `getattr` reads it
        self.register_parameter("lambda", nn.Parameter(torch.full((1,), scale)))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`, whose part chooses lambda."""
        return cls(site.features, site.eps, BHYT_LAMBDA[site.part], site.gain)

    def variance(self, x: Tensor) -> Tensor:
        """Mean square [..., 1] of x [..., n], before eps."""
        return self.features.total(at_least_fp32(x).square().sum(-1, keepdim=True)) / self.features.size

    def second_variance(self, variance: Tensor, value_gain: Tensor, tokens: int, input_scale: float) -> Tensor:
        """The mean square [..., 1] after attention that reads `input_scale` times this norm of a stream of `variance`.

        variance + value_gain / (tokens n) (input_scale lambda / kappa)^2: what this norm gives has a mean square of
        about (lambda / kappa)^2, and attention averages it over `tokens` positions before W_O W_V, whose squared
        Frobenius norm is `value_gain`. The scale, LNS's 1/sqrt(l), is 1 in the paper.
        """
        scale = at_least_fp32(getattr(self, "lambda").detach()) * (input_scale / KAPPA)
        return variance + value_gain / (tokens * self.features.size) * scale.square()

    def forward(self, x: Tensor, variance: Tensor | None = None) -> Tensor:
        """[..., n] -> [..., n]. variance [..., 1]: taken for the mean square of x; null: that of x itself."""
        wide = at_least_fp32(x)
        variance = self.variance(x) if variance is None else variance
        bound = at_least_fp32(getattr(self, "lambda")) / KAPPA * torch.rsqrt(variance + self.eps)
        return torch.tanh(wide * bound).to(x.dtype) * self.weight
