"""Causal attention for CPUs: batched matrix products over blocks of queries, forward and backward.

PyTorch's flash attention for CPUs works in small blocks that each go through the conversion of a general product, and
makes the probabilities again for its backward pass. Here blocks are large, all heads are one product, and what the
softmax exponentiated is kept: half the time for sequences of 256, for as many numbers a token, head and layer as
the sequence is long. See docs/benchmarks.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexa.hardware import cpu_units

BLOCKS = 64, 128
"""Queries at a time, for sequences of up to four of the smaller and for others: less has smaller products, more has
more that causality forbids."""
LONGEST = 1024
"""Beyond, what is kept would be more than all else that a layer keeps."""
UNITS = {torch.bfloat16: "avx512_bf16", torch.float32: "avx512_f"}
"""What a CPU must have, as PyTorch calls it, for this to be faster in a dtype: that is where it was measured."""
UPPER_HALF = -(1 << 16)
"""The bits of an fp32 number that bf16 has."""
FORBIDDEN = 1e30
"""Taken off the scores of positions ahead."""


def serves(dtype: torch.dtype, device: torch.device, length: int) -> bool:
    """Whether this is the attention of a causal forward pass: with a gradient, on such a CPU, not too long."""
    return torch.is_grad_enabled() and device.type == "cpu" and UNITS.get(dtype) in cpu_units() and length <= LONGEST


def ahead(length: int) -> Tensor:
    """What is added to the scores of the last block of queries, if all blocks are full: [queries, length] fp32, 0 or
    -FORBIDDEN. Each block before has the columns from another one on.

    Made outside of what is compiled, which would make every number of it again, one by one.
    """
    block = BLOCKS[length > 4 * BLOCKS[0]]
    whole = -(-length // block) * block
    return torch.full((block, whole), -FORBIDDEN).triu(whole - block + 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """softmax(q k^T * scale + causal mask) v; all [B, heads, T, head_dim], bf16 or fp32. mask: `ahead(T)`.

    Scores are fp32 for bf16 inputs, too: rounded to bf16, a score of 20 would be off by as much as 0.06.
    """
    y: Tensor = _CausalAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale, mask)
    return y


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *args: object) -> Tensor:
        """(q, k, v, scale, mask) -> y."""
        q, k, v, scale, mask = args
        assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and isinstance(scale, float)
        assert isinstance(mask, Tensor)
        queries, keys, values = _flat(q).float(), _flat(k).float(), _flat(v)
        results, kept, factors = [], [], []
        for mine, seen in _blocks(q.shape[2], len(mask)):
            first = mask.shape[1] - len(mask) - mine.start
            hidden = mask[: mine.stop - mine.start, first : first + seen.stop]
            scores = (queries[:, mine] @ keys[:, seen].mT) * scale + hidden
            e = torch.exp(scores - scores.amax(-1, keepdim=True))
            factors.append(1 / e.sum(-1, keepdim=True))
            kept.append(e.to(v.dtype))
            results.append(((kept[-1] @ values[:, seen]).float() * factors[-1]).to(v.dtype))
        y = torch.cat(results, 1).view(q.shape)
        ctx.save_for_backward(q, k, v, y, torch.cat(factors, 1), *kept)
        ctx.scale = scale  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, y, factor, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        found = _gradients(q, k, v, y, grads[0], factor, kept, ctx.scale)  # type: ignore[attr-defined]
        return *found, None, None


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, dy: Tensor, factor: Tensor, kept: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v [B, heads, T, head_dim], from the output y, its gradient dy and the probabilities, which are
    `factor` [B * heads, T, 1] fp32 times `kept`, one [B * heads, queries, keys] for each block.

    What the softmax takes off the gradient of its probabilities is taken off inside a product, as two more features:
    products are rounded to the inputs' dtype, and here small numbers are differences of large ones.
    """
    shape, length, dtype = q.shape, q.shape[2], q.dtype
    less, one = _with_two(dy, -(dy.float() * y.float()).sum(-1)), F.pad(v, (0, 2), value=1.0)
    less, one, q, k = (_flat(each) for each in (less, one, q, k))
    divided = (_flat(dy).float() * factor).to(dtype)
    dq, dk, dv = [], torch.zeros(()), torch.zeros(())
    for e, (mine, seen) in zip(kept, _blocks(length, kept[0].shape[1]), strict=True):
        dp = less[:, mine] @ one[:, seen].mT
        ds = (e.float() * (factor[:, mine] * scale) * dp.float()).to(dtype)
        dq.append(ds @ k[:, seen])
        behind = (0, 0, 0, length - seen.stop)
        dk = dk + F.pad((ds.mT @ q[:, mine]).float(), behind)
        dv = dv + F.pad((e.mT @ divided[:, mine]).float(), behind)
    return torch.cat(dq, 1).view(shape), dk.to(dtype).view(shape), dv.to(dtype).view(shape)


def _blocks(length: int, block: int) -> list[tuple[slice, slice]]:
    """Queries and the keys that they see, in order."""
    ends = ((start, min(start + block, length)) for start in range(0, length, block))
    return [(slice(start, stop), slice(0, stop)) for start, stop in ends]


def _with_two(x: Tensor, addend: Tensor) -> Tensor:
    """x [..., n] and addend [...] fp32, split into two features of x's dtype: [..., n + 2]."""
    high = (addend.view(torch.int32) & UPPER_HALF).view(torch.float32)  # a compiler takes a cast there and back away
    return torch.cat((x, high.to(x.dtype)[..., None], (addend - high).to(x.dtype)[..., None]), -1)


def _flat(x: Tensor) -> Tensor:
    """[B, heads, T, n] -> [B * heads, T, n]."""
    return x.flatten(0, 1)
