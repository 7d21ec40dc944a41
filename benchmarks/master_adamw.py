"""The optimizer that the contestants of benchmarks/step.py have in common; needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LR, BETAS, EPS, CLIP = 3e-4, (0.9, 0.95), 1e-8, 1.0


class MasterAdamW:
    """Fused AdamW with clipping, on fp32 copies of bf16 parameters, or on fp32 ones themselves; all loops but the
    engine's share it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.copied = parameters[0].dtype != torch.float32
        self.masters = [p.detach().float().requires_grad_() for p in parameters] if self.copied else parameters
        for master in self.masters:
            master.grad = torch.zeros_like(master) if self.copied else None
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update, publish, and drop the gradients."""
        gradients = [m.grad for m in self.masters if m.grad is not None]
        if self.copied:
            torch._foreach_copy_(gradients, [p.grad for p in self.parameters])
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        if self.copied:
            torch._foreach_copy_(self.parameters, self.masters)
        for parameter in self.parameters:
            parameter.grad = None


def training_step(
    loss_of: Callable[[Tensor, Tensor], Tensor], optimizer: MasterAdamW
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step on ids and labels [rows, length], which gives the loss. loss_of: the mean loss of them."""

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(ids, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
