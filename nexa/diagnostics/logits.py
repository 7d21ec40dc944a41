"""Attention logits, made again from queries and keys: the kernels do not give them."""

from __future__ import annotations

import torch
from torch import Tensor

from nexa.diagnostics.base import Measure, Seen, Totals, Values
from nexa.model.attention import AttentionContext
from nexa.model.decoder import Decoder

LOGITS = 1 << 23
"""Attention logits that exist at once."""


def visible(context: AttentionContext, row: int, start: int, stop: int, keys: int) -> Tensor:
    """Where queries [start, stop) of sequence `row` may look: bool [stop - start, keys]."""
    if context.mask is not None:
        return context.mask[row, 0, start:stop, :keys]
    position = torch.arange(keys, device=context.cos.device)
    causal = position[start:stop, None] >= position
    if context.cumulative is None:
        return causal
    # flattened offsets of documents, for the variable-length kernel
    document = torch.bucketize(position + row * context.shape[1], context.cumulative, right=True)
    return causal & (document[start:stop, None] == document)


class Logits(Measure):
    """The largest |q k^T * scale| that a softmax of the block gets, and how much attention goes to the first token.

    `logit_max`: over heads and all allowed pairs with a scored query. `sink_share`: the attention that a query gives
    to the first token it may look at, averaged over heads and over the scored queries that see others too (Xiao et al.
    2023, arXiv 2309.17453; Gu et al. 2024, arXiv 2410.10781).
    """

    over_heads = True

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        self.sums = {"sink": self.zeros(self.blocks), "queries": self.zeros(self.blocks)}
        self.peaks = {"logit": self.zeros(self.blocks)}

    def attention(self, block: int, q: Tensor, k: Tensor, scale: float, seen: Seen) -> None:
        """Sequence by sequence, some queries at a time."""
        assert seen.context is not None
        rows, length, heads, head_dim = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        step = max(1, LOGITS // (heads * length))
        for row in range(rows):
            for start in range(0, length, step):
                stop = min(start + step, length)
                queries = q[row, start:stop].to(wide).view(stop - start, k.shape[2], -1, head_dim)
                logits = torch.einsum("tgrc,sgc->grts", queries, k[row, :stop].to(wide)).flatten(0, 1) * scale
                allowed = visible(seen.context, row, start, stop, stop)
                self._add(block, logits, allowed, seen.scored[row, start:stop])

    def _add(self, block: int, logits: Tensor, allowed: Tensor, scored: Tensor) -> None:
        """logits [heads, t, s], allowed [t, s], scored [t]."""
        counted = allowed & scored[:, None]
        largest = logits.abs().masked_fill(~counted, 0.0).amax().double()
        self.peaks["logit"][block] = torch.maximum(self.peaks["logit"][block], largest)
        share = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        first = allowed.int().argmax(-1)
        on_first = share.gather(-1, first.expand(logits.shape[0], -1)[..., None])[..., 0]
        queries = scored & (allowed.sum(-1) > 1)
        self.sums["sink"][block] += torch.where(queries, on_first, 0.0).sum(dtype=torch.float64)
        self.sums["queries"][block] += queries.sum() * logits.shape[0]

    def result(self, totals: Totals) -> Values:
        """Both by block; the share is null where no query sees a second token."""
        shares = (self.sums["sink"] / self.sums["queries"]).tolist()
        return {
            "logit_max": self.peaks["logit"].tolist(),
            "sink_share": [share if share == share else None for share in shares],
        }
