"""The layers that tensor parallelism shards, as a model asks for them. Here every process has all of each.

A sublayer *enters* with what all ranks of a tensor-parallel group share and *leaves* with a sum over them; between the
two a rank computes its own features: heads of the attention, columns of the feed-forward, words of the vocabulary.
`nexa.parallel` has the sharded makers; a model does not know which one it was built with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexa.model.cpu_linear import Linear
from nexa.model.loss import Kernel, compiled_kernel, linear_cross_entropy, nll_and_gradient
from nexa.sharding import Shard


def unchanged(x: Tensor) -> Tensor:
    """What crossing into a sublayer, or summing over ranks, is for a process that has everything."""
    return x


@dataclass(frozen=True)
class Tokens:
    """All tokens of a forward pass, of which this process has some, and how its gradients stand to the whole batch."""

    average: Callable[[Tensor], Tensor] = unchanged
    """Mean over the processes of what each has averaged over its own tokens; not differentiated, collective."""
    gradient_scale: float = 1.0
    """What gradients are multiplied with here, over those of the mean loss of the whole batch."""
    passes_per_step: int = 1
    """Forward passes, each of a micro-batch, of an optimizer step."""


ALONE = Tokens()
"""A process that shares its weights with no other and takes a step after each pass."""


@dataclass(frozen=True)
class Features:
    """A dimension of which this process computes indices [start, stop) of `size`."""

    size: int
    start: int
    stop: int
    total: Callable[[Tensor], Tensor] = unchanged
    """Sums a statistic [..., k] over the ranks that share the dimension, and its gradient too."""
    tokens: Tokens = ALONE
    """Where other processes have these features of other tokens."""

    @classmethod
    def whole(cls, size: int, tokens: Tokens = ALONE) -> Features:
        """A dimension that no other process shares."""
        return cls(size, 0, size, tokens=tokens)

    @property
    def local(self) -> int:
        """How many indices are this process's."""
        return self.stop - self.start

    def vector(self, value: float) -> nn.Parameter:
        """A parameter with one number per index, all `value` at first; checkpoint shape [size]."""
        parameter = nn.Parameter(torch.full((self.local,), value))
        self.mark(parameter, 0, (self.size,))
        return parameter

    def mark(self, parameter: Tensor, dim: int, shape: tuple[int, ...]) -> None:
        """Say that `parameter` is this process's part, along `dim`, of a whole of `shape`.

        DeepSpeed reads the last two marks, Megatron-LM's names, to count each number of a gradient once.
        """
        each = shape[dim] // self.size
        if self.local < self.size:
            shard = Shard(shape, dim, self.start * each, self.stop * each)
            for name, mark in (("nexa_shard", shard), ("tensor_model_parallel", True), ("partition_dim", dim)):
                setattr(parameter, name, mark)


UNIT_MIN_LENGTH = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """x [..., d] with every row divided by its length: FixNorm (Nguyen and Chiang 2018; arXiv 1910.05895, section 2.2).

    Computed in fp32 or wider, given back in the dtype of `x`; a row of zeros, which pads a table, stays.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squared = wide.square().sum(-1, keepdim=True).clamp_min(UNIT_MIN_LENGTH**2)
    return (wide * torch.rsqrt(squared)).to(x.dtype)


class Head(nn.Linear):
    """Output head; with labels it returns the cross-entropy without making the full logits.

    The loss is computed inside the module's forward so that ZeRO-3 has the weight gathered.
    """

    chunk_tokens: int = 4096
    kernel: Kernel = staticmethod(nll_and_gradient)
    fixnorm: bool = False
    """Words are compared with rows of length one: the head is a FixNorm embedding."""

    @property
    def matrix(self) -> Tensor:
        """What hidden states are multiplied by, [V, d]."""
        return unit_rows(self.weight) if self.fixnorm else self.weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None, row_weights: Tensor | None = None) -> Any:
        """hidden [..., d] -> logits [..., V]; with labels [..., T] the summed loss, scalar; with row_weights [...] too
        (the weighted sum, which is differentiated; the summed loss of each row [...], which is not)."""
        if labels is None:
            return F.linear(hidden, self.matrix, self.bias)
        flat = hidden.reshape(-1, hidden.shape[-1]), self.matrix, labels.flatten()
        weights = None if row_weights is None else row_weights[..., None].expand(labels.shape).flatten()
        total, losses = linear_cross_entropy(*flat, self.chunk_tokens, self.kernel, self.bias, weights)
        return total if row_weights is None else (total, losses.view(labels.shape).sum(-1))

    def compile_kernel(self) -> None:
        """Use the compiled kernel of the loss from now on."""
        self.kernel = compiled_kernel()


class Layers:
    """Makes whole layers."""

    tensor_size = 1
    """Ranks that share a layer."""
    stream_tokens: Tokens = ALONE
    """Of the residual stream."""
    sublayer_tokens: Tokens = ALONE
    """Inside a sublayer, which has all tokens of a tensor-parallel group."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        """device: of the matrices; `meta` allocates nothing and leaves them to be filled in one by one."""
        self.device = device

    def features(self, size: int) -> Features:
        """A dimension inside a sublayer."""
        return Features.whole(size, self.sublayer_tokens)

    def stream(self, width: int) -> Features:
        """The features of the residual stream, which every rank has."""
        return Features.whole(width, self.stream_tokens)

    @property
    def enter(self) -> Callable[[Tensor], Tensor]:
        """Bring the residual stream [B, T, d] (or a share of its tokens) into a sublayer."""
        return unchanged

    def whole(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """A matrix that every rank has whole."""
        return Linear(in_features, out_features, bias=bias, device=self.device)

    def column(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """From the entered stream to this rank's features."""
        return self.whole(in_features, out_features, bias)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """From this rank's features back to the residual stream, which includes the sum over ranks."""
        return self.whole(in_features, out_features)

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """ids [B, T] -> residual stream [B, T, d] (or a share of its tokens)."""
        return nn.Embedding(vocabulary, width, device=self.device)

    def head(self, width: int, vocabulary: int, bias: bool = False) -> Head:
        """From the residual stream to logits [..., V] or the loss."""
        return Head(width, vocabulary, bias=bias, device=self.device)
