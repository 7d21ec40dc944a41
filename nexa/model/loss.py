"""Cross-entropy of a linear head in chunks of tokens: the full logits never exist."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(logits [N, V], labels [N], weights [N]) -> (sum of weights * losses, losses [N], gradient of the sum), as
`nll_and_gradient`."""


def nll_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of -log p(label), this of each token, and the gradient of the sum by the logits.

    logits [N, V] in any dtype, labels [N] int64 with IGNORED where nothing is scored: there losses and gradient are
    0. Losses and weights [N] are fp32 (fp64 for fp64 logits); the gradient has the logits' dtype.
    """
    scored = labels != IGNORED
    target = labels.clamp_min(0)[:, None]
    log_p = logits.log_softmax(-1, dtype=_wide(logits))
    losses = -log_p.gather(-1, target)[:, 0] * scored
    # in place: passes over N x V fp32 numbers are what this function costs
    gradient = log_p.exp_().scatter_add_(-1, target, log_p.new_full(target.shape, -1.0))
    return torch.dot(losses, weights), losses, gradient.mul_((weights * scored)[:, None]).to(logits.dtype)


def fusible_nll_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`nll_and_gradient` without scatter, which torch.compile turns into three reads of the logits and one write.

    The sum belongs to the kernel: without it, torch 2.13 for CPUs reads all rows for their maxima before it reads them
    again, from memory, which takes a quarter more.
    """
    wide = logits.to(_wide(logits))
    scored = labels != IGNORED
    target = labels.clamp_min(0)[:, None]
    log_partition = wide.logsumexp(-1, keepdim=True)
    losses = (log_partition - wide.gather(-1, target))[:, 0] * scored
    hit = torch.arange(logits.shape[-1], device=logits.device) == target
    gradient = ((wide - log_partition).exp() - hit.to(wide.dtype)) * (weights * scored)[:, None]
    return (losses * weights).sum(), losses, gradient.to(logits.dtype)


@functools.cache
def compiled_kernel() -> Kernel:
    """The compiled one, made once; compilation itself waits for the first call."""
    kernel: Kernel = torch.compile(fusible_nll_and_gradient)
    return kernel


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: object) -> tuple[Tensor, Tensor]:
        """(hidden [N, d], weight [V, d], labels [N], chunk, kernel, bias [V] or None, weights [N]) -> (the weighted sum
        of the losses, scalar; losses [N], not differentiable)."""
        hidden, weight, labels, chunk, kernel, bias, weights = args
        assert isinstance(hidden, Tensor) and isinstance(weight, Tensor) and isinstance(weights, Tensor)
        assert isinstance(labels, Tensor) and isinstance(chunk, int) and callable(kernel)
        assert bias is None or isinstance(bias, Tensor)
        wide = _wide(hidden)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad: Tensor | None = None
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for start in range(0, hidden.shape[0], chunk):
            window = slice(start, start + chunk)
            part = hidden[window]
            part_sum, losses[window], gradient = kernel(F.linear(part, weight, bias), labels[window], weights[window])
            total += part_sum
            hidden_grad[window] = gradient @ weight
            product = gradient.t() @ part
            if weight_grad is None:
                # one chunk needs no wider accumulator: the product is already rounded to the weight's dtype
                weight_grad = product if hidden.shape[0] <= chunk else product.to(wide)
            else:
                weight_grad += product
            if bias_grad is not None:
                bias_grad += gradient.sum(0, dtype=wide)
        assert weight_grad is not None
        ctx.save_for_backward(hidden_grad, weight_grad, *([] if bias_grad is None else [bias_grad]))
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients by the gradient of the sum."""
        hidden_grad, *by_matrix = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, _ = grads
        dtype = hidden_grad.dtype
        weight_grad, bias_grad = ([(each * scale).to(dtype) for each in by_matrix] + [None])[:2]
        return hidden_grad * scale.to(dtype), weight_grad, None, None, None, bias_grad, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    kernel: Kernel = nll_and_gradient,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(Weighted sum over tokens of the cross-entropy of softmax(hidden @ weight^T + bias), a scalar; the cross-entropy
    of each token [N], 0 where not scored, which is not differentiated).

    hidden [N, d], weight [V, d], labels [N] (IGNORED: not scored), bias [V], weights [N] of tokens, null is 1. At most
    `chunk` x V logits exist at once; `kernel` makes their gradient. Divide by the number of scored tokens of the whole
    global batch for the mean.
    """
    wide = _wide(hidden)
    # ones instead of a branch: the kernel multiplies by a factor per token anyway, for tokens that are not scored
    weights = torch.ones(hidden.shape[0], dtype=wide, device=hidden.device) if weights is None else weights.to(wide)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, losses = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, kernel, bias, weights)
        return total, losses
    parts = (slice(start, start + chunk) for start in range(0, hidden.shape[0], chunk))
    losses = torch.cat([kernel(F.linear(hidden[each], weight, bias), labels[each], weights[each])[1] for each in parts])
    return torch.dot(losses, weights), losses
