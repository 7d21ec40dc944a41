"""Norms of every parameter's gradient, weight and update, in any layout: what a diagnosis of training starts from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nexa.parallel import private
from nexa.parallel.topology import Topology
from nexa.sharding import shard_of


class ParameterNorms(NamedTuple):
    """Euclidean norms over a whole parameter (or over several)."""

    gradient: float
    """Of the gradient of the mean loss, before clipping."""
    weight: float
    """Before the update."""
    update: float
    """Of the change that the optimizer made."""


class NormProbe:
    """Measures one optimizer step. Costs a copy of the master weights of one group at a time, and one reduction."""

    def __init__(self, engine: Any, stage: int, topology: Topology) -> None:
        """engine: DeepSpeed's. Hooks its optimizer until `finish`."""
        self._stage, self._topology = stage, topology
        self._ranges: dict[int, list[private.OwnedRange]] = {}
        self._names: dict[str, int] = {name: i for i, (name, _) in enumerate(engine.module.named_parameters())}
        for owned in private.owned_ranges(engine):
            self._ranges.setdefault(id(owned.holder), []).append(owned)
        self._squares = torch.zeros(3, len(self._names), dtype=torch.float64, device=topology.device)
        self._before: dict[int, Tensor] = {}
        optimizer = private.client_optimizer(engine)
        self._hooks = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]

    @torch.no_grad()
    def _pre(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for holder in _stepped(optimizer):
            assert holder.grad is not None
            self._before[id(holder)] = holder.detach().clone()
            self._add(0, holder, holder.grad)
            self._add(1, holder, holder)

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for holder in _stepped(optimizer):
            self._add(2, holder, holder - self._before.pop(id(holder)))

    def _add(self, row: int, holder: Tensor, values: Tensor) -> None:
        flat = values.reshape(-1)
        for owned in self._ranges.get(id(holder), ()):
            whole = shard_of(owned.parameter).is_whole
            if whole and self._topology.tensor_rank > 0:
                continue  # the first tensor rank counts what all of them have
            part = flat[owned.offset : owned.offset + owned.stop - owned.start]
            self._squares[row, self._names[owned.name]] += part.double().square().sum()

    def finish(self, clip_factor: Tensor | float) -> dict[str, ParameterNorms]:
        """The norms by parameter name, after the step; collective. clip_factor: what gradients were multiplied with."""
        for hook in self._hooks:
            hook.remove()
        if self._stage > 0:
            dist.all_reduce(self._squares, group=self._topology.data_group)
        dist.all_reduce(self._squares, group=self._topology.tensor_group)
        norms = self._squares.sqrt()
        norms[0] /= clip_factor
        return {name: ParameterNorms(*norms[:, index].tolist()) for name, index in self._names.items()}


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that this call of the optimizer's `step` works on: ZeRO calls it group by group."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def summarise(norms: dict[str, ParameterNorms]) -> dict[str, float]:
    """Rows for metrics.jsonl: `param_norm`, `update_norm`, and all three norms of each block and each other module."""
    layers: dict[str, list[ParameterNorms]] = {}
    for name, one in norms.items():
        parts = name.removeprefix("model.").split(".")
        layers.setdefault(".".join(parts[:2]) if parts[0] == "layers" else parts[0], []).append(one)
    row = {
        "param_norm": _root([n.weight for n in norms.values()]),
        "update_norm": _root([n.update for n in norms.values()]),
    }
    for layer, members in layers.items():
        row[f"grad_norm/{layer}"] = _root([n.gradient for n in members])
        row[f"param_norm/{layer}"] = _root([n.weight for n in members])
        row[f"update_norm/{layer}"] = _root([n.update for n in members])
    return row


def _root(values: list[float]) -> float:
    return sum(value**2 for value in values) ** 0.5
