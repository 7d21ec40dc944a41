"""Rotary position embedding in Hugging Face's half-split order (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [..., T, head_dim] of `dtype` (fp32, or fp64 for an fp64 model), for `positions` [..., T].

    Made anew for each forward pass (T x head_dim is nothing beside a layer): a stored buffer would be
    rounded when the model is cast to bf16, and angles at position 1000 would be off by radians.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angle = positions.to(dtype)[..., None] * theta**-exponent
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [B, T, heads, head_dim] by the tables [T, head_dim] or [B, T, head_dim]; dtype of `x` kept."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[..., None, :] + turned * sin[..., None, :]).to(x.dtype)
