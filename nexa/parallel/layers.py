"""Tensor-parallel layers: plain matrices of a rank's share, and communication where a sublayer is entered and left.

One collective serves all the matrices that read the same input (query, key and value; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nexa.model.layers import Features, Head, Layers
from nexa.model.loss import IGNORED
from nexa.parallel import collectives

Crossing = Callable[[Tensor], Tensor]


class Row(nn.Linear):
    """A linear layer whose input features are shared out: partial sums, then `leave`."""

    leave: Crossing

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / n] -> residual stream."""
        return self.leave(F.linear(x, self.weight))


def vocabulary_share(size: int, rank: int, ranks: int) -> tuple[Features, int]:
    """(words of `rank`, rows of every rank's table): the last ranks' tables may end with padding."""
    rows = -(-size // ranks)
    return Features(size, min(rank * rows, size), min((rank + 1) * rows, size)), rows


def mark_rows(share: Features, layer: nn.Module, in_features: int) -> None:
    """Say that `layer` has the rows `share` of a matrix with so many columns, and the same part of its bias."""
    assert isinstance(layer.weight, Tensor)
    share.mark(layer.weight, 0, (share.size, in_features))
    if isinstance(layer.bias, Tensor):
        share.mark(layer.bias, 0, (share.size,))


class VocabularyEmbedding(nn.Embedding):
    """Embedding of which this rank has some rows; the others' words add zeros, then `leave`."""

    leave: Crossing
    words: Features

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids [B, T] -> residual stream."""
        elsewhere = (input_ids < self.words.start) | (input_ids >= self.words.stop)
        local = (input_ids - self.words.start).masked_fill(elsewhere, 0)
        return self.leave(F.embedding(local, self.weight).masked_fill(elsewhere[..., None], 0.0))


class VocabularyHead(Head):
    """Output head over this rank's words; the loss needs three numbers per token of the other ranks."""

    enter: Crossing
    words: Features
    group: dist.ProcessGroup

    def forward(self, hidden: Tensor, labels: Tensor | None = None, row_weights: Tensor | None = None) -> Any:
        """Residual stream -> logits [..., V] of all words, or with labels the loss of all tokens, as `Head`."""
        hidden = self.enter(hidden)
        if labels is not None:
            return super().forward(hidden, labels, row_weights)
        shares = F.linear(hidden, self.matrix, self.bias)
        every = [torch.empty_like(shares) for _ in range(self.group.size())]
        dist.all_gather(every, shares.contiguous(), group=self.group)
        return torch.cat(every, -1)[..., : self.words.size]

    def compile_kernel(self) -> None:
        """The kernel communicates in its middle and stays as it is."""


def vocabulary_kernel(
    logits: Tensor, labels: Tensor, weights: Tensor, words: Features, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """`nexa.model.loss.nll_and_gradient` of logits [N, rows] of this rank's words and labels [N] of all words.

    The losses are the whole ones, on every rank; the gradient is that of this rank's logits, 0 for padding.
    """
    scored = labels != IGNORED
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide[:, words.local :] = float("-inf")  # into the caller's chunk, of which nothing else is wanted
    highest = wide.amax(-1, keepdim=True)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    here = (labels >= words.start) & (labels < words.stop)
    target = (labels - words.start).masked_fill(~here, 0)[:, None]
    wide = wide - highest
    picked = wide.gather(-1, target)[:, 0].masked_fill(~here, 0.0)
    exponential = wide.exp_()
    sums = torch.stack((exponential.sum(-1), picked))
    dist.all_reduce(sums, group=group)
    losses = (sums[0].log() - sums[1]) * scored
    gradient = exponential.div_(sums[0][:, None]).scatter_add_(-1, target, -here[:, None].to(wide.dtype))
    return torch.dot(losses, weights), losses, gradient.mul_((weights * scored)[:, None]).to(logits.dtype)


class NativeLayers(Layers):
    """Shares of layers with nexa's own communication, on any device."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool, device: torch.device | str | None = None) -> None:
        """group: the tensor-parallel ranks. sequence: share the residual stream's tokens out, too."""
        super().__init__(device)
        self.group, self.sequence = group, sequence
        self.rank, self.tensor_size = dist.get_rank(group), group.size()

    def features(self, size: int) -> Features:
        """This rank's share of a dimension; shares differ by one where the ranks do not divide it."""
        start, stop = (size * rank // self.tensor_size for rank in (self.rank, self.rank + 1))
        return Features(size, start, stop, partial(collectives.total, group=self.group), self.sublayer_tokens)

    @property
    def enter(self) -> Crossing:
        """Gather the tokens, or nothing; sum the gradients."""
        return partial(collectives.enter_tokens if self.sequence else collectives.enter, group=self.group)

    @property
    def leave(self) -> Crossing:
        """Sum over the ranks; with sequence parallelism keep this rank's tokens."""
        return partial(collectives.leave_tokens if self.sequence else collectives.leave, group=self.group)

    def column(self, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        """From the entered stream to this rank's features."""
        share = self.features(out_features)
        layer = nn.Linear(in_features, share.local, bias=bias, device=self.device)
        mark_rows(share, layer, in_features)
        return layer

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """From this rank's features to the residual stream."""
        share = self.features(in_features)
        layer = Row(share.local, out_features, bias=False, device=self.device)
        layer.leave = self.leave
        share.mark(layer.weight, 1, (out_features, in_features))
        return layer

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        """ids [B, T] -> residual stream."""
        words, rows = vocabulary_share(vocabulary, self.rank, self.tensor_size)
        layer = VocabularyEmbedding(rows, width, device=self.device)
        layer.words, layer.leave = words, self.leave
        words.mark(layer.weight, 0, (vocabulary, width))
        return layer

    def head(self, width: int, vocabulary: int, bias: bool = False) -> Head:
        """From the residual stream to logits or the loss."""
        words, rows = vocabulary_share(vocabulary, self.rank, self.tensor_size)
        layer = VocabularyHead(width, rows, bias=bias, device=self.device)
        layer.enter, layer.words, layer.group = self.enter, words, self.group
        layer.kernel = partial(vocabulary_kernel, words=words, group=self.group)
        mark_rows(words, layer, width)
        return layer
