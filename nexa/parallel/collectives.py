"""Communication between tensor-parallel ranks as differentiable functions: nexa's own, on any device and back end.

Each is named for its forward pass and carries the communication of its backward pass (Shoeybi et al. 2019, section 3;
Korthikanti et al. 2022, section 4.2). Tokens are the first dimension, so that no transposition is needed. Results are
new tensors: activation checkpointing keeps inputs, which must stay as they are.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Group = dist.ProcessGroup


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Sum of the ranks' `x`, on every rank."""
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """The ranks' [tokens / n, ...] end to end: [tokens, ...]."""
    result = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(result, x.contiguous(), group=group)
    return result


def scatter_token_sums(x: Tensor, group: Group) -> Tensor:
    """This rank's share [tokens / n, ...] of the sum of the ranks' [tokens, ...]."""
    result = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(result, x.contiguous(), group=group)
    return result


class _Enter(torch.autograd.Function):
    """Nothing forward; every rank used all of x for its own features, so its gradient is the sum."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradient, ctx.group), None  # type: ignore[attr-defined]


class _Leave(torch.autograd.Function):
    """Sum forward; all ranks then compute the same with it, so its gradient is already whole."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Total(torch.autograd.Function):
    """Sum forward; each rank then does something else with it, so its gradient is a sum too."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return sum_over(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradient, ctx.group), None  # type: ignore[attr-defined]


class _EnterTokens(torch.autograd.Function):
    """`_Enter` of a stream whose tokens are shared out."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return gather_tokens(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return scatter_token_sums(gradient, ctx.group), None  # type: ignore[attr-defined]


class _LeaveTokens(torch.autograd.Function):
    """`_Leave` to a stream whose tokens are shared out."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return scatter_token_sums(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(gradient, ctx.group), None  # type: ignore[attr-defined]


def enter(x: Tensor, group: Group) -> Tensor:
    """Replicated x -> the same; gradients are summed over `group`."""
    return _apply(_Enter, x, group)


def leave(x: Tensor, group: Group) -> Tensor:
    """Partial sums -> their sum, replicated."""
    return _apply(_Leave, x, group)


def total(x: Tensor, group: Group) -> Tensor:
    """A statistic of each rank's features -> that of all of them; summed backward too."""
    return _apply(_Total, x, group)


def enter_tokens(x: Tensor, group: Group) -> Tensor:
    """This rank's tokens [tokens / n, d] -> all [tokens, d]; gradients are summed and shared out."""
    return _apply(_EnterTokens, x, group)


def leave_tokens(x: Tensor, group: Group) -> Tensor:
    """Partial sums of all tokens [..., d] -> the sums of this rank's [tokens / n, d]."""
    return _apply(_LeaveTokens, x.flatten(0, -2), group)


def _apply(function: type[torch.autograd.Function], x: Tensor, group: Group) -> Tensor:
    result = function.apply(x, group)
    assert isinstance(result, Tensor)
    return result
