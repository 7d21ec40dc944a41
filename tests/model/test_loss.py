"""The chunked cross-entropy against PyTorch's, value and gradients, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nexa.model.loss import (
    IGNORED,
    compiled_kernel,
    fusible_nll_and_gradient,
    linear_cross_entropy,
    nll_and_gradient,
)


def inputs(dtype=torch.float64, tokens=37, width=12, vocab=29):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 8, 37, 100])
def test_value_and_gradients(chunk: int) -> None:
    hidden, weight, labels = inputs()
    loss, _ = linear_cross_entropy(hidden, weight, labels, chunk)
    (loss * 0.7).backward()
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    expected = F.cross_entropy(h @ w.T, labels, ignore_index=IGNORED, reduction="sum")
    (expected * 0.7).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, h.grad)
    torch.testing.assert_close(weight.grad, w.grad)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, chunk)[0], expected)


@pytest.mark.parametrize("chunk", [8, 100])
def test_with_a_bias(chunk: int) -> None:
    hidden, weight, labels = inputs()
    bias = torch.randn(29, dtype=torch.float64, requires_grad=True)
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(leaves[0], leaves[1], leaves[2])
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    loss, _ = linear_cross_entropy(hidden, weight, labels, chunk, bias=bias)
    (loss * 0.7).backward()
    (expected * 0.7).backward()
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip((hidden, weight, bias), leaves, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, chunk, bias=bias)[0], expected)


@pytest.mark.parametrize("chunk", [8, 100])
def test_weighted_tokens(chunk: int) -> None:
    """The weights are in the total and its gradients, not in what is said of each token."""
    hidden, weight, labels = inputs()
    weights = torch.rand(37, dtype=torch.float64)
    bias = torch.randn(29, dtype=torch.float64, requires_grad=True)
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    each = F.cross_entropy(F.linear(*leaves), labels, ignore_index=IGNORED, reduction="none")
    total, losses = linear_cross_entropy(hidden, weight, labels, chunk, bias=bias, weights=weights)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, each.detach())
    torch.testing.assert_close(total, (each * weights).sum())
    (total * 0.7).backward()
    ((each * weights).sum() * 0.7).backward()
    for found, wanted in zip((hidden, weight, bias), leaves, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels = inputs()
    labels[:] = IGNORED
    loss, _ = linear_cross_entropy(hidden, weight, labels, 8)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_bf16_statistics_are_fp32() -> None:
    hidden, weight, labels = inputs(torch.bfloat16, tokens=64, width=64, vocab=512)
    loss, _ = linear_cross_entropy(hidden, weight, labels, 16)
    assert loss.dtype == torch.float32
    logits = (hidden.detach() @ weight.detach().T).float()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-3)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_backward_keeps_no_logits() -> None:
    """What autograd holds between forward and backward is as large as the gradients, not as the logits."""
    hidden, weight, labels = inputs(torch.float32, tokens=512, width=4, vocab=1000)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels, 64)
    assert sum(saved) == hidden.numel() + weight.numel() < 512 * 1000 / 10


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fusible_kernel_computes_the_same(compiled: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = (3 * torch.randn(21, 50)).to(dtype), torch.randint(0, 50, (21,))
    labels[[0, 7, 20]] = IGNORED
    kernel = compiled_kernel() if compiled else fusible_nll_and_gradient
    weights = torch.rand(21, dtype=torch.promote_types(dtype, torch.float32))
    (total, losses, gradient), (_, other_losses, other) = (
        each(logits, labels, weights) for each in (kernel, nll_and_gradient)
    )
    assert gradient.dtype == other.dtype == dtype
    torch.testing.assert_close(total, (other_losses * weights).sum())
    torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-6)
    # one rounding to the logits' dtype may fall on either side
    torch.testing.assert_close(
        gradient.double(), other.double(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-12, atol=1e-9
    )
    assert (gradient[[0, 7, 20]] == 0).all()
