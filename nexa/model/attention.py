"""Causal self-attention with grouped queries, rotary positions and the optional norms inside it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import UserError
from nexa.model.layers import Features, Layers
from nexa.model.norms import FullWidthRMSNorm, RMSNorm
from nexa.model.placement import BlockPlan
from nexa.model.rope import apply_rope

COSINE_MIN_LENGTH = 1e-12


@dataclass(frozen=True)
class AttentionContext:
    """What all blocks of one forward pass share.

    cos, sin: rotary tables [T, head_dim] fp32 ([B, T, head_dim] where rows have positions of their own). shape: (B, T)
    of the batch. mask: None for plain causal attention, else bool [B, 1, T, T], True where a query may look.
    cumulative: None, or int32 [documents + 1], the boundaries of documents in the flattened batch, for the
    variable-length kernel. extend: None, or what puts a block's new keys and values [B, kv_heads, T, head_dim]
    behind the cached ones and gives all S; the mask is then [B, 1, T, S], or None when T is 1 or S is T.
    """

    cos: Tensor
    sin: Tensor
    shape: tuple[int, int]
    mask: Tensor | None = None
    cumulative: Tensor | None = None
    extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def flash_status() -> tuple[bool, str]:
    """Whether flash-attn can be used here, and why (not)."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if importlib.util.find_spec("flash_attn") is None:
        return False, "package flash-attn is not installed (extra: nexa[gpu])"
    return True, "flash-attn is installed"


def document_boundaries(document_ids: Tensor) -> Tensor:
    """Offsets at which documents begin in the flattened [B, T] batch, with B*T at the end; int32.

    A row always begins a document: rows do not see one another.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    offsets = starts.flatten().nonzero().flatten()
    return torch.cat((offsets, offsets.new_tensor([document_ids.numel()]))).to(torch.int32)


def document_mask(document_ids: Tensor, queries: int | None = None) -> Tensor:
    """Causal attention inside documents: bool [B, 1, queries, T] from ids [B, T].

    The queries are the last ones; null: all.
    """
    length = document_ids.shape[1]
    queries = length if queries is None else queries
    same = document_ids[:, length - queries :, None] == document_ids[:, None, :]
    causal = torch.ones(queries, length, dtype=torch.bool, device=document_ids.device).tril(length - queries)
    return (same & causal)[:, None]


def kv_heads_of(heads: Features, kv_heads: int) -> list[int]:
    """The key-value heads that a share of the query heads looks at: once each when as many queries look at every one
    of them, else one for each query head."""
    looked_at = [head * kv_heads // heads.size for head in range(heads.start, heads.stop)]
    distinct = sorted(set(looked_at))
    return distinct if len({looked_at.count(one) for one in distinct}) == 1 else looked_at


class SelfAttention(nn.Module):
    """o(softmax(q k^T * scale) v); norms and scales as `plan` and `norm.qk` say, all before rotation."""

    def __init__(self, model: ModelConfig, norm: NormConfig, plan: BlockPlan, eps: float, layers: Layers) -> None:
        super().__init__()
        all_heads = model.num_attention_heads
        all_kv_heads = model.num_key_value_heads or all_heads
        # fewer key-value heads than ranks: every rank makes all of them and takes those that its queries look at
        kv_shared = all_kv_heads % layers.tensor_size == 0
        heads = layers.features(all_heads)
        kv_heads = layers.features(all_kv_heads) if kv_shared else Features.whole(all_kv_heads)
        self.heads, self.kv_heads = heads.local, kv_heads.local
        self.kv_taken = None if kv_shared else kv_heads_of(heads, all_kv_heads)
        self.head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        available, reason = flash_status()
        if model.attention == "flash" and not available:
            raise UserError(f"model.attention=flash: {reason}; set model.attention=auto or sdpa")
        self.flash = model.attention != "sdpa" and available
        width, kv_width = all_heads * self.head_dim, all_kv_heads * self.head_dim
        make_kv = layers.column if kv_shared else layers.whole
        self._enter = layers.enter
        self.q_proj = layers.column(model.hidden_size, width, model.input_bias)
        self.k_proj = make_kv(model.hidden_size, kv_width, model.input_bias)
        self.v_proj = make_kv(model.hidden_size, kv_width, model.input_bias)
        self.o_proj = layers.row(width, model.hidden_size)
        heads_with_norm = plan.head_norms + (("q", "k") if norm.qk == "rms" else ())
        one_head = Features.whole(self.head_dim)
        self.q_norm = RMSNorm(one_head, eps) if "q" in heads_with_norm else None
        self.k_norm = RMSNorm(one_head, eps) if "k" in heads_with_norm else None
        self.v_norm = RMSNorm(one_head, eps) if "v" in heads_with_norm else None
        if norm.qk == "rms_full":
            self.q_norm = FullWidthRMSNorm(layers.features(width), eps)
            self.k_norm = FullWidthRMSNorm(layers.features(kv_width) if kv_shared else Features.whole(kv_width), eps)
        longest = model.max_position_embeddings
        self.qk_scale = (
            # Henry et al. 2020, equation 4: log2(L^2 - L) for the longest usual sequence L
            nn.Parameter(torch.tensor([math.log2(max(longest**2 - longest, 2))])) if norm.qk == "cosine" else None
        )
        self.head_scale = heads.vector(1.0) if plan.head_scale else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """[B, T, d] or [tokens, d] -> the same."""
        x = self._enter(x)
        q = self.q_proj(x).view(*context.shape, self.heads, self.head_dim)
        k = self.k_proj(x).view(*context.shape, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(*context.shape, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.v_norm is not None:
            v = self.v_norm(v)
        scale = self.head_dim**-0.5
        if self.qk_scale is not None:
            q = F.normalize(q, dim=-1, eps=COSINE_MIN_LENGTH) * self.qk_scale
            k = F.normalize(k, dim=-1, eps=COSINE_MIN_LENGTH)
            scale = 1.0
        q, k = apply_rope(q, context.cos, context.sin), apply_rope(k, context.cos, context.sin)
        if self.kv_taken is not None:
            k, v = k[:, :, self.kv_taken], v[:, :, self.kv_taken]
        if context.extend is not None:
            k, v = (t.transpose(1, 2) for t in context.extend(k.transpose(1, 2), v.transpose(1, 2)))
        y = self._attend(q, k, v, scale, context)
        if self.head_scale is not None:
            y = y * self.head_scale[:, None]
        return self.o_proj(y.reshape(*x.shape[:-1], self.heads * self.head_dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, context: AttentionContext) -> Tensor:
        """q [B, T, heads, head_dim], k and v [B, S, kv_heads, head_dim] -> [B, T, heads, head_dim]."""
        if self.flash and context.mask is None and q.dtype in {torch.bfloat16, torch.float16}:
            return _flash(q, k, v, scale, context)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=context.mask,
            is_causal=context.mask is None and q.shape[1] == k.shape[1],
            scale=scale,
            enable_gqa=k.shape[2] != self.heads,
        )
        return y.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, context: AttentionContext) -> Tensor:
    """flash-attn 2; documents through its variable-length entry. Needs a GPU: not covered on CPU."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if context.cumulative is None:
        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    offsets, longest = context.cumulative, q.shape[1]
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    y = flash_attn_varlen_func(*flat, offsets, offsets, longest, longest, softmax_scale=scale, causal=True)
    return y.view_as(q)
