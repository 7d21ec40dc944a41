"""What a norm computes. Where it stands is `placement`'s business.

Every norm maps [..., n] to [..., n] over the last dimension, takes its statistics in fp32 (fp64 for fp64
input) and returns the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is wider: statistics in half precision lose digits."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = at_least_fp32(x)
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight


class FullWidthRMSNorm(RMSNorm):
    """RMSNorm over all heads together (OLMo 2): statistics over the last two dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads, head_dim] -> the same, with one mean square per position."""
        return super().forward(x.flatten(-2)).view_as(x)


class LayerNorm(nn.Module):
    """y = weight * (x - mean x) / sqrt(var x + eps) + bias (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        wide = at_least_fp32(x)
        centred = wide - wide.mean(-1, keepdim=True)
        unit = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight + self.bias


KINDS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def build_norm(kind: str, size: int, eps: float) -> nn.Module:
    """A norm over `size` features; KeyError for an unknown kind (the config check comes first)."""
    return KINDS[kind](size, eps)
