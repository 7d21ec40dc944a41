"""Communication between tensor-parallel ranks as differentiable functions: nexa's own, on any device and back end.

Each is named for its forward pass and carries the communication of its backward pass (Shoeybi et al. 2019, section 3;
Korthikanti et al. 2022, section 4.2). Tokens are the first dimension, so that no transposition is needed. Results are
new tensors: activation checkpointing keeps inputs, which must stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Group = dist.ProcessGroup
Step = Callable[[Tensor, Group], Tensor]


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Sum of the ranks' `x`, on every rank."""
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def mean_over(x: Tensor, group: Group) -> Tensor:
    """Mean of the ranks' `x`, on every rank; not differentiable."""
    return sum_over(x, group) / group.size()


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


def unchanged(x: Tensor, group: Group) -> Tensor:
    """No communication."""
    return x.view_as(x)


class _Communication(torch.autograd.Function):
    """One of the functions above forward, and another one backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, there: Step, back: Step, group: Group) -> Tensor:
        ctx.back, ctx.group = back, group  # type: ignore[attr-defined]
        return there(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.group), None, None, None  # type: ignore[attr-defined]


def _communicate(x: Tensor, there: Step, back: Step, group: Group) -> Tensor:
    result = _Communication.apply(x, there, back, group)
    assert isinstance(result, Tensor)
    return result


def enter(x: Tensor, group: Group) -> Tensor:
    """Replicated x -> the same. Every rank uses all of it for its own features, so its gradient is a sum."""
    return _communicate(x, unchanged, sum_over, group)


def leave(x: Tensor, group: Group) -> Tensor:
    """Partial sums -> their sum, replicated. All ranks then compute the same, so its gradient is already whole."""
    return _communicate(x, sum_over, unchanged, group)


def total(x: Tensor, group: Group) -> Tensor:
    """A statistic of each rank's features -> that of all, with which each does something else: sums both ways."""
    return _communicate(x, sum_over, sum_over, group)


def enter_tokens(x: Tensor, group: Group) -> Tensor:
    """`enter` for a stream whose tokens are dealt out: this rank's [tokens / n, d] -> all [tokens, d]."""
    return _communicate(x, gather_tokens, scatter_token_sums, group)


def leave_tokens(x: Tensor, group: Group) -> Tensor:
    """`leave` to such a stream: partial sums of all tokens [..., d] -> the sums of this rank's [tokens / n, d]."""
    return _communicate(x.flatten(0, -2), scatter_token_sums, gather_tokens, group)
