"""Linear layers whose products are taken another way on CPUs where that was found to be faster.

`Turned`, for bf16 matrix units (AMX): the gradient of a weight, dW = g^T x, has a left factor that lies the wrong way
round in memory, and oneDNN makes such a product at half the speed of others (torch 2.13). dW^T = x^T g, with x^T
written out, and dW turned back are faster together where a compiler writes them, the more so where two layers read the
same input. `OneDnn`, for fp32 on AMD: PyTorch takes MKL, which is slower there for all but the weight's gradient.
For figures see docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexa.hardware import cpu_name, cpu_units


class Linear(nn.Linear):
    """PyTorch's, which can take its products another way."""

    ways: Mapping[torch.dtype, type[torch.autograd.Function]] = {}
    """By the dtype of the input; for training on a CPU, without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        way = self.ways.get(x.dtype)
        if way is None or self.bias is not None or x.device.type != "cpu" or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        y: Tensor = way.apply(x, self.weight)
        return y


class Turned(torch.autograd.Function):
    """x weight^T, with the gradient of the weight from an input that is turned first."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: Tensor) -> Tensor:
        """(x [..., in], weight [out, in]) -> [..., out]."""
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


@torch.library.custom_op("nexa::onednn_linear", mutates_args=())
def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] weight^T [in, out], which PyTorch would give to MKL in fp32."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


@_onednn.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class OneDnn(torch.autograd.Function):
    """x weight^T by oneDNN, and the gradient of x; MKL is as fast for that of the weight."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: Tensor) -> Tensor:
        """(x [..., in], weight [out, in]) -> [..., out]."""
        x, weight = args
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = grads[0]
        return _onednn(gradient, weight.t()), gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def ways(*, wide: bool) -> dict[torch.dtype, type[torch.autograd.Function]]:
    """What pays on this machine in a compiled block. wide: for the matrices of a feed-forward, which are not square."""
    found: dict[torch.dtype, type[torch.autograd.Function]] = {}
    if wide and "amx_bf16" in cpu_units():
        found[torch.bfloat16] = Turned
    if cpu_name().startswith("AMD") and "avx512_f" in cpu_units() and torch.backends.mkldnn.is_available():
        found[torch.float32] = OneDnn
    return found


def choose(*layers: nn.Module | None, wide: bool) -> None:
    """Let those that can take the ways that pay here."""
    for layer in layers:
        if isinstance(layer, Linear):
            layer.ways = ways(wide=wide)
