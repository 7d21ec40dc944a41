"""Attention by batched products: against fp64, about as exact as PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model import attention, cpu_attention
from nexa.model.decoder import Decoder


def gradients_of(function, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


CASES = [
    (5, 8, 1.0, False),
    (128, 64, 3.0, False),
    (193, 40, 2.0, False),
    (193, 40, 2.0, True),
    (1100, 16, 1.0, False),
    (256, 64, 6.0, False),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("length", "head_dim", "spread", "compiled"), CASES)
def test_near_fp64(dtype: torch.dtype, length: int, head_dim: int, spread: float, compiled: bool) -> None:
    torch.manual_seed(0)
    drawn = [spread * torch.randn(2, length, 2, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3)]
    dy, scale = torch.randn(2, 2, length, head_dim), 1.7 / head_dim**0.5

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cpu_attention.causal_attention(q, k, v, scale, cpu_attention.ahead(length))

    def pytorchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * scale).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ v

    dy = dy.to(dtype)
    exact = gradients_of(by_hand, [each.double() for each in drawn], dy)
    found = gradients_of(torch.compile(own) if compiled else own, drawn, dy)
    usual = gradients_of(pytorchs, drawn, dy)
    floor = 6e-3 if dtype == torch.bfloat16 else 1e-6
    for mine, theirs, true in zip(found, usual, exact, strict=True):
        errors = [float((each.double() - true).norm() / true.norm()) for each in (mine, theirs)]
        assert errors[0] <= max(2.5 * errors[1], floor), errors


def test_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, bf16, fp32 = torch.device("cpu"), torch.bfloat16, torch.float32
    monkeypatch.setattr(cpu_attention, "cpu_units", lambda: {"avx512_f", "avx512_bf16"})
    assert cpu_attention.serves(bf16, cpu, 1024) and not cpu_attention.serves(bf16, cpu, 1025)
    assert cpu_attention.serves(fp32, cpu, 8) and not cpu_attention.serves(torch.float64, cpu, 8)
    assert not cpu_attention.serves(bf16, torch.device("cuda"), 8)
    monkeypatch.setattr(cpu_attention, "cpu_units", lambda: {"avx512_f"})
    assert cpu_attention.serves(fp32, cpu, 8) and not cpu_attention.serves(bf16, cpu, 8)


def test_auto_takes_it_and_sdpa_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, in bf16, on such a CPU, when compiled; loss and gradients are nearly the same."""
    calls: list[tuple[int, ...]] = []
    original = cpu_attention.causal_attention

    def seen(q: Tensor, *rest: object) -> Tensor:
        calls.append(tuple(q.shape))
        return original(q, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu_attention, "cpu_units", lambda: {"avx512_bf16"})
    monkeypatch.setattr(attention.cpu_attention, "causal_attention", seen)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for kind in ("auto", "sdpa"):
        torch.manual_seed(1)
        config = ModelConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention=kind,
        )
        model = Decoder(config, NormConfig())
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.2
        model.bfloat16()
        for layer in model.model.layers:
            layer.self_attn.choose_kernel()
        loss = model(ids, ids)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]))
        assert calls == [(2, 4, 9, 8)] * 2
        with torch.no_grad():
            model(ids, ids)
        assert len(calls) == 2, "without gradients there is nothing to win"
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.02
