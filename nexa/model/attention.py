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
from nexa.model import cpu_attention, cpu_linear
from nexa.model.layers import Features, Layers
from nexa.model.norms import FullWidthRMSNorm, RMSNorm, at_least_fp32
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
    behind the cached ones and gives all S; the mask is then [B, 1, T, S], or None when T is 1 or S is T. ahead: None,
    or the mask of `cpu_attention`, which is then the attention.
    """

    cos: Tensor
    sin: Tensor
    shape: tuple[int, int]
    mask: Tensor | None = None
    cumulative: Tensor | None = None
    extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ahead: Tensor | None = None


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
    """o(softmax(q k^T * scale) v); norms and scales as `plan` and `norm.qk` say, all before rotation.

    With `model.attention_gate` what o reads is multiplied by sigmoid(gate(x)), a number for each feature or each head
    (Qiu et al. 2025, arXiv 2505.06708).
    """

    watch: Callable[[Tensor, Tensor, float], None] | None = None
    """Shown q [B, T, heads, head_dim], k [B, S, kv_heads, head_dim] and the scale, just before they meet: logits."""

    def __init__(self, model: ModelConfig, norm: NormConfig, plan: BlockPlan, eps: float, layers: Layers) -> None:
        super().__init__()
        all_heads = model.num_attention_heads
        all_kv_heads = model.num_key_value_heads or all_heads
        # fewer key-value heads than ranks: every rank makes all of them and takes those that its queries look at
        kv_shared = all_kv_heads % layers.tensor_size == 0
        heads = layers.features(all_heads)
        kv_heads = layers.features(all_kv_heads) if kv_shared else Features.whole(all_kv_heads)
        self.heads, self.kv_heads = heads.local, kv_heads.local
        self._heads = heads
        self._known_gain: tuple[list[object], Tensor] | None = None
        self.kv_taken = None if kv_shared else kv_heads_of(heads, all_kv_heads)
        self.head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        available, reason = flash_status()
        if model.attention == "flash" and not available:
            raise UserError(f"model.attention=flash: {reason}; set model.attention=auto or sdpa")
        self.flash = model.attention != "sdpa" and available
        self._any_kernel = model.attention == "auto"
        self.by_products = False
        width, kv_width = all_heads * self.head_dim, all_kv_heads * self.head_dim
        make_kv = layers.column if kv_shared else layers.whole
        self._enter = layers.enter
        self.q_proj = layers.column(model.hidden_size, width, model.input_bias)
        self.k_proj = make_kv(model.hidden_size, kv_width, model.input_bias)
        self.v_proj = make_kv(model.hidden_size, kv_width, model.input_bias)
        self.o_proj = layers.row(width, model.hidden_size)
        gates = {"none": 0, "elementwise": width, "headwise": all_heads}[model.attention_gate]
        self.gate_proj = layers.column(model.hidden_size, gates) if gates else None
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
        # pieces of the output are those of a sum over ranks, so every rank has the scales of all
        scaled = {"": None, "heads": heads, "output": Features.whole(all_heads)}[plan.head_scale]
        self.head_scale = None if scaled is None else scaled.vector(1.0)
        self._scales_output = plan.head_scale == "output"

    def choose_kernel(self) -> None:
        """To be called when the block is compiled: `cpu_attention` and `cpu_linear` pay only then."""
        self.by_products = self._any_kernel
        cpu_linear.choose(self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj, wide=False)

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
        if self.watch is not None:
            self.watch(q, k, scale)
        y = self._attend(q, k, v, scale, context)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x)).view(*context.shape, self.heads, -1)
        if self.head_scale is not None and not self._scales_output:
            y = y * self.head_scale[:, None]
        result: Tensor = self.o_proj(y.reshape(*x.shape[:-1], self.heads * self.head_dim))
        if self.head_scale is not None and self._scales_output:
            result = (result.unflatten(-1, (len(self.head_scale), -1)) * self.head_scale[:, None]).flatten(-2)
        return result

    def value_gain(self) -> Tensor:
        """|W_O W_V|_F^2 over all heads, values repeated for the query heads that share them: fp32 scalar, no gradient.

        Costs 2 d^2 times the width of the values, and between ranks one sum of [d, d]. In eval mode it is remembered
        until a weight changes, because a decoding step does less than that; under tensor parallelism it is not, as
        ranks must agree on when to communicate.
        """
        v, o = self.v_proj.weight, self.o_proj.weight
        assert isinstance(v, Tensor) and isinstance(o, Tensor)
        if self.training or self._heads.local < self._heads.size or torch.compiler.is_compiling():
            return self._value_gain(v, o)
        state: list[object] = [(w.data_ptr(), w._version, w.dtype, w.device) for w in (v, o)]
        if self._known_gain is None or self._known_gain[0] != state:
            self._known_gain = state, self._value_gain(v, o)
        return self._known_gain[1]

    @torch.no_grad()
    def _value_gain(self, v: Tensor, o: Tensor) -> Tensor:
        values = v.view(self.kv_heads, self.head_dim, -1)
        if self.kv_taken is not None:
            values = values[self.kv_taken]
        # columns of W_O that meet the same values add up
        outputs = o.view(len(o), len(values), -1, self.head_dim).sum(2)
        product = self._heads.total(outputs.flatten(1) @ values.flatten(0, 1))
        return at_least_fp32(product).square().sum()

    def train(self, mode: bool = True) -> SelfAttention:
        """As of every module; an engine may have changed weights unseen since."""
        self._known_gain = None
        return super().train(mode)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, context: AttentionContext) -> Tensor:
        """q [B, T, heads, head_dim], k and v [B, S, kv_heads, head_dim] -> [B, T, heads, head_dim]."""
        if self.flash and context.mask is None and q.dtype in {torch.bfloat16, torch.float16}:
            return _flash(q, k, v, scale, context)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.ahead is not None and q.shape == k.shape:
            return cpu_attention.causal_attention(q, k, v, scale, context.ahead).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.mask,
            is_causal=context.mask is None and q.shape[2] == k.shape[2],
            scale=scale,
            enable_gqa=k.shape[1] != self.heads,
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
