"""What a norm computes. Where it stands is `placement`'s business, which one a name means is `kinds`'.

Every norm maps [..., n] to [..., n] over the last dimension, takes its statistics in fp32 (fp64 for fp64
input) and returns the input's dtype. Constructors set the initial values of vectors and scalars; matrices
are drawn by `init`. A scalar has shape [1], because ZeRO shards flat tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    size: int
    """Features n that are normalised."""
    eps: float
    width: int
    """Hidden size of the model, which `size` is not inside a sublayer."""
    part: Part
    gate_rank: int = 16
    """Rank of GatedNorm."""
    gain: float = 1.0
    """Factor that the placement puts on the initial weight, whatever that is for the kind."""


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is wider: statistics in half precision lose digits."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.eps = eps

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        return cls(site.size, site.eps, site.gain)

    def mean_square(self, wide: Tensor) -> Tensor:
        """[..., size] -> [..., 1], what the root is taken of before eps."""
        return wide.square().mean(-1, keepdim=True)

    def unit(self, x: Tensor) -> Tensor:
        """`x` with a mean square of one, before the weight: [..., size] in the dtype of `x`."""
        wide = at_least_fp32(x)
        return (wide * torch.rsqrt(self.mean_square(wide) + self.eps)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return self.unit(x) * self.weight


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
        """[..., size] -> [..., 1], over size + 1 coordinates."""
        total = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        return total / (wide.shape[-1] + 1)


class LayerNorm(nn.Module):
    """y = weight * (x - mean x) / sqrt(var x + eps) + bias (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        return cls(site.size, site.eps, site.gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = at_least_fp32(x)
        centred = wide - wide.mean(-1, keepdim=True)
        unit = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight + self.bias


class ScaleNorm(nn.Module):
    """y = weight * x / max(|x|, 1e-5) with one weight, sqrt(n) at first (Nguyen and Salazar 2019)."""

    def __init__(self, size: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), gain * math.sqrt(size)))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`; its eps is not used."""
        return cls(site.size, site.gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = at_least_fp32(x)
        squared = wide.square().sum(-1, keepdim=True)
        # clamped before the root: the gradient of a root at 0 is infinite
        return (wide * torch.rsqrt(squared.clamp_min(SCALENORM_MIN_LENGTH**2))).to(x.dtype) * self.weight


def dyt_alpha(width: int, part: Part) -> float:
    """Initial alpha of DyT: the row of `DYT_ALPHA` whose hidden size is nearest to `width` in ratio."""
    nearest = min(DYT_ALPHA, key=lambda known: abs(math.log(known / width)))
    attention, other = DYT_ALPHA[nearest]
    return attention if part == "attention" else other


class DyT(nn.Module):
    """Dynamic tanh: y = weight * tanh(alpha x), no statistics and no bias (Zhu et al. 2025, arXiv 2503.10622)."""

    def __init__(self, size: int, alpha: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.alpha = nn.Parameter(torch.full((1,), alpha))

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`, whose part and model width choose alpha; its eps is not used."""
        return cls(site.size, dyt_alpha(site.width, site.part), site.gain)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return torch.tanh(self.alpha * x) * self.weight


class SeeDNorm(RMSNorm):
    """y = (tanh(x . beta) alpha + weight) * x / sqrt(mean(x^2) + eps): RMSNorm at first (arXiv 2510.22777)."""

    def __init__(self, size: int, eps: float, gain: float = 1.0) -> None:
        super().__init__(size, eps, gain)
        self.alpha = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = at_least_fp32(x)
        dynamic = torch.tanh(wide @ self.beta.to(wide.dtype)).unsqueeze(-1).to(x.dtype)
        return self.unit(x) * (dynamic * self.alpha + self.weight)


class GatedNorm(RMSNorm):
    """2 y * sigmoid(up silu(down y)) with y = RMSNorm(x): RMSNorm at first, when up is 0 (arXiv 2601.22966)."""

    def __init__(self, size: int, eps: float, gain: float, rank: int) -> None:
        super().__init__(size, eps, gain)
        self.gate_down = nn.Linear(size, rank, bias=False)
        self.gate_up = nn.Linear(rank, size, bias=False)

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        return cls(site.size, site.eps, site.gain, site.gate_rank)

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        y = super().forward(x)
        return 2 * y * torch.sigmoid(self.gate_up(F.silu(self.gate_down(y))))
