"""What a measure is, what it sees of a batch, and how processes put together what each saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from nexa.model.attention import AttentionContext
from nexa.model.decoder import Decoder

Values = dict[str, Any]
"""Name of a quantity -> a number, a list with one per block or per stream, a matrix of streams, or a dict by name."""
Part = Literal["attention", "feed_forward"]
Combine = Callable[[Tensor, Literal["sum", "max"]], Tensor]
"""(what this process has, how) -> the same of all processes."""


def alone(x: Tensor, how: Literal["sum", "max"]) -> Tensor:
    """`Combine` for a process that sees everything."""
    return x


def unchanged(x: Tensor) -> Tensor:
    """A stream of which this process has every token."""
    return x


@dataclass(frozen=True)
class Sharing:
    """How the processes of a run share a batch. The defaults are those of one process alone.

    whole: this process's share of a residual stream -> the stream of all its tokens. sequences: combines over the
    processes that have other sequences. heads: over those and the ones that have other heads of the same sequences.
    """

    whole: Callable[[Tensor], Tensor] = unchanged
    sequences: Combine = alone
    heads: Combine = alone


@dataclass
class Seen:
    """One batch. A position counts when its target is scored; padding and the ends of masked documents do not.

    inputs: the arguments of `Decoder.forward`. scored: bool [B, T]. lengths: scored positions of each sequence that
    has any. context: what the blocks share, known once the first block runs.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    lengths: list[int]
    index: Tensor
    """Scored positions of the flattened batch, int64 [n]."""
    context: AttentionContext | None = field(default=None, repr=False)

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> Seen:
        """For a batch with labels. Waits for the device."""
        scored = inputs["labels"] >= 0
        lengths = [count for count in scored.sum(-1).tolist() if count]
        return cls(inputs, scored, lengths, scored.flatten().nonzero().flatten())

    def rows(self, x: Tensor) -> Tensor:
        """Scored tokens of a whole stream [..., d] as [n, d], in fp32 or wider."""
        flat = x.detach().flatten(0, -2)
        if self.index.numel() < flat.shape[0]:
            flat = flat.index_select(0, self.index)
        return flat if flat.dtype == torch.float64 else flat.float()


@dataclass(frozen=True)
class Totals:
    """What all batches of all processes held: scored tokens, sequences, and the mean loss in nats per token."""

    tokens: int
    sequences: int
    loss: float


class Measure:
    """One or several quantities, added up batch by batch: memory does not grow with the number of batches.

    Override what is needed. Streams are numbered 0 (what block 0 reads, the embedding's output) to L (what the last
    block gives); block i reads stream i and gives stream i + 1. What is kept goes into `sums` and `peaks`, which are
    combined over processes before `result` is called.
    """

    over_heads = False
    """Whether a process sees only its heads, and not the whole stream."""

    def __init__(self, decoder: Decoder) -> None:
        """For `decoder`, of which a process may have only a share."""
        self.blocks = len(decoder.model.layers)
        self.width = decoder.config.hidden_size
        self.device = decoder.lm_head.weight.device
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}

    def zeros(self, *shape: int) -> Tensor:
        """An accumulator: fp64, so that sums do not depend on how tokens are batched."""
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def stream(self, number: int, h: Tensor, seen: Seen) -> None:
        """Stream `number` of the batch: scored tokens [n, d], fp32 or wider."""

    def added(self, block: int, part: Part, y: Tensor, seen: Seen) -> None:
        """What a sublayer of `block` adds to the skip path: scored tokens [n, d]."""

    def attention(self, block: int, q: Tensor, k: Tensor, scale: float, seen: Seen) -> None:
        """Queries [B, T, heads, d_h] and keys [B, T, key-value heads, d_h] as the kernel gets them."""

    def after(self, decoder: Decoder, seen: Seen) -> None:
        """After the forward pass of a batch: what needs passes of its own."""

    def result(self, totals: Totals) -> Values:
        """The quantities."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the decoder as it was, whatever happened."""
