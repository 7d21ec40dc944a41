"""What a norm computes. Where it stands is `placement`'s business, which one a name means is `kinds`'.

Every norm maps [..., n] to [..., n] over the last dimension, takes its statistics in fp32 (fp64 for fp64
input) and returns the input's dtype. Constructors set the initial values of vectors and scalars; matrices
are drawn by `init`. A scalar has shape [1], because ZeRO shards flat tensors. Where ranks share the n features, each
maps its own [..., n / ranks] and `Features.total` makes the statistics those of all n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexa.model.layers import Features

Part = Literal["attention", "feed_forward", "embedding", "final"]
"""The part of the model a norm belongs to: the sublayer it stands in or around, or an end of the stack."""

SCALENORM_MIN_LENGTH = 1e-5
DYT_ALPHA: dict[int, tuple[float, float]] = {
    1024: (1.0, 1.0),
    2048: (1.0, 0.5),
    4096: (0.8, 0.2),
    5120: (0.6, 0.15),
    8192: (0.2, 0.05),
}
"""Hidden size -> initial alpha of DyT in attention and everywhere else (arXiv 2503.10622: 4096, 5120 and 8192 as in
the code for LLaMA 7B, 13B, 34B and 70B, the others from its table over widths)."""


@dataclass(frozen=True)
class NormSite:
    """One norm of the model: everything that what it computes may depend on."""

    features: Features
    """The n features that are normalised, of which a process may have only some."""
    eps: float
    width: int
    """Hidden size of the model, which n is not inside a sublayer."""
    part: Part
    gate_rank: int = 16
    """Rank of GatedNorm."""
    gain: float = 1.0
    """Factor that the placement puts on the initial weight, whatever that is for the kind."""
    warmup_steps: int | None = None
    """Of norms with running statistics; None: the kind's own."""


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is wider: statistics in half precision lose digits."""
    return x if x.dtype == torch.float64 else x.float()


class FeatureNorm(nn.Module):
    """What norms with statistics over features share: the weight of PreAffine before them (arXiv 2601.22966)."""

    pre_weight: nn.Parameter | None

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features
        self.register_parameter("pre_weight", None)

    def add_pre_weight(self) -> None:
        """Multiply what the norm reads by a vector [n], 1 at first, that can take single features out of it."""
        self.pre_weight = self.features.vector(1.0)

    def entered(self, x: Tensor) -> Tensor:
        """What the statistics are taken of: [..., n] -> [..., n]."""
        return x if self.pre_weight is None else x * self.pre_weight


class RMSNorm(FeatureNorm):
    """y = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019)."""

    def __init__(self, features: Features, eps: float, gain: float = 1.0) -> None:
        super().__init__(features)
        self.eps = eps
        self.weight = features.vector(gain)

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        return cls(site.features, site.eps, site.gain)

    def mean_square(self, wide: Tensor) -> Tensor:
        """[..., n] -> [..., 1], what the root is taken of before eps."""
        return self.features.total(wide.square().sum(-1, keepdim=True)) / self.features.size

    def unit(self, x: Tensor) -> Tensor:
        """`x` with a mean square of one, before the weight: [..., n] in the dtype of `x`."""
        wide = at_least_fp32(x)
        return (wide * torch.rsqrt(self.mean_square(wide) + self.eps)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return self.unit(self.entered(x)) * self.weight


class FullWidthRMSNorm(RMSNorm):
    """RMSNorm over all heads together (OLMo 2): statistics over the last two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads, head_dim] -> the same, with one mean square per position."""
        return super().forward(x.flatten(-2)).view_as(x)


class CRMSNorm(RMSNorm):
    """RMSNorm of the n + 1 coordinates of which the last, minus the sum of the others, is not kept.

    y = weight * x / sqrt((sum(x^2) + sum(x)^2) / (n + 1) + eps): LayerNorm of a vector of mean zero (Jiang et al.
    2023, arXiv 2305.14858, section 3.2).
    """

    def mean_square(self, wide: Tensor) -> Tensor:
        """[..., n] -> [..., 1], over n + 1 coordinates."""
        sums = torch.cat((wide.square().sum(-1, keepdim=True), wide.sum(-1, keepdim=True)), -1)
        squares, plain = self.features.total(sums).split(1, -1)
        return (squares + plain.square()) / (self.features.size + 1)


class LayerNorm(FeatureNorm):
    """y = weight * (x - mean x) / sqrt(var x + eps) + bias (Ba et al. 2016)."""

    def __init__(self, features: Features, eps: float, gain: float = 1.0) -> None:
        super().__init__(features)
        self.eps = eps
        self.weight, self.bias = features.vector(gain), features.vector(0.0)

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        return cls(site.features, site.eps, site.gain)

    def _mean(self, wide: Tensor) -> Tensor:
        return self.features.total(wide.sum(-1, keepdim=True)) / self.features.size

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide = at_least_fp32(self.entered(x))
        centred = wide - self._mean(wide)
        unit = centred * torch.rsqrt(self._mean(centred.square()) + self.eps)
        return unit.to(x.dtype) * self.weight + self.bias


class ScaleNorm(FeatureNorm):
    """y = weight * x / max(|x|, 1e-5) with one weight, sqrt(n) at first (Nguyen and Salazar 2019)."""

    def __init__(self, features: Features, gain: float = 1.0) -> None:
        super().__init__(features)
        self.weight = nn.Parameter(torch.full((1,), gain * math.sqrt(features.size)))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`; its eps is not used."""
        return cls(site.features, site.gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide = at_least_fp32(self.entered(x))
        squared = self.features.total(wide.square().sum(-1, keepdim=True))
        # clamped before the root: the gradient of a root at 0 is infinite
        return (wide * torch.rsqrt(squared.clamp_min(SCALENORM_MIN_LENGTH**2))).to(x.dtype) * self.weight


def dyt_alpha(width: int, part: Part) -> float:
    """Initial alpha of DyT: the row of `DYT_ALPHA` whose hidden size is nearest to `width` in ratio."""
    nearest = min(DYT_ALPHA, key=lambda known: abs(math.log(known / width)))
    attention, other = DYT_ALPHA[nearest]
    return attention if part == "attention" else other


class DyT(nn.Module):
    """Dynamic tanh: y = weight * tanh(alpha x), no statistics and no bias (Zhu et al. 2025, arXiv 2503.10622)."""

    def __init__(self, features: Features, alpha: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = features.vector(gain)
        self.alpha = nn.Parameter(torch.full((1,), alpha))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`, whose part and model width choose alpha; its eps is not used."""
        return cls(site.features, dyt_alpha(site.width, site.part), site.gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return torch.tanh(self.alpha * x) * self.weight


class SeeDNorm(RMSNorm):
    """y = (tanh(x . beta) alpha + weight) * x / sqrt(mean(x^2) + eps): RMSNorm at first (arXiv 2510.22777)."""

    def __init__(self, features: Features, eps: float, gain: float = 1.0) -> None:
        super().__init__(features, eps, gain)
        self.alpha, self.beta = features.vector(1.0), features.vector(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        x = self.entered(x)
        wide = at_least_fp32(x)
        along = self.features.total((wide @ self.beta.to(wide.dtype)).unsqueeze(-1))
        dynamic = torch.tanh(along).to(x.dtype)
        return self.unit(x) * (dynamic * self.alpha + self.weight)


class GatedNorm(RMSNorm):
    """2 y * sigmoid(up silu(down y)) with y = RMSNorm(x): RMSNorm at first, when up is 0 (arXiv 2601.22966)."""

    def __init__(self, features: Features, eps: float, gain: float, rank: int) -> None:
        super().__init__(features, eps, gain)
        self.gate_down = nn.Linear(features.local, rank, bias=False)
        self.gate_up = nn.Linear(rank, features.local, bias=False)
        features.mark(self.gate_down.weight, 1, (rank, features.size))
        features.mark(self.gate_up.weight, 0, (features.size, rank))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        return cls(site.features, site.eps, site.gain, site.gate_rank)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        y = super().forward(x)
        low = self.features.total(self.gate_down(y))
        return 2 * y * torch.sigmoid(self.gate_up(F.silu(low)))
