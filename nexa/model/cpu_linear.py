"""Linear layers for processors with bf16 matrix units (AMX): the weight's gradient from an input that is turned first.

dW = g^T x has a left factor that lies the wrong way round in memory: oneDNN makes such a product at half the speed of
others (torch 2.13). dW^T = x^T g, with x^T written out, and dW turned back are faster together where a compiler writes
them, the more so where two layers read the same input: see docs/benchmarks.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """PyTorch's, which can make the gradient of its weight another way."""

    turned = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not (self.turned and self.bias is None and torch.is_grad_enabled() and serves(x)):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _TurnedLinear.apply(x, self.weight)
        return y


def serves(x: Tensor) -> bool:
    """Whether this is what the other way is for."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


class _TurnedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: Tensor) -> Tensor:
        """(x, weight) -> x weight^T."""
        x, weight = args
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = grads[0]
        turned = x.flatten(0, -2).t().contiguous() @ gradient.flatten(0, -2)
        return gradient @ weight, turned.t().contiguous()
