"""What each kind of norm of a nexa model computes: [..., n] to [..., n] over the last dimension.

Part of an exported model folder; needs torch and nothing else. Weights come from the checkpoint: the initial ones here
are not the methods'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide_of(x: Tensor) -> Tensor:
    """In fp32, or as it is when it is fp64: what statistics are taken in."""
    return x if x.dtype == torch.float64 else x.float()


class FeatureNorm(nn.Module):
    """A norm with statistics over features; `nexa_norm.pre_affine` puts a weight on what it reads."""

    pre_weight: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("pre_weight", None)

    def entered(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return x if self.pre_weight is None else x * self.pre_weight


class RMSNorm(FeatureNorm):
    """weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def mean_square(self, wide: Tensor) -> Tensor:
        """[..., n] -> [..., 1]."""
        return wide.square().mean(-1, keepdim=True)

    def unit(self, x: Tensor) -> Tensor:
        """Before the weight."""
        wide = wide_of(x)
        return (wide * torch.rsqrt(self.mean_square(wide) + self.eps)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return self.unit(self.entered(x)) * self.weight


class CRMSNorm(RMSNorm):
    """RMSNorm of n + 1 coordinates with sum zero, of which the last is not kept (arXiv 2305.14858)."""

    def mean_square(self, wide: Tensor) -> Tensor:
        """[..., n] -> [..., 1], over n + 1 coordinates."""
        total = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        return total / (wide.shape[-1] + 1)


class LayerNorm(FeatureNorm):
    """weight * (x - mean x) / sqrt(var x + eps) + bias."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide = wide_of(self.entered(x))
        centred = wide - wide.mean(-1, keepdim=True)
        unit = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight + self.bias


class ScaleNorm(FeatureNorm):
    """weight * x / max(|x|, 1e-5), one weight (arXiv 1910.05895)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide = wide_of(self.entered(x))
        length = wide.square().sum(-1, keepdim=True).clamp_min(1e-10)
        return (wide * torch.rsqrt(length)).to(x.dtype) * self.weight


class DyT(nn.Module):
    """weight * tanh(alpha x) (arXiv 2503.10622)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight, self.alpha = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return torch.tanh(self.alpha * x) * self.weight


class SeeDNorm(RMSNorm):
    """(tanh(x . beta) alpha + weight) * x / sqrt(mean(x^2) + eps) (arXiv 2510.22777)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__(size, eps)
        self.alpha, self.beta = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        x = self.entered(x)
        wide = wide_of(x)
        dynamic = torch.tanh(wide @ self.beta.to(wide.dtype)).unsqueeze(-1).to(x.dtype)
        return self.unit(x) * (dynamic * self.alpha + self.weight)


class GatedNorm(RMSNorm):
    """2 y * sigmoid(up silu(down y)) with y = RMSNorm(x) (arXiv 2601.22966)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__(size, eps)
        self.gate_down = nn.Linear(size, rank, bias=False)
        self.gate_up = nn.Linear(rank, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        y = super().forward(x)
        return 2 * y * torch.sigmoid(self.gate_up(F.silu(self.gate_down(y))))


class ELN(nn.Module):
    """weight * x / sqrt(x^2 + c^2 + eps) + bias, element by element (arXiv 2503.21708)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.c, self.eps = nn.Parameter(torch.ones(1)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide, c = wide_of(x), wide_of(self.c)
        return (wide * torch.rsqrt(wide.square() + (c.square() + self.eps))).to(x.dtype) * self.weight + self.bias


class BHyT(nn.Module):
    """weight * tanh(lambda x / (10 sqrt(variance + eps))), variance: of x or as given (arXiv 2601.09719)."""

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps
        self.register_parameter("lambda", nn.Parameter(torch.ones(1)))

    def bound(self) -> Tensor:
        """lambda / kappa."""
        return wide_of(getattr(self, "lambda")) / 10.0

    def forward(self, x: Tensor, variance: Tensor | None = None) -> Tensor:
        """[..., n] -> [..., n]; variance [..., 1]."""
        wide = wide_of(x)
        variance = wide.square().mean(-1, keepdim=True) if variance is None else variance
        return torch.tanh(wide * (self.bound() * torch.rsqrt(variance + self.eps))).to(x.dtype) * self.weight


class UnifiedNorm(nn.Module):
    """weight * x / sqrt(running_square + eps) + bias, constants but for x (arXiv 2208.01313).

    The other buffers are what a training run goes on from; here they are only kept.
    """

    windows: tuple[str, ...] = ("recent_squares", "recent_gradients")

    def __init__(self, size: int, eps: float, rank: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.running_square: Tensor
        shapes = {"updates": (1,), "running_square": (size,), "running_gradient": (size,)}
        for name, shape in (shapes | dict.fromkeys(self.windows, (4, size))).items():
            self.register_buffer(name, torch.full(shape, float(name == "running_square"), dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Buffers stay fp32 when the model is made half precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, new in self._buffers.items():
            old = before[name]
            if new is not None and old is not None and new.dtype in {torch.bfloat16, torch.float16}:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        return self.scaled(wide_of(x)).to(x.dtype) * self.weight + self.bias

    def scaled(self, wide: Tensor) -> Tensor:
        """Before the weight."""
        return wide * torch.rsqrt(wide_of(self.running_square) + self.eps)


class PowerNorm(UnifiedNorm):
    """The same of x / rms(x) (arXiv 2003.07845)."""

    windows = ()

    def scaled(self, wide: Tensor) -> Tensor:
        """Before the weight."""
        return super().scaled(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))


KINDS: dict[str, Any] = {
    "rmsnorm": RMSNorm,
    "layernorm": LayerNorm,
    "crmsnorm": CRMSNorm,
    "scalenorm": ScaleNorm,
    "dyt": DyT,
    "seednorm": SeeDNorm,
    "gatednorm": GatedNorm,
    "eln": ELN,
    "bhyt": BHyT,
    "powernorm": PowerNorm,
    "unifiednorm": UnifiedNorm,
}
"""Values of `nexa_norm.kind`."""
