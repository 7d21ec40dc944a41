"""The engine where there is one data-parallel rank: nothing to shard, so nothing of ZeRO's to pay for.

It has the methods of DeepSpeed's engine that nexa calls. In bf16 the optimizer steps fp32 master weights, one flat
tensor for each of its groups, as under ZeRO 1; a gradient is added to its fp32 place as soon as the backward pass has
made it, while it is still in a cache, and its bf16 form is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Master:
    """The fp32 weights and gradients of a group of parameters, in their order."""

    parameters: list[nn.Parameter]
    flat: Tensor
    """What the optimizer steps; its `grad` is as long and always there."""
    weights: list[Tensor]
    """Of each parameter, a view of `flat`."""
    gradients: list[Tensor]
    """Of each parameter, a view of the gradient."""

    @classmethod
    def of(cls, parameters: list[nn.Parameter]) -> Master:
        """Copies of what the parameters are."""
        flat = torch.cat([parameter.detach().reshape(-1).float() for parameter in parameters])
        flat.grad = torch.zeros_like(flat)
        sizes = [parameter.numel() for parameter in parameters]
        pieces = [
            [part.view_as(parameter) for part, parameter in zip(each.split(sizes), parameters, strict=True)]
            for each in (flat, flat.grad)
        ]
        return cls(parameters, flat, *pieces)


class OneRank:
    """A model and its optimizer in one data-parallel rank, in fp32 or bf16."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int) -> None:
        """accumulation: micro-batches of a step, over which gradients are averaged."""
        self.module, self.optimizer, self._accumulation = module, optimizer, accumulation
        self.masters: list[Master] = []
        """By the optimizer's group; none in fp32, where it steps the parameters themselves."""
        self._seen: set[nn.Parameter] = set()
        if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
            return
        for group in optimizer.param_groups:
            master = Master.of(group["params"])
            group["params"] = [master.flat]
            self.masters.append(master)
            for parameter, place in zip(master.parameters, master.gradients, strict=True):
                parameter.register_post_accumulate_grad_hook(self._collector(place))

    def _collector(self, place: Tensor) -> Any:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None and isinstance(parameter, nn.Parameter)
            if parameter in self._seen:
                place.add_(parameter.grad)
            else:
                place.copy_(parameter.grad)
                self._seen.add(parameter)
            parameter.grad = None

        return collect

    def __call__(self, **batch: Any) -> Any:
        """The model's output."""
        return self.module(**batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        (loss / self._accumulation).backward()

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What the optimizer will be shown: each parameter and its gradient."""
        if not self.masters:
            return [(p, p.grad) for p in self.module.parameters() if p.grad is not None]
        self._fill()
        return [pair for one in self.masters for pair in zip(one.parameters, one.gradients, strict=True)]

    def in_few_pieces(self) -> list[Tensor]:
        """The same gradients, in as few tensors as there are."""
        if not self.masters:
            return [gradient for _, gradient in self.gradients()]
        self._fill()
        return [master.flat.grad for master in self.masters if master.flat.grad is not None]

    def divide(self, divisor: Tensor, at_once: bool) -> None:
        """Divide the gradients by a scalar, before anybody but the optimizer looks at them if it is to be at once.

        Else PyTorch's fused AdamW does the same on its way through them: a reading and a writing of all of them less.
        """
        if isinstance(self.optimizer, torch.optim.AdamW) and not at_once:
            self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        else:
            torch._foreach_div_(self.in_few_pieces(), divisor)

    def _fill(self) -> None:
        """Where no loss depends on a parameter its gradient is 0."""
        for master in self.masters:
            for parameter, place in zip(master.parameters, master.gradients, strict=True):
                if parameter not in self._seen:
                    place.zero_()
                    self._seen.add(parameter)

    @torch.no_grad()
    def step(self, update: bool = True) -> None:
        """Update the weights, or only forget the gradients."""
        if update:
            self.optimizer.step()
            self.publish()
        vars(self.optimizer).pop("grad_scale", None)
        self._seen.clear()
        for parameter in self.module.parameters():
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights to those that the forward pass reads."""
        for master in self.masters:
            torch._foreach_copy_(tuple(master.parameters), master.weights)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whoever calls `step` counts the micro-batches."""
        return True

    def zero_optimization_stage(self) -> int:
        """No ZeRO."""
        return 0

    def destroy(self) -> None:
        """Drop what refers to the parameters."""
        self.masters.clear()
        self._seen.clear()
